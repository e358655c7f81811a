"""Pictures become the patches that transformers' default processor makes of them."""

import base64
import io
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as original

from qwen2vl_tc.artifacts.errors import MissingDependencyError, RequestError
from qwen2vl_tc.runtime.pictures import resize as resizing
from qwen2vl_tc.runtime.pictures.images import load_image
from qwen2vl_tc.runtime.pictures.items import cut_item
from qwen2vl_tc.runtime.pictures.patches import image_patches
from qwen2vl_tc.runtime.pictures.request import VisionItem, VisionOptions
from qwen2vl_tc.runtime.pictures.resize import SizeRequest, image_size, resize, smart_resize
from qwen2vl_tc.runtime.pictures.vision import ImageSettings
from qwen2vl_tc.runtime.text.messages import vision_items
from qwen2vl_tc.toolchain.verify.hf_processor import default_image_processor

PUBLISHED = ImageSettings(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2)
SMALL = ImageSettings(min_pixels=3136, max_pixels=100_000, patch_size=14, temporal_patch_size=2, merge_size=2)
SIZES = [(1, 1), (5, 7), (27, 29), (28, 28), (56, 84), (301, 199), (1280, 720), (30, 5900), (3000, 16)]


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode) if mode != "RGBA" else Image.fromarray(noise)


def original_patches(source: object, wanted: ImageSettings) -> tuple[np.ndarray, tuple[int, ...]]:
    processor = default_image_processor(
        do_rescale=False, do_normalize=False, min_pixels=wanted.min_pixels, max_pixels=wanted.max_pixels
    )
    features = processor(processor.fetch_images(source), return_tensors="np")
    return features["pixel_values"], tuple(features["image_grid_thw"][0].tolist())


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wanted", [PUBLISHED, SMALL], ids=["published", "small"])
def test_patches_have_the_bits_of_transformers(size, wanted):
    patches, grid = image_patches(picture(size), wanted)
    expected, expected_grid = original_patches(picture(size), wanted)
    assert patches.dtype == np.uint8 and patches.shape == (np.prod(grid), wanted.patch_dim)
    assert grid == expected_grid
    np.testing.assert_array_equal(patches, expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "YCbCr", "I;16"])
