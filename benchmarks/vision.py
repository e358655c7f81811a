"""Pictures and video to patches against transformers' PIL processor and torchvision's way with a video, in one run.

    python benchmarks/vision.py [--threads N]

Needs .[reference,compile,video]. The clip is made here: 2048 x 1024, 24 fps, 5 s, H.264 with x264's defaults, a smooth
picture that pans. Baseline: every frame decoded to RGB, stacked, picked from (torchvision.io.read_video), then
transformers' PIL processor on each frame; decoding uses as many threads as ours.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from qwen2vl_tc.runtime.pictures.frames import FrameRequest, sample_frames
from qwen2vl_tc.runtime.pictures.patches import clip_patches, image_patches
from qwen2vl_tc.runtime.pictures.request import VisionOptions
from qwen2vl_tc.runtime.pictures.resize import SizeRequest, frame_size, resize
from qwen2vl_tc.runtime.pictures.video import cut_video
from qwen2vl_tc.runtime.pictures.video_av import AvReader
from qwen2vl_tc.runtime.pictures.vision import ImageSettings
from qwen2vl_tc.toolchain.verify.transformers_import import import_transformers

# preprocessor_config.json of Qwen2-VL-7B-Instruct
PUBLISHED = ImageSettings(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2)
FPS, SECONDS, WIDTH, HEIGHT = 24, 5, 2048, 1024
ROUNDS = 3


def timed(*calls: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Median milliseconds of each call; they take turns, so that a busy moment meets all of them."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in taken]


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth areas, edges and a little noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 90, width // 90, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return (smooth + rng.integers(-3, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def write_clip(path: Path) -> None:
    """A pan over a large picture, 4 pixels to the right and 1 down a frame."""
    frames = FPS * SECONDS
    scene = photograph(HEIGHT + frames, WIDTH + 4 * frames)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(frames):
            view = np.ascontiguousarray(scene[i : i + HEIGHT, 4 * i : 4 * i + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())


def describe(path: Path) -> str:
    with av.open(str(path)) as container:
        kinds = [frame.pict_type for frame in container.decode(video=0)]
    names = [getattr(kind, "name", {1: "I", 2: "P", 3: "B"}.get(int(kind), "?")) for kind in kinds]
    keys = [i for i, name in enumerate(names) if name == "I"]
    gop = max(b - a for a, b in zip(keys, [*keys[1:], len(names)], strict=True))
    return f"{len(names)} frames, longest GOP {gop}, {names.count('P')} P-frames, {names.count('B')} B-frames"


def decoded(path: Path, threads: int) -> Any:
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        yield from container.decode(stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=0, help="of FFmpeg, for both sides; 0: its own choice")
    threads = parser.parse_args().threads
    import_transformers()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=PUBLISHED.min_pixels, max_pixels=PUBLISHED.max_pixels)
    picture = Image.fromarray(photograph(1080, 1920))
    theirs, ours, pillow, resized = timed(
        lambda: processor(picture, return_tensors="np"),
        lambda: image_patches(picture, PUBLISHED),
        lambda: picture.resize((1932, 1092), Image.Resampling.BICUBIC),
        lambda: resize(picture, 1092, 1932),
        rounds=15,
    )
    print("picture 1920 x 1080 to patches, decoded already, published preprocessor_config")
    print(f"  transformers' PIL processor {theirs:7.1f} ms, of it Pillow's resize {pillow:.1f}")
    print(f"  ours                        {ours:7.1f} ms, of it the resize {resized:.1f}")
    print(f"  {theirs / ours:.1f} times\n")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path)
        opened = AvReader(str(path), threads)
        chosen, _ = sample_frames(FrameRequest(), "qwen", opened.frames, opened.fps, 2)
        opened.close()
        rows, columns = frame_size(HEIGHT, WIDTH, len(chosen), SizeRequest(), PUBLISHED)

        per_frame = Qwen2VLImageProcessorPil(min_pixels=PUBLISHED.min_pixels, max_pixels=rows * columns)

        def open_reader(source: Any) -> AvReader:
            return AvReader(source, threads)

        def read_video() -> np.ndarray:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded(path, threads)])[chosen]

        def read_ours() -> list[np.ndarray]:
            reader = open_reader(str(path))
            frames = list(reader.read(chosen))
            reader.close()
            return frames

        def floor() -> None:
            for _ in decoded(path, threads):
                pass

        def their_patches() -> None:
            for frame in read_video():
                per_frame(Image.fromarray(frame), return_tensors="np")

        def our_patches() -> None:
            cut_video(str(path), FrameRequest(), SizeRequest(), PUBLISHED, VisionOptions(open_video=open_reader))

        frames = read_ours()
        if not all(np.array_equal(a, b) for a, b in zip(read_video(), frames, strict=True)):
            raise SystemExit("the frames differ from those of a full decode")
        base, ours, decode, base_all, ours_all = timed(read_video, read_ours, floor, their_patches, our_patches)
        (cut,) = timed(lambda: clip_patches(frames, len(frames), lambda *_: (rows, columns), PUBLISHED))
        (one,) = timed(lambda: resize(frames[0], rows, columns))
        print(f"clip {WIDTH} x {HEIGHT}, {FPS} fps, {SECONDS} s, H.264: {describe(path)}; FFmpeg threads: ", end="")
        print(f"{threads or 'its choice'}; {len(chosen)} frames sampled")
        print(f"  every frame to RGB, stacked, picked {base:8.1f} ms")
        print(f"  ours, the same bits                 {ours:8.1f} ms  {base / ours:.1f} times")
        print(f"  decoding every frame, no RGB        {decode:8.1f} ms")
        print(f"  to patches, as above + PIL processor {base_all:7.1f} ms")
        print(f"  to patches, ours                    {ours_all:8.1f} ms  {base_all / ours_all:.1f} times\n")
        print("phase, ms                 the recipe's original   with its hardware decoder   baseline here   ours here")
        print(f"video to frames           {1725:21}   {256:25}   {base:13.0f}   {ours:9.0f}")
        print(f"frames to patches         {70:21}   {20:25}   {base_all - base:13.0f}   {cut:9.0f}")
        print(f"  of it resizing a frame  {'':21}   {10.8:25}   {'':13}   {one:9.1f}")
        print("The recipe's columns: on its own host (910B2); the other two: on this machine.")


if __name__ == "__main__":
    main()
