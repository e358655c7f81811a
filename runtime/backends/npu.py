"""The NPU backend: the artifact's GE graphs, loaded, compiled and run by torchair and CANN. Nothing is traced.

The calls are those of the code that torchair generates for its own cached graphs: GeGraph from protobuf,
internal formats from the inputs, load, compile, run.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifacts.cann import RELEASES, CannWarning, cann_release, is_newer
from ...artifacts.errors import MissingDependencyError, TargetError
from ...artifacts.ge.graph import read_graph
from ...artifacts.ge.ops import CONSTANT, INPUTS, OUTPUT
from ...artifacts.host.process import driver_version, emulated, release
from ...artifacts.host.vendor import vendor_import
from ...artifacts.manifest import GePart
from ...artifacts.own import own_cache
from ...artifacts.soc import soc_family
from ...artifacts.store import Artifact, ge_part
from ..memory import check_fits, check_free
from ..ops import kernel_of
from ..phases import PhaseTimes
from .base import Embeds, Ints, Step
from .ge.bound import GeBackend
from .ge.checks import check_graph
from .model import KvCache

# Greedy steps that may be in flight before the host reads the oldest token: enough to hide the read, few enough
# that a finished answer wastes little.
RUN_AHEAD = 2
DEVICE = 0
DEVICE_NAME = f"npu:{DEVICE}"


@dataclass(frozen=True)
class NpuStep(Step):
    """A step whose token is already on its way to the host: `host_token` holds it once `copied` has happened."""

    host_token: Any = None
    copied: Any = None


class NpuBackend(GeBackend):
    """GE graphs on NPU 0. Refuses, before any device memory is taken, what the manifest says cannot run here.

    before_placing is called when all else is known to fit: to wait for a check of the weights that runs beside this.
    """

    name = "npu"
    device = DEVICE_NAME
    run_ahead = RUN_AHEAD

    def __init__(
        self, artifact: Artifact, check_weights: bool = True, before_placing: Callable[[], None] | None = None
    ) -> None:
        loading = PhaseTimes()
        self._before_placing = before_placing
        self._torch_npu = vendor_modules()
        loading.mark("imports")
        # torchair compiles for the current device: tensors and graphs must agree on it
        self._torch_npu.npu.set_device(DEVICE)
        cann = _check_graphs(self._torch_npu, artifact)
        _check_model(self._torch_npu, artifact)
        self.cache_folder = compile_cache(artifact, self._torch_npu, cann)
        self._graphs: dict[str, Any] = {}
        loading.mark("device")
        super().__init__(artifact, check_weights)
        loading.include("device", self.loading)
        self.loading = loading
        for name in self._bound:
            self._compile(name)
        self.loading.mark("graphs")

    def place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._before_placing is not None:
            self._before_placing()
            self.loading.mark("weight_check")
        # Parameter(t.npu()), not Parameter(t).npu(): the address must stay what GE was told
        return {name: torch.nn.Parameter(t.to(self.device), requires_grad=False) for name, t in tensors.items()}

    def load_graph(self, name: str, data: bytes, where: str) -> None:
        from torchair.ge._ge_graph import GeGraph

        # what the reference executor knows is what this toolchain emits; another operator may read any file
        graph = read_graph(data, where)
        for node in graph.nodes:
            if node.op not in (*INPUTS, CONSTANT, OUTPUT):
                kernel_of(node, where)
        check_graph(graph, self.binding(name), where)
        self._graphs[name] = GeGraph(serialized_model_def=data)

    def _compile(self, name: str) -> None:
        """Hand the graph to GE; its compiled kernels come from the user's cache where they are there."""
        from torchair._ge_concrete_graph.fx2ge_converter import _update_internal_format_from_inputs
        from torchair.core._backend import initialize_graph_engine

        binding, graph = self._bound[name].binding, self._graphs[name]
        initialize_graph_engine(dict(binding.global_options))
        _update_internal_format_from_inputs(graph, self._bound[name].examples(self.device))
        options = {
            **binding.local_options,
            "ge.graph_compiler_cache_dir": str(self.cache_folder),
            "ge.graph_key": name,
        }
        graph.load(options)
        graph.compile()

    def run_graph(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        return list(self._graphs[name].run(inputs))

    def prefill(
        self, cache: KvCache, row: int, start: int, token_ids: Ints, positions: Ints, embeds: Embeds | None, index: Ints
    ) -> Step:
        return self._sent(super().prefill(cache, row, start, token_ids, positions, embeds, index))

    def decode(self, cache: KvCache, step: Step, kv_lengths: list[int]) -> Step:
        return self._sent(super().decode(cache, step, kv_lengths))

    def _sent(self, step: Step) -> NpuStep:
        """Queue the token's copy to the host right behind the step that makes it.

        A copy asked for later would stand behind the steps launched since, and wait for them all.
        """
        read = step.next_token if step.checked_token is None else step.checked_token
        host = torch.empty(read.shape, dtype=read.dtype, pin_memory=True)
        host.copy_(read, non_blocking=True)
        copied = self._torch_npu.npu.Event()
        copied.record()
        return NpuStep(**vars(step), host_token=host, copied=copied)

    def tokens(self, step: Step) -> Ints:
        if not isinstance(step, NpuStep):
            return super().tokens(step)
        step.copied.synchronize()
        tokens: Ints = step.host_token.numpy()
        return tokens


def vendor_modules() -> Any:
    """Import torch_npu and torchair. Raises MissingDependencyError when they are absent or do not match torch."""
    try:
        installed = importlib.metadata.version("torch-npu")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            "backend npu needs torch-npu, which is not installed; pip install 'qwen2vl-tc[npu]'"
        ) from error
    if release(installed) != release(torch.__version__):
        raise MissingDependencyError(
            f"torch {torch.__version__} and torch-npu {installed} do not match; install equal versions"
        )
    try:
        with vendor_import():
            import torch_npu
            import torchair  # noqa: F401  # its submodules are used by name
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"torch-npu needs {error.name}, which is not installed; pip install 'qwen2vl-tc[npu]'"
        ) from error
    except Exception as error:  # torch-npu raises Exception itself when it finds CANN's folders wanting
        raise TargetError(f"backend npu: torch-npu cannot be imported: {error}") from error
    return torch_npu


