"""Pictures of every mode look as in a viewer: transparency shows white, 16 bits and floats keep their shades."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.runtime.pictures.images import load_image
from qwen2vl_tc.runtime.pictures.items import cut_item
from qwen2vl_tc.runtime.pictures.request import VisionItem, VisionOptions
from qwen2vl_tc.runtime.pictures.vision import ImageSettings

SETTINGS = ImageSettings(min_pixels=3136, max_pixels=100_000, patch_size=14, temporal_patch_size=2, merge_size=2)
# one shade a column
RAMP = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (6, 1))
GREY = Image.fromarray(RAMP)
COLOURS = Image.fromarray(np.stack([RAMP, RAMP[:, ::-1], 255 - RAMP // 2], -1))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(source: object, modes: str = "viewer") -> np.ndarray:
    loaded = load_image(source, modes=modes)  # type: ignore[arg-type]
    assert loaded.mode == "RGB"
    return np.asarray(loaded).astype(int)


# mode: the mode before it, where Pillow needs one, and how far its colours may be off what went in
OPAQUE = {
    "L": (None, 0),
    "LA": (None, 0),
    "La": ("LA", 0),
    "PA": ("P", 52),  # dithered from colours that lie 51 apart
    "P": (None, 52),
    "RGBA": (None, 0),
    "RGBa": ("RGBA", 0),
    "RGBX": (None, 0),
    "CMYK": (None, 0),
    "YCbCr": (None, 3),
    "HSV": (None, 6),
    "LAB": (None, 40),  # has fewer colours where they are bright
    "I": ("L", 0),
    "F": ("L", 0),
}


@pytest.mark.parametrize("mode", OPAQUE)
def test_an_opaque_picture_keeps_its_colours_in_every_mode(mode):
    via, tolerance = OPAQUE[mode]
    is_grey = mode in ("L", "LA", "La", "I", "F")
    source = GREY if is_grey else COLOURS
    image = (source.convert(via) if via else source).convert(mode)
    assert image.mode == mode
    assert np.abs(pixels_of(image) - np.asarray(source.convert("RGB")).astype(int)).max() <= tolerance


def test_black_and_white_is_black_and_white():
    bits = RAMP > 100
    np.testing.assert_array_equal(pixels_of(Image.fromarray(bits))[..., 0], np.where(bits, 255, 0))


def clear_left_half(mode: str) -> Image.Image:
    """Black that is opaque on the right alone."""
    alpha = Image.fromarray(np.where(np.arange(20) < 10, 0, 255).astype(np.uint8)[None].repeat(8, 0))
    image = Image.new("RGB", (20, 8))
    image.putalpha(alpha)
    if mode in ("RGBA", "LA", "RGBa"):
        return image.convert(mode)
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode == "PA":
        indexed = Image.new("P", (20, 8), 0)
        indexed.putpalette([0, 0, 0])
        made = indexed.convert("PA")
        made.putalpha(alpha)
        return made
    # a colour or an index that stands for nothing
    numbers = np.where(np.arange(20) < 10, 1, 0).astype(np.uint8)[None].repeat(8, 0)
    made = Image.fromarray(numbers)
    if mode == "P":
        made.putpalette([0, 0, 0, 9, 9, 9])
    elif mode == "RGB":
        made = Image.merge("RGB", [made] * 3)
    elif mode == "1":
        made = Image.fromarray(numbers > 0)
    elif mode == "I;16":
        made = Image.fromarray(numbers.astype(np.uint16))
    made.info["transparency"] = {"RGB": (1, 1, 1), "1": 255}.get(mode, 1)
    return made


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA", "P", "L", "RGB", "1", "I;16"])
def test_what_is_transparent_shows_white(mode):
    image = clear_left_half(mode)
    assert image.mode == mode
    shown = pixels_of(image)
    assert (shown[:, :10] == 255).all() and (shown[:, 10:] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_what_is_transparent_in_a_png_shows_white_and_by_transformers_bits_black(mode):
    image = clear_left_half(mode)
    given = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    data = saved(image, "PNG", **given)
    shown = pixels_of(data)
    assert (shown[:, :10] == 255).all() and (shown[:, 10:] == 0).all()
    assert pixels_of(data, "transformers").max() < 10


def test_half_transparent_pixels_are_mixed_with_white_as_qwen_vl_utils_mixes_them():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.split()[3])
    for source in (image, saved(image, "PNG"), saved(image, "WEBP", lossless=True, exact=True)):
        np.testing.assert_array_equal(pixels_of(source), np.asarray(white))


DEEP = (np.arange(0, 65536, 257, dtype=np.uint16)[None].repeat(4, 0), np.arange(256)[None].repeat(4, 0))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_16_bits_become_8(mode):
    deep, shades = DEEP
    image = Image.fromarray(deep)
    if mode in ("I;16B", "I;16L"):
        order = ">u2" if mode == "I;16B" else "<u2"
        image = Image.frombytes(mode, image.size, deep.astype(order).tobytes())
    elif mode == "I":
        image = Image.fromarray(deep.astype(np.int32))
    assert image.mode == mode
    np.testing.assert_array_equal(pixels_of(image)[..., 1], shades)
    assert (pixels_of(image, "transformers")[..., 1] == 255).mean() > 0.9


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_a_file_of_16_bits_becomes_8_however_dark_it_is(kind):
    deep, shades = DEEP
    np.testing.assert_array_equal(pixels_of(saved(Image.fromarray(deep), kind))[..., 0], shades)
    dark = Image.fromarray(np.full((8, 8), 250, np.uint16))
    assert pixels_of(saved(dark, kind)).max() == 1


def png16(rows: np.ndarray, clear: bytes = b"") -> bytes:
    """A PNG of 16 bits and as many channels as the last axis has: Pillow writes none with colours."""
    height, width, channels = rows.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)),
        *([(b"tRNS", clear)] if clear else []),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_kind_of_16_bit_png_keeps_its_shades_and_shows_white_where_it_is_clear(channels):
    deep, shades = DEEP
    has_alpha = channels in (2, 4)
    rows = np.stack([deep] * channels, -1)
    if has_alpha:
        rows[..., -1] = 65535
        rows[0, :, -1] = 0
    shown = pixels_of(png16(rows))
    np.testing.assert_array_equal(shown[1:], np.stack([shades] * 3, -1)[1:])
    assert (shown[0] == 255).all() == has_alpha


def test_a_colour_of_16_bits_that_stands_for_nothing_shows_white():
    rows = np.zeros((2, 4, 3), np.uint16)
    rows[0] = (0x1234, 0x5678, 0x9ABC)
    shown = pixels_of(png16(rows, rows[0, 0].astype(">u2").tobytes()))
    assert (shown[0] == 255).all() and (shown[1] == 0).all()


@pytest.mark.parametrize("scale", [1, 255])
def test_floats_from_0_to_1_and_from_0_to_255_are_understood(scale):
    shades = np.arange(256)[None].repeat(4, 0)
    image = Image.fromarray((shades * scale / 255).astype(np.float32))
    for source in (image, saved(image, "TIFF")):
        np.testing.assert_array_equal(pixels_of(source)[..., 2], shades)


def test_floats_that_overshoot_a_little_are_cut_off():
    image = Image.fromarray(np.array([[-0.1, 0, 0.5, 1, 1.2]], np.float32))
    assert pixels_of(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("values", [[-3, 1], [0, 40_000], [0, float("nan")], [0, float("inf")]], ids=str)
def test_floats_of_another_range_are_refused_by_name(tmp_path, values):
    path = tmp_path / "heights.tif"
    Image.fromarray(np.array([values], np.float32)).save(path)
    with pytest.raises(RequestError, match=r"heights\.tif: floats from .*, expected 0 to 1 or 0 to 255"):
        load_image(path)


@pytest.mark.parametrize("values", [[-1, 5], [0, 70_000]], ids=str)
def test_integers_of_another_range_are_refused_by_name(values):
    with pytest.raises(RequestError, match=r"PIL image .*: integers from .*, expected 8 or 16 bits"):
        load_image(Image.fromarray(np.array([values], np.int32)))


def test_integers_of_8_bits_keep_their_values():
    np.testing.assert_array_equal(pixels_of(Image.fromarray(RAMP.astype(np.int32)))[..., 0], RAMP)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_request_chooses_transformers_bits_for_pictures_and_frames(kind):
    clear = saved(clear_left_half("RGBA").resize((56, 56)), "PNG")
    item = VisionItem(kind, clear if kind == "image" else [clear, clear], "here")
    shown = cut_item(item, SETTINGS, VisionOptions()).patches
    kept = cut_item(item, SETTINGS, VisionOptions(picture_modes="transformers")).patches
    assert shown.max() == 255 and kept.max() == 0
    with pytest.raises(RequestError, match="'all': expected viewer or transformers"):
        VisionOptions(picture_modes="all")