def test_every_pixel_format_has_the_bits_of_transformers(mode):
    image = picture((61, 45), mode if mode != "I;16" else "L").convert(mode)
    loaded = load_image(image, modes="transformers")
    np.testing.assert_array_equal(image_patches(loaded, SMALL)[0], original_patches(image, SMALL)[0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_file_has_the_bits_of_transformers_however_it_is_named(tmp_path, kind, mode):
    if kind == "JPEG" and mode == "RGBA":
        mode = "L"
    path = tmp_path / f"a picture %41.{kind.lower()}"
    path.write_bytes(encoded(picture((90, 70), mode), kind))
    expected, _ = original_patches(str(path), SMALL)
    url = "data:image/any;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), path.as_uri(), path.read_bytes(), url):
        loaded = load_image(source, modes="transformers")
        np.testing.assert_array_equal(image_patches(loaded, SMALL)[0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_and_mirrored_upright_as_in_transformers(tmp_path, orientation):
    path = tmp_path / "phone.png"
    stored = picture((120, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    rows = np.asarray(stored)
    # EXIF 2.32, 4.6.4: where the stored picture's row 0 and column 0 are shown
    across = rows.swapaxes(0, 1)
    shown = [
        rows,
        rows[:, ::-1],
        rows[::-1, ::-1],
        rows[::-1],
        across,
        across[:, ::-1],
        across[::-1, ::-1],
        across[::-1],
    ]
    np.testing.assert_array_equal(np.asarray(load_image(path)), shown[orientation - 1])
    np.testing.assert_array_equal(image_patches(load_image(path), SMALL)[0], original_patches(str(path), SMALL)[0])


def test_an_array_or_a_tensor_is_a_picture_too():
    pixels = np.asarray(picture((50, 40)))
    expected, _ = original_patches(pixels, SMALL)
    tensor = torch.from_numpy(pixels.copy())
    for source in (pixels, pixels.transpose(2, 0, 1), pixels[::-1][::-1], tensor, tensor.permute(2, 0, 1)):
        np.testing.assert_array_equal(image_patches(load_image(source), SMALL)[0], expected)
    with pytest.raises(RequestError, match=r"array torch\.float32"):
        load_image(tensor.float())
    with pytest.raises(RequestError, match="numpy cannot read it"):
        load_image(tensor.to("meta"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(tmp_path, kind):
    path = tmp_path / f"moving.{kind.lower()}"
    first, *rest = [picture((60, 50), seed=i) for i in range(3)]
    first.save(path, save_all=True, append_images=rest, duration=100)
    assert Image.open(path).n_frames == 3
    np.testing.assert_array_equal(image_patches(load_image(path), SMALL)[0], original_patches(str(path), SMALL)[0])


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG")])
def test_a_file_in_another_colour_space_has_the_bits_of_transformers(tmp_path, mode, kind):
    path = tmp_path / "picture"
    picture((60, 50)).convert(mode).save(path, kind)
    np.testing.assert_array_equal(image_patches(load_image(path), SMALL)[0], original_patches(str(path), SMALL)[0])


def test_a_16_bit_file_has_the_bits_of_transformers(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 700, (50, 60), dtype=np.uint16)).save(path)
    assert Image.open(path).mode.startswith("I;16")
    loaded = load_image(path, modes="transformers")
    np.testing.assert_array_equal(image_patches(loaded, SMALL)[0], original_patches(str(path), SMALL)[0])


def test_pixel_bounds_given_with_the_image_override_the_settings():
    _, (_, h, w) = image_patches(picture((400, 400)), PUBLISHED, SizeRequest(max_pixels=28 * 28 * 4))
    assert h * w == 16
    _, (_, h, w) = image_patches(picture((28, 28)), PUBLISHED, SizeRequest(min_pixels=28 * 28 * 100))
    assert h * w == 400
    # qwen-vl-utils: rounded to merge windows, whatever the picture's own shape
    _, grid = image_patches(picture((300, 50)), PUBLISHED, SizeRequest(resized_height=100, resized_width=200))
    assert grid == (1, 8, 14)


def test_a_messages_bounds_come_first_and_the_checkpoints_hold_for_what_they_give():
    def grid_of(least: int, most: int, **said: int) -> Iterator[tuple[int, int, int]]:
        settings = replace(PUBLISHED, min_pixels=least, max_pixels=most)
        for sampling in ("qwen", "transformers"):
            for kind, source in (("image", picture((1148, 840))), ("video", [picture((1148, 840))] * 2)):
                small = {"min_pixels": 3136, **said} if kind == "video" else said
                item = VisionItem(kind, source, "here", SizeRequest(**small))
                yield cut_item(item, settings, VisionOptions(video_sampling=sampling)).grid

    # asked for more than the checkpoint allows, and for less
    assert set(grid_of(3136, 200_704, max_pixels=2_000_000)) == {(1, 26, 36)}
    assert set(grid_of(100_352, 12_845_056, max_pixels=50_000)) == {(1, 20, 28)}
    assert set(grid_of(3136, 200_704, resized_height=840, resized_width=1148)) == {(1, 26, 36)}
    assert set(grid_of(3136, 12_845_056, max_pixels=50_000)) == {(1, 12, 18)}


def test_sizes_are_those_of_qwen_vl_utils_followed_by_the_processor():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = np.exp(rng.uniform(np.log(30), np.log(3000), 2)).astype(int).tolist()
        least, most = sorted((28 * 28 * np.exp(rng.uniform(1.4, 9, 2))).astype(int).tolist())
        said_least, said_most = sorted((28 * 28 * np.exp(rng.uniform(1.4, 9, 2))).astype(int).tolist())
        settings = replace(PUBLISHED, min_pixels=least, max_pixels=most)
        first = original.smart_resize(height, width, 28, said_least, said_most)
        expected = original.smart_resize(*first, 28, least, most)
        wanted = SizeRequest(min_pixels=said_least, max_pixels=said_most)
        assert image_size(height, width, wanted, settings) == expected


@pytest.mark.parametrize(
    ("said", "patches"),
    [
        ({}, 16),
        ({"min_pixels": 3136}, 16),
        ({"resized_height": 280, "resized_width": 280}, 16),
        ({"max_pixels": 28 * 28 * 9}, 36),
    ],
)
def test_bounds_of_the_whole_request_hold_wherever_a_message_gives_none(said, patches):
    options = VisionOptions(max_pixels=28 * 28 * 4)
    for kind, source in (("image", picture((400, 400))), ("video", [picture((400, 400))] * 2)):
        # a frame has at least 128 windows unless it is said otherwise
        small = said if kind == "image" else {"min_pixels": 3136, **said}
        _, h, w = cut_item(VisionItem(kind, source, "here", SizeRequest(**small)), PUBLISHED, options).grid
        assert h * w == patches


def test_bounds_beside_a_resized_size_are_checked_too():
    with pytest.raises(RequestError, match="max_pixels is 'x'"):
        image_patches(picture((40, 40)), PUBLISHED, SizeRequest(max_pixels="x", resized_height=28, resized_width=28))
    with pytest.raises(RequestError, match="max_pixels is 'x'"):
        VisionOptions(max_pixels="x")


@pytest.mark.parametrize(("height", "width"), [(280, None), (None, 280), (0, 28), (28.0, 28), (True, 28)])
def test_a_resized_size_is_two_positive_integers(height, width):
    with pytest.raises(RequestError, match="resized_height"):
        image_patches(picture((40, 40)), PUBLISHED, SizeRequest(resized_height=height, resized_width=width))


@pytest.mark.parametrize(
    ("least", "most"), [(0, None), (None, 0), (None, -5), (5000, 4000), ("1", None), (None, 10**12), (True, None)]
)
def test_senseless_pixel_bounds_are_refused(least, most):
    with pytest.raises(RequestError, match="_pixels"):
        image_patches(picture((40, 40)), PUBLISHED, SizeRequest(min_pixels=least, max_pixels=most))


@pytest.mark.parametrize("given", [{"ulr": "x"}, {"url": None}, {"url": "x", "size": 3}, {}], ids=str)
def test_an_image_url_that_is_misspelt_does_not_take_the_next_picture(given):
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": given}]}]
    with pytest.raises(RequestError, match=r"image_url has .*, expected url"):
        vision_items(messages, ["other.png"], [], {})


def test_smart_resize_gives_what_transformers_gives_and_refuses_what_it_refuses():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(20_000), (100_000, 2))).astype(int)
    sizes[::50, 0] = 0
    factors, least, most = [28, 14, 32], [1, 3136, 200_704], [3136, 1_003_520, 12_845_056]
    refused = 0
    for (height, width), i, j, k in zip(sizes.tolist(), *rng.integers(0, 3, (3, 100_000)).tolist(), strict=True):
        given = (height, width, factors[i], least[j], most[k])
        try:
            expected = original.smart_resize(*given)
        except (ValueError, ZeroDivisionError):
            refused += 1
            with pytest.raises(RequestError):
                smart_resize(*given)
        else:
            assert smart_resize(*given) == expected, given
    assert 1000 < refused < 50_000


def torch_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def test_resized_pixels_have_the_bits_of_torch():
    rng = np.random.default_rng(0)
    for i in range(300):
        height, width = np.exp(rng.uniform(0, np.log(900), 2)).astype(int).tolist()
        wanted = (28 * rng.integers(1, 12, 2)).tolist()
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if i % 3 == 0:
            # extremes overshoot, and are cut off between the two passes
            pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
        made = resize(pixels, *wanted)
        np.testing.assert_array_equal(made, torch_resize(pixels, *wanted), err_msg=f"{height} {width} {wanted}")
        np.testing.assert_array_equal(made, resize(Image.fromarray(pixels), *wanted))


def test_resized_pixels_are_within_two_levels_of_pillows():
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = rng.integers(1, 900, 2).tolist()
        wanted = (28 * rng.integers(1, 12, 2)).tolist()
        # Pillow has 22-bit weights and may take the rows first: cut-off extremes would differ by up to 31
        pixels = rng.integers(64, 192, (height, width, 3), dtype=np.uint8)
        pillow = np.asarray(Image.fromarray(pixels).resize(wanted[::-1], Image.Resampling.BICUBIC))
        assert np.abs(resize(pixels, *wanted).astype(int) - pillow).max() <= 2


def test_a_picture_larger_than_a_strip_is_resized_as_a_whole():
    pixels = np.random.default_rng(0).integers(0, 256, (3001, 1999, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(pixels, 1204, 812), torch_resize(pixels, 1204, 812))


def test_where_cykooz_resizer_has_no_wheel_torch_gives_the_same_bits(monkeypatch):
    pixels = np.asarray(picture((301, 199)))
    expected = resize(pixels, 196, 308)
    monkeypatch.setattr(resizing, "find_spec", lambda name: None if name == "cykooz_resizer" else name)
    resizing._engine.cache_clear()
    try:
        assert resizing._engine().__module__.endswith("backends.resize")
        np.testing.assert_array_equal(resize(pixels, 196, 308), expected)
        monkeypatch.setattr(resizing, "find_spec", lambda name: None)
        resizing._engine.cache_clear()
        with pytest.raises(MissingDependencyError, match=r"cykooz\.resizer"):
            resize(pixels, 196, 308)
    finally:
        resizing._engine.cache_clear()


def cut_off_jpeg(tmp_path):
    data = encoded(picture((200, 200)), "JPEG")
    (tmp_path / "x.jpg").write_bytes(data[: len(data) // 2])


def cut_off_png(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(picture((200, 200)))[:5000])


def text_file(tmp_path):
    (tmp_path / "x.jpg").write_text("not a picture")


def empty_file(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")


def folder(tmp_path):
    (tmp_path / "x.jpg").mkdir()


def postscript(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(picture((20, 20)), "EPS"))


def bomb(tmp_path):
    # a few kB that unpack to 400 million pixels
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.jpg", "PNG")


def nothing(tmp_path):
    pass


@pytest.mark.parametrize(
    "make",
    [cut_off_jpeg, cut_off_png, text_file, empty_file, folder, postscript, bomb, nothing],
    ids=lambda f: f.__name__,
)
def test_a_bad_file_is_refused_by_name(tmp_path, make):
    make(tmp_path)
    with pytest.raises(RequestError, match=r"x\.jpg: "):
        load_image(tmp_path / "x.jpg")


def test_a_bomb_is_refused_even_where_pillows_own_check_is_off(tmp_path, monkeypatch):
    bomb(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(RequestError, match="20000 x 20000"):
        load_image(tmp_path / "x.jpg")


def test_a_picture_below_our_limit_writes_no_warning_of_pillows(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    picture((20, 15)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path).size == (20, 15)


def test_an_error_names_a_long_source_in_short():
    with pytest.raises(RequestError) as caught:
        load_image("A" * 5_000_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "source",
    [
        "http://example.com/cat.jpg",
        "https://example.com/cat.jpg",
        "HTTPS://example.com/cat.jpg",
        "file://server/cat.jpg",
        "data:image/png;base64,???",
        "data:image/png;base64,é",
        "file://[x",
        "",
        "nul\0byte.jpg",
        b"",
        None,
        3,
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("RGB", (0, 5)),
    ],
    ids=lambda source: "an empty picture" if isinstance(source, Image.Image) else repr(source),
)
def test_what_is_no_local_picture_is_refused(source):
    with pytest.raises(RequestError):
        load_image(source)