def open_npu(artifact: Artifact) -> None:
    """Import the vendor modules and open the NPU for the model itself, not its graphs. Raises TargetError where it
    cannot hold it."""
    torch_npu = vendor_modules()
    torch_npu.npu.set_device(DEVICE)
    _check_model(torch_npu, artifact)


def _check_model(torch_npu: Any, artifact: Artifact) -> None:
    """Compare the device with what the model asks of it, however it is run. Raises TargetError."""
    part, npu = ge_part(artifact.manifest, artifact.path), torch_npu.npu
    if part.dtype == "fp32":
        raise TargetError(
            f"{artifact.path}: it is fp32, and the NPU's attention takes bf16 and fp16; build it with --dtype bf16, or "
            "use --backend reference"
        )
    free, total = npu.mem_get_info()
    check_fits(artifact.manifest, part, total)
    # what this process' allocator holds without using it is free for us, too
    check_free(artifact.manifest, part, free + npu.memory_reserved() - npu.memory_allocated())


def _check_graphs(torch_npu: Any, artifact: Artifact) -> str:
    """Compare the device with the graphs' target; returns CANN's version. Raises TargetError."""
    part = ge_part(artifact.manifest, artifact.path)
    if part.admitted is None:
        raise TargetError(
            f"{artifact.path}: an earlier release of qwen2vl-tc compiled its graphs, which no CANN may take; "
            f"run `qwen2vl-tc compile {artifact.path}` again"
        )
    soc = str(torch_npu.npu.get_device_name(0))
    if soc_family(soc) != soc_family(part.soc):
        raise TargetError(
            f"{artifact.path}: compiled for {part.soc}, this device is {soc}; compile it again with --soc {soc}"
        )
    installed, compiled = importlib.metadata.version("torch-npu"), part.versions.get("torch-npu", "unknown")
    if installed != compiled:
        raise TargetError(
            f"{artifact.path}: compiled with torch-npu {compiled}, installed is {installed}; "
            "install that version or compile the artifact again"
        )
    if emulated():
        return "none"
    cann = str(torch_npu.npu.utils.get_cann_version())
    _check_admitted(artifact, part.admitted, cann)
    _check_operators(artifact)
    return cann


def _check_admitted(artifact: Artifact, admitted: tuple[str, ...], cann: str) -> None:
    """Raises TargetError unless the graphs obey the rules of this CANN, or it is newer than the rules are."""
    release, named = cann_release(cann), ", ".join(admitted) or "none"
    if release is None:
        raise TargetError(
            f"{artifact.path}: CANN reports the version {cann!r}, and its graphs are admitted by {named}; "
            "check the installation with `qwen2vl-tc doctor`"
        )
    if release in admitted:
        return
    if is_newer(release):
        warnings.warn(
            f"CANN {cann} is newer than the rules that the graphs were checked by (CANN {RELEASES[-1]}); they are "
            f"admitted by: {named}",
            CannWarning,
            stacklevel=2,
        )
        return
    raise TargetError(
        f"{artifact.path}: CANN {cann} does not admit its graphs, admitted by: {named}; use one of those, or compile "
        f"another form: `qwen2vl-tc check {artifact.path}` says what is in the way"
    )


def missing_operators(part: GePart) -> dict[str, str]:
    """Operators that tracing could not ask CANN for and that the CANN here lacks, with its answer.

    The vendor modules must be imported, on a host with CANN.
    """
    from torchair.core import _torchair

    return {
        note.operator: answer
        for note in part.operator_notes
        if (answer := _torchair.check_cann_compat(note.operator, note.inputs, note.attributes))
    }


def _check_operators(artifact: Artifact) -> None:
    """Raises TargetError if this CANN's registry lacks an operator of the graphs."""
    missing = missing_operators(ge_part(artifact.manifest, artifact.path))
    if missing:
        raise TargetError(
            f"{artifact.path}: this CANN lacks {', '.join(sorted(missing))}: {next(iter(missing.values()))}; "
            "install a newer CANN"
        )


def compile_cache(artifact: Artifact, torch_npu: Any, cann: str) -> Path:
    """Where GE keeps this artifact's compiled kernels: in the user's cache, never in the artifact.

    A driver whose version is not recorded is called unknown: then only CANN's version tells old kernels from new ones.
    """
    soc, driver = torch_npu.npu.get_device_name(0), driver_version() or "unknown"
    key = f"{artifact.manifest_hash[:16]}-{soc}-cann-{cann}-driver-{driver}"
    # GE runs what lies there
    return own_cache("ge", key)
