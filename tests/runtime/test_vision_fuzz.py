"""Damaged files are read or refused by name: never a crash, a foreign error or memory without bound."""

import io
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.clips import write_clip
from PIL import Image

from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.runtime.pictures.frames import FrameRequest
from qwen2vl_tc.runtime.pictures.images import load_image
from qwen2vl_tc.runtime.pictures.patches import image_patches
from qwen2vl_tc.runtime.pictures.request import VisionOptions
from qwen2vl_tc.runtime.pictures.resize import SizeRequest
from qwen2vl_tc.runtime.pictures.video import cut_video
from qwen2vl_tc.runtime.pictures.vision import ImageSettings

SETTINGS = ImageSettings(min_pixels=3136, max_pixels=50_000, patch_size=14, temporal_patch_size=2, merge_size=2)
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "ICO", "AVIF")
VIDEOS = {
    "a.mp4": {},
    "b.mkv": {"g": "6"},
    "c.ts": {"g": "6"},
    "d.avi": {"codec": "mpeg4"},
    "e.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"},
}
SIZE = SizeRequest(min_pixels=3136, max_pixels=10_000)
# what one damaged file may add to the process, above what decoding needs
HEADROOM_BYTES = 1 << 30


def mutations(raw: bytes, rng: np.random.Generator) -> bytes:
    """Flipped, overwritten, cut, doubled or swapped bytes; half of the time near the start, where headers are."""
    data = bytearray(raw)
    for _ in range(int(rng.integers(1, 6))):
        reach = min(len(data), 96) if rng.random() < 0.5 else len(data)
        at, size = int(rng.integers(0, reach)), int(rng.integers(1, 9))
        kind = rng.integers(0, 5)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at : at + size] = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        elif kind == 2:
            data[at : at + size] = bytes([int(rng.choice([0, 0x7F, 0x80, 0xFF]))]) * size
        elif kind == 3:
            del data[at : at + size]
        elif len(data) > 2:
            del data[int(rng.integers(1, len(data))) :]
    return bytes(data)


def corpus(sources: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield mutations(sources[i % len(sources)], rng)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    found = []
    for kind in PICTURES:
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        found.append(buffer.getvalue())
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    return [write_clip(folder / name, 12, 64, 48, **options).read_bytes() for name, options in VIDEOS.items()]


def outcome(data: bytes, is_video: bool) -> bool:
    """Whether it was read; anything but patches or RequestError fails the test."""
    try:
        if is_video:
            patches = cut_video(data, FrameRequest(), SIZE, SETTINGS, VisionOptions()).patches
        else:
            patches, _ = image_patches(load_image(data), SETTINGS)
    except RequestError as error:
        assert str(error)
        return False
    assert patches.dtype == np.uint8 and patches.shape[1] == SETTINGS.patch_dim
    return True


@pytest.fixture(autouse=True)
def quiet_decoders() -> Iterator[None]:
    """libtiff and FFmpeg complain to the terminal themselves."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    yield
    os.dup2(kept, 2)
    os.close(kept)
    os.close(null)


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on the damage
@pytest.mark.parametrize(("kind", "count"), [("pictures", 4000), ("videos", 1000)])
def test_five_thousand_damaged_files_are_read_or_refused(request: pytest.FixtureRequest, kind: str, count: int) -> None:
    sources: list[bytes] = request.getfixturevalue(kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    read = [outcome(data, kind == "videos") for data in corpus(sources, count, seed=0)]
    # both ways out are taken, and neither rarely
    assert 0.1 < np.mean(read) < 0.9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < HEADROOM_BYTES
    assert outcome(sources[0], kind == "videos"), "the next request works"
