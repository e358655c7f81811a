"""load(): from an artifact's folder to a model that generates."""

import importlib.util
from pathlib import Path

from ..artifacts.errors import ArtifactError, MissingDependencyError, TargetError
from ..artifacts.process import npu_usable, prepare_process
from ..artifacts.store import Artifact, open_artifact
from .backends.base import Backend
from .integrity import WeightCheck
from .memory import check_fits, soc_memory
from .model import Model
from .prompt import Processor

BACKENDS = ("reference", "onnxruntime", "npu")


def load(path: str | Path, backend: str | None = None) -> Model:
    """Open an artifact and make it ready to generate; nothing is traced and nothing in it is changed.

    backend: "reference" runs the GE graphs on CPU; "onnxruntime" and "npu" are not built yet and say so. None takes the
    best that can run here; `model.reason` says which and why.
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
        check = WeightCheck(artifact)
        engine = _engine(name, artifact)
        processor = open_processor(artifact)
    except BaseException:
        artifact.close()
        raise
    return Model(artifact, processor, engine, reason, check)


def open_processor(artifact: Artifact) -> Processor:
    """Tokenizer, chat template and picture settings of an artifact."""
    files = {Path(entry.path).name: artifact.read(entry) for entry in artifact.manifest.processor}
    return Processor(files, artifact.manifest.model)


def _choose(artifact: Artifact, wanted: str | None) -> tuple[str, str]:
    if wanted is not None and wanted not in BACKENDS:
        raise TargetError(f"backend {wanted!r}: expected one of {', '.join(BACKENDS)}")
    part = artifact.manifest.ge
    if wanted == "npu":
        memory = soc_memory(part.soc) if part else None
        if part and memory is not None:
            check_fits(artifact.manifest, part, memory)
        raise TargetError("backend npu is not built yet in this version; use --backend reference")
    if wanted == "onnxruntime":
        raise TargetError("backend onnxruntime is not built yet in this version; use --backend reference")
    if wanted == "reference":
        return "reference", "asked for"
    if npu_usable():
        return "reference", "an NPU is here, but the npu backend is not built yet in this version"
    return "reference", "no NPU is here; the GE graphs run on CPU"


def _engine(name: str, artifact: Artifact) -> Backend:
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError(f"backend {name} needs torch; pip install 'qwen2vl-tc[{name}]'")
    from .backends.reference import ReferenceBackend

    return ReferenceBackend(artifact, check_weights=False)
