"""Pictures become the patches, and positions, that transformers makes of them."""

import base64
import contextlib
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import vision_utils
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as original

from qwen2vl_tc.artifacts.errors import ArtifactError, RequestError
from qwen2vl_tc.runtime.vision import (
    ImageSettings,
    image_patches,
    image_settings_from_hf,
    load_image,
    segment_ends,
    smart_resize,
    video_patches,
    vision_positions,
)

PUBLISHED = ImageSettings(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2)
SMALL = ImageSettings(min_pixels=3136, max_pixels=100_000, patch_size=14, temporal_patch_size=2, merge_size=2)
SIZES = [(1, 1), (5, 7), (27, 29), (28, 28), (56, 84), (301, 199), (1280, 720), (30, 5900), (3000, 16)]


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode) if mode != "RGBA" else Image.fromarray(noise)


def original_patches(source: object, wanted: ImageSettings) -> tuple[np.ndarray, tuple[int, ...]]:
    processor = original.Qwen2VLImageProcessorPil(
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
    np.testing.assert_array_equal(image_patches(image, SMALL)[0], original_patches(image, SMALL)[0])


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
        np.testing.assert_array_equal(image_patches(load_image(source), SMALL)[0], expected)


def test_a_photo_taken_sideways_is_turned_upright_as_in_transformers(tmp_path):
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    picture((120, 60)).save(path, exif=exif)
    assert load_image(path).size == (60, 120)
    np.testing.assert_array_equal(image_patches(load_image(path), SMALL)[0], original_patches(str(path), SMALL)[0])


def test_an_array_is_a_picture_too():
    pixels = np.asarray(picture((50, 40)))
    np.testing.assert_array_equal(image_patches(load_image(pixels), SMALL)[0], original_patches(pixels, SMALL)[0])


def test_pixel_bounds_given_with_the_image_override_the_settings():
    _, (_, h, w) = image_patches(picture((400, 400)), PUBLISHED, max_pixels=28 * 28 * 4)
    assert h * w == 16
    _, (_, h, w) = image_patches(picture((28, 28)), PUBLISHED, min_pixels=28 * 28 * 100)
    assert h * w == 400


@pytest.mark.parametrize(
    ("least", "most"), [(0, None), (None, 0), (None, -5), (5000, 4000), ("1", None), (None, 10**12), (True, None)]
)
def test_senseless_pixel_bounds_are_refused(least, most):
    with pytest.raises(RequestError, match="_pixels"):
        image_patches(picture((40, 40)), PUBLISHED, min_pixels=least, max_pixels=most)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    st.integers(0, 40) | st.integers(1, 6000),
    st.integers(1, 40) | st.integers(1, 6000),
    st.sampled_from([28, 14, 32]),
    st.sampled_from([1, 3136, 200_704]),
    st.sampled_from([3136, 1_003_520, 12_845_056]),
)
def test_smart_resize_gives_what_transformers_gives_and_refuses_what_it_refuses(height, width, factor, least, most):
    try:
        expected = original.smart_resize(height, width, factor, least, most)
    except (ValueError, ZeroDivisionError):
        with pytest.raises(RequestError):
            smart_resize(height, width, factor, least, most)
    else:
        assert smart_resize(height, width, factor, least, most) == expected


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


@pytest.mark.parametrize(
    "source",
    [
        "http://example.com/cat.jpg",
        "https://example.com/cat.jpg",
        "HTTPS://example.com/cat.jpg",
        "file://server/cat.jpg",
        "data:image/png;base64,???",
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
    ids=repr,
)
def test_what_is_no_local_picture_is_refused(source):
    with pytest.raises(RequestError):
        load_image(source)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on the damage
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_picture_is_read_or_refused_but_never_crashes(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
    raw = bytearray(encoded(picture((24, 20)), kind))
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=8)):
        raw[position] ^= data.draw(st.integers(1, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)))]
    with contextlib.suppress(RequestError):
        assert load_image(bytes(raw)).mode == "RGB"


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_frame_of_a_clip_lies_in_its_patches_as_transformers_lays_out_a_picture(count):
    frames = [picture((70, 50), seed=i) for i in range(count)]
    patches, (t, h, w) = video_patches(frames, SMALL)
    assert t == (count + 1) // 2
    pixels = patches.reshape(t, h * w, 3, 2, 14 * 14)
    for i in range(2 * t):
        # an odd clip ends with its last frame twice
        expected, grid = original_patches(frames[min(i, count - 1)], SMALL)
        assert grid == (1, h, w)
        np.testing.assert_array_equal(pixels[i // 2, :, :, i % 2], expected.reshape(h * w, 3, 2, 14 * 14)[:, :, 0])


def test_a_clip_needs_frames_of_one_size():
    with pytest.raises(RequestError, match="frame 1"):
        video_patches([picture((50, 50)), picture((50, 51))], SMALL)
    with pytest.raises(RequestError, match="no frames"):
        video_patches([], SMALL)


GRIDS = [
    [(1, 2, 2)],
    [(1, 36, 52)],
    [(3, 4, 6)],
    [(1, 4, 8), (2, 6, 4), (1, 2, 2), (5, 2, 4)],
]


@pytest.mark.parametrize("grids", GRIDS)
def test_vision_positions_and_segments_are_those_of_transformers(grids):
    tensor = torch.tensor(grids)
    expected = vision_utils.get_vision_position_ids(tensor, 2).T.numpy()
    positions = vision_positions(grids, 2)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected)
    assert [0, *segment_ends(grids)] == vision_utils.get_vision_cu_seqlens(tensor).tolist()


def test_no_pictures_have_no_positions():
    assert vision_positions([], 2).shape == (2, 0)
    assert segment_ends([]) == []


@pytest.mark.parametrize("grid", [(1, 3, 2), (0, 2, 2), (1, 2, -2)])
def test_a_grid_that_merge_windows_do_not_tile_is_refused(grid):
    with pytest.raises(RequestError, match="multiples of 2"):
        vision_positions([grid], 2)


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}, "min_pixels": 3136, "max_pixels": 12845056},
        {"patch_size": 16, "merge_size": 1, "temporal_patch_size": 4, "resample": 3},
    ],
)
def test_settings_are_read_as_transformers_reads_them(plain):
    theirs = original.Qwen2VLImageProcessorPil(**json.loads(json.dumps(plain)))
    ours = image_settings_from_hf(json.dumps(plain).encode())
    assert (ours.min_pixels, ours.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    assert (ours.patch_size, ours.temporal_patch_size) == (theirs.patch_size, theirs.temporal_patch_size)
    assert ours.merge_size == theirs.merge_size


@pytest.mark.parametrize(
    "plain",
    [
        {"resample": 2},
        {"do_resize": False},
        {"do_convert_rgb": False},
        {"patch_size": 0},
        {"patch_size": "14"},
        {"min_pixels": True},
        {"min_pixels": 10, "max_pixels": 9},
        {"size": {"height": 224, "width": 224}},
        {"size": 224},
        [],
    ],
)
def test_settings_that_cannot_be_served_are_refused(plain):
    with pytest.raises(ArtifactError, match=r"preprocessor_config\.json"):
        image_settings_from_hf(json.dumps(plain).encode())
