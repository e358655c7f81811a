"""load(): from an artifact's folder to a model that generates."""

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifacts.errors import ArtifactError, MissingDependencyError, TargetError
from ..artifacts.host.process import npu_problem, prepare_process
from ..artifacts.manifest import Manifest
from ..artifacts.store import Artifact, ge_part, onnx_part, open_artifact
from .backends.base import Backend
from .integrity import WeightCheck
from .memory import check_fits, soc_memory
from .model import Model
from .models import config_of
from .phases import PhaseTimes
from .text.prompt import Processor
from .text.template import Renderer

if TYPE_CHECKING:
    from .backends.reference import Observer

ONNXRUNTIME = "onnxruntime"
BACKENDS = ("reference", ONNXRUNTIME, "npu")
EngineMaker = Callable[[Artifact], Backend]
BackendChoice = str | EngineMaker | None


def load(
    path: str | Path,
    backend: BackendChoice = None,
    *,
    observer: "Observer | None" = None,
    trusted_keys: Sequence[str | Path] | None = None,
) -> Model:
    """Open an artifact and make it ready to generate; nothing is traced and nothing in it is changed.

    backend: "npu" runs the GE graphs on NPU 0, "reference" on CPU; "onnxruntime" runs the ONNX models on CPU. None
    takes the best that can run here; `model.reason` says which and why. A function makes an engine of its own from the
    open artifact, whose weights are hashed beside it: it need not do so.
    observer(graph, operator's name, its outputs), with the reference backend only, is handed every intermediate of
    every graph that runs: keep them by name to see where numbers depart.
    `model.load_ms` says where the time went: manifest (every file opened), imports (the engine's), weights (mapped),
    graphs (hashed, read, compiled by GE; onnxruntime opens models and weights at once), weight_check (waiting for the
    hashes), device (weights placed), processor.
    trusted_keys: PEM files of ed25519 public keys; an artifact that none of them signed is refused.
    Raises ArtifactError for a damaged or unfit artifact, TargetError when it cannot run on this machine and
    MissingDependencyError when an engine is not installed.
    """
    loading = PhaseTimes()
    prepare_process()
    artifact = open_artifact(path, trusted_keys)
    renderer = None
    try:
        choice, reason = _choose(artifact, "reference" if observer and backend is None else backend)
        if observer and backend is None:
            reason = "an observer was given, and no other backend hands out intermediates"
        if artifact.manifest.weights is None:
            raise ArtifactError(
                f"{path}: has no weights (compiled from a config alone); run `qwen2vl-tc convert --src <hf_dir> --out "
                f"{path}`"
            )
        part = artifact.manifest.onnx if choice == ONNXRUNTIME else None
        if (part or artifact.manifest).verification == "failed":
            report = "verify-onnx" if part else "verify"
            raise ArtifactError(
                f"{path}: its verification failed, see reports/{report}.json; build it again, or verify it again"
            )
        loading.mark("manifest")
        # before the engine's imports, which take a second or more: gigabytes are read and hashed meanwhile
        check = WeightCheck(artifact, [graph.data for graph in part.graphs] if part else None)
        # and jinja2's imports, in a process of their own
        renderer = Renderer()
        with _no_collections():
            engine = _engine(choice, artifact, observer, check, is_asked_for=backend is not None)
        loading.include("imports", engine.loading)
        processor = open_processor(artifact, renderer)
        loading.mark("processor")
    except BaseException:
        if renderer is not None:
            renderer.close()
        artifact.close()
        raise
    return Model(artifact, processor, engine, reason, check, loading.phases)


def open_processor(artifact: Artifact, renderer: Renderer | None = None) -> Processor:
    """Tokenizer, chat template and picture settings of an artifact; renderer: the template's, if it was started."""
    prefix = "processor/"
    if strange := [e.path for e in artifact.manifest.processor if e.path.rpartition("/")[0] + "/" != prefix]:
        raise ArtifactError(f"{artifact.path}: processor file {strange[0]} is not in {prefix}; convert again")
    files = {entry.path.removeprefix(prefix): artifact.read(entry) for entry in artifact.manifest.processor}
    return Processor(files, config_of(artifact.manifest), renderer)


