"""Records what qwen-vl-utils and transformers do with videos, for tests/runtime/video_sampling.json.

Both import torchvision, which PyPI has for other builds of torch only; the functions recorded here do not call it, but
for the resize, whose target size is what is recorded. Run: pip install --no-deps qwen-vl-utils==0.0.14 requests, then
python tests/helpers/record_sampling.py > tests/runtime/video_sampling.json
"""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import numpy as np
import torch

CASES = 120


class Anything(ModuleType):
    __version__ = "0.99"
    __path__: list[str] = []  # noqa: RUF012

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        return MagicMock()


def result(call: Any) -> Any:
    try:
        found = call()
    except (AssertionError, ValueError, ZeroDivisionError, RuntimeError):
        return None
    return found.tolist() if isinstance(found, torch.Tensor) else found


def main() -> None:
    names = ["torchvision", "torchvision.io", "torchvision.transforms", "requests"]
    names += ["torchvision.transforms.v2", "torchvision.transforms.v2.functional"]
    sys.modules.update({name: Anything(name) for name in names if name not in sys.modules})
    from qwen_vl_utils import vision_process as qwen
    from transformers.utils import import_utils

    import_utils.is_torchvision_available = import_utils.is_torchvision_v2_available = lambda: True
    import_utils.BACKENDS_MAPPING["torchvision"] = (lambda: True, "")
    from transformers.models.qwen2_vl import video_processing_qwen2_vl as hf

    rng = np.random.default_rng(0)
    cases = []
    for i in range(CASES):
        total = int(np.exp(rng.uniform(np.log(2), np.log(20_000))))
        video_fps = float(rng.choice([24.0, 30.0, 25.0, 30000 / 1001, 60.0, 12.5, 1.0]))
        given: dict[str, Any] = {}
        kind = i % 4
        if kind == 1:
            given["nframes"] = int(rng.integers(1, 40))
        elif kind == 2:
            given["fps"] = float(rng.choice([0.5, 1.0, 2.0, 4.0, 30.0]))
            if rng.random() < 0.5:
                given |= {"min_frames": int(rng.integers(1, 20)), "max_frames": int(rng.integers(20, 300))}
        elif kind == 3:
            start = float(rng.uniform(-1, total / video_fps))
            given |= {"video_start": start, "video_end": start + float(rng.uniform(0, 60))}

        def by_qwen(given: Any = given, total: int = total, video_fps: float = video_fps) -> Any:
            first, last, left = qwen.calculate_video_frame_range(given, total, video_fps)
            count = qwen.smart_nframes(given, total_frames=left, video_fps=video_fps)
            return torch.linspace(first, last, count).round().long()

        def by_hf(given: Any = given, total: int = total, video_fps: float = video_fps) -> Any:
            processor = SimpleNamespace(num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)
            metadata = SimpleNamespace(total_num_frames=total, fps=video_fps)
            wanted = {name.replace("nframes", "num_frames"): value for name, value in given.items()}
            return hf.Qwen2VLVideoProcessor.sample_frames(processor, metadata, **wanted)

        case = {"given": given, "total": total, "video_fps": video_fps, "qwen": result(by_qwen)}
        # without fps and nframes it takes every frame, and it knows no time range
        if kind in (1, 2):
            case["transformers"] = result(by_hf)
        cases.append(case)

    sizes = []
    for _ in range(CASES):
        frames, height, width = 2 * int(rng.integers(1, 385)), *rng.integers(30, 2200, 2).tolist()
        given = {}
        for name, low, high in (("min_pixels", 3136, 300_000), ("max_pixels", 50_000, 2_000_000)):
            if rng.random() < 0.4:
                given[name] = int(rng.integers(low, high))
        if rng.random() < 0.3:
            given["total_pixels"] = int(rng.integers(1_000_000, 100_000_000))
        if rng.random() < 0.2:
            given |= {"resized_height": int(rng.integers(28, 900)), "resized_width": int(rng.integers(28, 900))}
        seen: list[list[int]] = []
        qwen.transforms = MagicMock()
        qwen.transforms.functional.resize = lambda video, size, seen=seen, **_: seen.append(size) or video  # type: ignore[misc,func-returns-value]
        clip = torch.empty(1).expand(frames, 3, height, width)
        reader = lambda ele, clip=clip: (clip, {}, 2.0)  # type: ignore[misc]  # noqa: E731
        qwen.get_video_reader_backend = lambda: "any"
        qwen.VIDEO_READER_BACKENDS = {"any": reader, "torchvision": reader}
        # float() of the frames would copy them
        torch.Tensor.float = lambda self: self  # type: ignore[method-assign,assignment]
        result(lambda given=given: str(qwen.fetch_video({"video": "x", **given}).shape))  # type: ignore[misc]
        sizes.append({"given": given, "shape": [frames, height, width], "size": list(seen[0]) if seen else None})
    json.dump({"sampling": cases, "sizes": sizes}, sys.stdout, separators=(",", ":"))


if __name__ == "__main__":
    main()
