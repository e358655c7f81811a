"""The NPU backend: the artifact's GE graphs, loaded, compiled and run by torchair and CANN. Nothing is traced.

The calls are those of the code that torchair generates for its own cached graphs: GeGraph from protobuf,
internal formats from the inputs, load, compile, run.
"""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...artifacts.errors import MissingDependencyError, TargetError
from ...artifacts.process import cache_home, emulated
from ...artifacts.store import Artifact, ge_part
from ..memory import check_fits
from .ge.bound import GeBackend

# Greedy steps that may be in flight before the host reads the oldest token: enough to hide the read, few enough
# that a finished answer wastes little.
RUN_AHEAD = 2


class NpuBackend(GeBackend):
    """GE graphs on NPU 0. Refuses, before any device memory is taken, what the manifest says cannot run here."""

    name = "npu"
    device = "npu:0"
    run_ahead = RUN_AHEAD

    def __init__(self, artifact: Artifact, check_weights: bool = True) -> None:
        self._torch_npu = _vendor_modules()
        part = ge_part(artifact.manifest, artifact.path)
        self._cann = _check_device(self._torch_npu, artifact)
        _, memory = self._torch_npu.npu.mem_get_info()
        check_fits(artifact.manifest, part, memory)
        self._cache_folder = compile_cache(artifact, self._torch_npu, self._cann)
        self._graphs: dict[str, Any] = {}
        super().__init__(artifact, check_weights)
        for name in self._bound:
            self._compile(name)

    def place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # Parameter(t.npu()), not Parameter(t).npu(): the address must stay what GE was told
        return {name: torch.nn.Parameter(t.to(self.device), requires_grad=False) for name, t in tensors.items()}

    def load_graph(self, name: str, data: bytes, where: str) -> None:
        from torchair.ge._ge_graph import GeGraph

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
            "ge.graph_compiler_cache_dir": str(self._cache_folder),
            "ge.graph_key": name,
        }
        graph.load(options)
        graph.compile()

    def run_graph(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        outputs = self._bound[name].binding.outputs
        assigned = [None if output.input is None else inputs[output.input] for output in outputs]
        graph = self._graphs[name]
        if any(tensor is not None for tensor in assigned):
            return list(graph.run(inputs, assigned))
        return list(graph.run(inputs))

    def to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _vendor_modules() -> Any:
    """Import torch_npu and torchair. Raises MissingDependencyError when they are absent or do not match torch."""
    try:
        wanted, got = importlib.metadata.version("torch-npu"), torch.__version__
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            "backend npu needs torch-npu, which is not installed; pip install 'qwen2vl-tc[npu]'"
        ) from error
    if wanted.split("+")[0].split(".post")[0] != got.split("+")[0]:
        raise MissingDependencyError(f"torch {got} and torch-npu {wanted} do not match; install equal versions")
    import torch_npu
    import torchair  # noqa: F401  # its submodules are used by name

    return torch_npu


def _check_device(torch_npu: Any, artifact: Artifact) -> str:
    """Compare the device with the manifest's target; returns CANN's version. Raises TargetError."""
    part = ge_part(artifact.manifest, artifact.path)
    soc = str(torch_npu.npu.get_device_name(0))
    if soc_family(soc) != soc_family(part.soc):
        raise TargetError(
            f"{artifact.path}: compiled for {part.soc}, this device is {soc}; compile it again with --soc {soc}"
        )
    installed = importlib.metadata.version("torch-npu")
    if installed != part.versions["torch-npu"]:
        raise TargetError(
            f"{artifact.path}: compiled with torch-npu {part.versions['torch-npu']}, installed is {installed}; "
            "install that version or compile the artifact again"
        )
    if emulated():
        return "none"
    _check_operators(artifact)
    return str(torch_npu.npu.utils.get_cann_version())


def _check_operators(artifact: Artifact) -> None:
    """Ask this CANN's registry for the operators that tracing could not ask for. Raises TargetError."""
    from torchair.core import _torchair

    missing = {
        note.operator: answer
        for note in ge_part(artifact.manifest, artifact.path).operator_notes
        if (answer := _torchair.check_cann_compat(note.operator, (), ()))
    }
    if missing:
        raise TargetError(
            f"{artifact.path}: this CANN lacks {', '.join(sorted(missing))}: {next(iter(missing.values()))}; "
            "install a newer CANN"
        )


def soc_family(soc: str) -> str:
    """Ascend910B2 and Ascend910B4 run the same kernels; Ascend910_9382 and Ascend310P3 do not."""
    for family in ("Ascend910B", "Ascend910_93", "Ascend310P", "Ascend310B"):
        if soc.startswith(family):
            return family
    return soc


def compile_cache(artifact: Artifact, torch_npu: Any, cann: str) -> Path:
    """Where GE keeps this artifact's compiled kernels: in the user's cache, never in the artifact."""
    key = f"{artifact.manifest_hash[:16]}-{torch_npu.npu.get_device_name(0)}-cann-{cann}"
    folder = cache_home() / "ge" / key
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder
