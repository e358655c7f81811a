"""`warm`: fill GE's compile cache on the NPU host ahead of the first request, and prove the device's answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifacts.errors import TargetError
from ...artifacts.host.process import driver_version, npu_problem
from ...artifacts.store import ge_part

if TYPE_CHECKING:
    from ..progress import StepProgress
    from ..selftest.check import SelftestReport

# pixels: the smallest picture at the published min_pixels, 2 x 2 merged patches
_SIDE = 56


@dataclass(frozen=True)
class Warmed:
    """What GE left in its cache for one artifact. `driver` is None where the driver's version is not recorded.

    selftest: what the artifact's self-test found; None where it has none.
    """

    cache: Path
    files: int
    bytes: int
    graphs: tuple[str, ...]
    driver: str | None
    seconds: float
    selftest: "SelftestReport | None"


def warm_artifact(path: Path, progress: "StepProgress", trusted_keys: Sequence[str | Path] | None = None) -> Warmed:
    """Load the artifact on the NPU, which compiles every graph, and run each: by the self-test, or by a tiny request.

    Raises TargetError where there is no usable NPU, and whatever loading and a request raise.
    """
    if problem := npu_problem():
        raise TargetError(f"warm needs a usable NPU, and {problem}; run it on the NPU host")
    from ...runtime import load

    begin = time.perf_counter()
    progress("compile", 0, 1)
    model = load(path, backend="npu", trusted_keys=trusted_keys)
    part, report = ge_part(model.manifest, path), None
    try:
        if model.manifest.selftest is not None:
            from ..selftest.check import check_model

            progress("self-test", 1, len(part.batches) + 1)
            report = check_model(model)
        for done, rows in enumerate(part.batches if report is None else (), 1):
            progress(f"request of {rows} row(s)", done, len(part.batches) + 1)
            # one token comes from prefill, the second from the decode graph of so many rows
            model.generate_batch(_requests(rows), max_new_tokens=2, ignore_eos=True)
    finally:
        model.close()
    engine: Any = model.backend
    files = [file for file in engine.cache_folder.rglob("*") if file.is_file()]
    progress("done", len(part.batches) + 1, len(part.batches) + 1)
    return Warmed(
        cache=engine.cache_folder,
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        graphs=tuple(graph.name for graph in part.graphs),
        driver=driver_version(),
        seconds=time.perf_counter() - begin,
        selftest=report,
    )


def _requests(rows: int) -> list[Any]:
    """A tiny picture in the first row, which takes all through the visual graph, and a word in the others."""
    from PIL import Image

    picture = {"type": "image", "image": Image.new("RGB", (_SIDE, _SIDE))}
    return [[{"role": "user", "content": [picture]}], *([[{"role": "user", "content": "Hi"}]] * (rows - 1))]