@contextmanager
def _no_collections() -> Iterator[None]:
    """While an engine is made: importing torch makes some 240,000 objects and no garbage, and walking them again and
    again costs 0.2 of 1.3 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _choose(artifact: Artifact, wanted: BackendChoice) -> tuple[str | EngineMaker, str]:
    if wanted is None:
        return _best_for(artifact.manifest)
    if isinstance(wanted, str):
        if wanted not in BACKENDS:
            raise TargetError(f"backend {wanted!r}: expected one of {', '.join(BACKENDS)}")
        if wanted == ONNXRUNTIME:
            onnx_part(artifact.manifest, artifact.path)
        if wanted == "npu":
            check_npu(artifact)
    return wanted, "asked for"


def check_npu(artifact: Artifact) -> None:
    """Raises TargetError where no NPU can be used, or none of the artifact's SoC could hold it."""
    part = ge_part(artifact.manifest, artifact.path)
    if problem := npu_problem():
        # said even here, where nothing can run: it is a property of the artifact and its target
        if (memory := soc_memory(part.soc)) is not None:
            check_fits(artifact.manifest, part, memory)
        raise TargetError(f"backend npu: {problem}; use --backend reference, or run on an NPU host")


def best_here() -> tuple[str, str]:
    """The backend that is taken for GE graphs where none is asked for, and why."""
    if problem := npu_problem():
        return "reference", f"{problem}; the GE graphs run on CPU"
    if importlib.util.find_spec("torch_npu") is None:
        return "reference", "an NPU is here, but torch-npu is not installed; the GE graphs run on CPU"
    return "npu", "an NPU is here"


def _best_for(manifest: Manifest) -> tuple[str, str]:
    if manifest.onnx is not None:
        if manifest.ge is None:
            return ONNXRUNTIME, "the artifact has ONNX models only"
        if (problem := npu_problem()) and importlib.util.find_spec("onnxruntime") is not None:
            return ONNXRUNTIME, f"{problem}; the ONNX models run on CPU"
    return best_here()


def _missing_engine(name: str, manifest: Manifest, is_asked_for: bool) -> MissingDependencyError:
    """What to install where torch is missing: the engine that was asked for, or the best that this machine can have."""
    if is_asked_for:
        return MissingDependencyError(f"backend {name} needs torch; pip install 'qwen2vl-tc[{name}]'")
    if npu_problem() is None:
        return MissingDependencyError("no engine is installed, and an NPU is here; pip install 'qwen2vl-tc[npu]'")
    if manifest.onnx is not None and sys.version_info >= (3, 11):
        return MissingDependencyError(
            "no engine is installed; pip install 'qwen2vl-tc[onnx]', the faster one on CPU for this artifact's ONNX "
            "models, or 'qwen2vl-tc[reference]'"
        )
    return MissingDependencyError("no engine is installed; pip install 'qwen2vl-tc[reference]', which runs on CPU")


def _engine(
    name: str | EngineMaker,
    artifact: Artifact,
    observer: "Observer | None",
    check: WeightCheck,
    is_asked_for: bool,
) -> Backend:
    if observer is not None and name != "reference":
        raise TargetError("an observer needs --backend reference: other engines hand out no intermediates")
    if not isinstance(name, str):
        return name(artifact)
    if name == ONNXRUNTIME:
        from .backends.onnxruntime import OnnxBackend

        return OnnxBackend(artifact)
    if importlib.util.find_spec("torch") is None:
        raise _missing_engine(name, artifact.manifest, is_asked_for)
    if name == "npu":
        from .backends.npu import NpuBackend

        # by now the hashes are mostly done: they run beside the imports, which take seconds
        return NpuBackend(artifact, check_weights=False, before_placing=check.wait)
    from .backends.reference import ReferenceBackend

    return ReferenceBackend(artifact, check_weights=False, observer=observer)
