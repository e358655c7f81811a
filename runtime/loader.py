"""load(): from an artifact's folder to a model that generates."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifacts.errors import ArtifactError, MissingDependencyError, TargetError
from ..artifacts.process import cann_problem, npu_count, npu_usable, prepare_process
from ..artifacts.store import Artifact, ge_part, open_artifact
from .backends.base import Backend
from .integrity import WeightCheck
from .memory import check_fits, soc_memory
from .model import Model
from .prompt import Processor

if TYPE_CHECKING:
    from .backends.reference import Observer

BACKENDS = ("reference", "onnxruntime", "npu")


def load(path: str | Path, backend: str | None = None, *, observer: "Observer | None" = None) -> Model:
    """Open an artifact and make it ready to generate; nothing is traced and nothing in it is changed.

    backend: "npu" runs the GE graphs on NPU 0, "reference" on CPU; "onnxruntime" is not built yet and says so. None
    takes the best that can run here; `model.reason` says which and why.
    observer(graph, operator's name, its outputs), with the reference backend only, is handed every intermediate of
    every graph that runs: keep them by name to see where numbers depart.
    Raises ArtifactError for a damaged or unfit artifact, TargetError when it cannot run on this machine and
    MissingDependencyError when an engine is not installed.
    """
    prepare_process()
    artifact = open_artifact(path)
    try:
        name, reason = _choose(artifact, backend)
        if artifact.manifest.weights is None:
            raise ArtifactError(
                f"{path}: has no weights (compiled from a config alone); run `qwen2vl-tc convert --src <hf_dir> --out "
                f"{path}`"
            )
        if artifact.manifest.verification == "failed":
            raise ArtifactError(
                f"{path}: its verification failed, see reports/verify.json; build it again, or verify it again"
            )
        check = WeightCheck(artifact)
        engine = _engine(name, artifact, observer)
        processor = open_processor(artifact)
    except BaseException:
        artifact.close()
        raise
    return Model(artifact, processor, engine, reason, check)


def open_processor(artifact: Artifact) -> Processor:
    """Tokenizer, chat template and picture settings of an artifact."""
    prefix = "processor/"
    if strange := [e.path for e in artifact.manifest.processor if e.path.rpartition("/")[0] + "/" != prefix]:
        raise ArtifactError(f"{artifact.path}: processor file {strange[0]} is not in {prefix}; convert again")
    files = {entry.path.removeprefix(prefix): artifact.read(entry) for entry in artifact.manifest.processor}
    return Processor(files, artifact.manifest.model)


def _choose(artifact: Artifact, wanted: str | None) -> tuple[str, str]:
    if wanted is not None and wanted not in BACKENDS:
        raise TargetError(f"backend {wanted!r}: expected one of {', '.join(BACKENDS)}")
    if wanted == "onnxruntime":
        raise TargetError("backend onnxruntime is not built yet in this version; use --backend reference")
    if wanted == "npu":
        part = ge_part(artifact.manifest, artifact.path)
        memory = soc_memory(part.soc)
        if not npu_usable():
            # said even here, where nothing can run: it is a property of the artifact and its target
            if memory is not None:
                check_fits(artifact.manifest, part, memory)
            raise TargetError(f"backend npu: {_no_npu()}; use --backend reference, or run on an NPU host")
    if wanted is not None:
        return wanted, "asked for"
    if npu_usable():
        if importlib.util.find_spec("torch_npu") is None:
            return "reference", "an NPU is here, but torch-npu is not installed; the GE graphs run on CPU"
        return "npu", "an NPU is here"
    return "reference", f"{_no_npu()}; the GE graphs run on CPU"


def _no_npu() -> str:
    if not npu_count():
        return "no NPU is here"
    return f"an NPU is here, but CANN does not load ({cann_problem()})"


def _engine(name: str, artifact: Artifact, observer: "Observer | None") -> Backend:
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError(f"backend {name} needs torch; pip install 'qwen2vl-tc[{name}]'")
    if name == "npu":
        if observer is not None:
            raise TargetError("an observer needs --backend reference: the NPU hands out no intermediates")
        from .backends.npu import NpuBackend

        return NpuBackend(artifact, check_weights=False)
    from .backends.reference import ReferenceBackend

    return ReferenceBackend(artifact, check_weights=False, observer=observer)
