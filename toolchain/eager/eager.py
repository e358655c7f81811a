"""The eager backend: the modules that the graphs are traced from, run operator by operator on an artifact's weights.

For debugging and for comparison, as the recipe's EXE_MODE=eager: on an NPU with torch_npu's operators, elsewhere on CPU
with the reference kernels. It reads no graph.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...artifacts.errors import ArtifactError
from ...artifacts.store import Artifact
from ...exporters.torchair.trace import CONSTANTS_PREFIX
from ...runtime.backends.model import KvCache, ModelBackend
from ...runtime.loader import check_npu
from ...runtime.models.base import GraphOptions
from ..models.build import empty_model
from . import npu_ops

CPU = "cpu"


class EagerBackend(ModelBackend):
    """The family's modules on `device`: CPU, or NPU 0 once the vendor modules are imported."""

    name = "eager"

    def __init__(self, artifact: Artifact, device: str, check_weights: bool = True) -> None:
        self.device = device
        super().__init__(artifact, check_weights)

    def prepare(self, artifact: Artifact, tensors: dict[str, Tensor] | None) -> None:
        part = self._part
        self._outputs = {graph.name: [output.name for output in graph.outputs] for graph in part.graphs}
        self._modules = empty_model(self._config, GraphOptions.of(part), part.dtype)
        if tensors is None:
            return
        for name, parameter in self._modules.named_parameters():
            tensor = tensors.get(name.removeprefix(CONSTANTS_PREFIX))
            if tensor is None or tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                got = "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
                raise ArtifactError(
                    f"{artifact.path}: {name}: got {got}, the modules take {list(parameter.shape)} {parameter.dtype}; "
                    "compile the artifact again"
                )

    def place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        names = [name for name, _ in self._modules.named_parameters()]
        state = {name: tensors[name.removeprefix(CONSTANTS_PREFIX)] for name in names}
        # assigned, not copied: the weights stay what is mapped
        self._modules.load_state_dict(state, assign=True)

    def run(
        self,
        name: str,
        arguments: Mapping[str, Tensor],
        lengths: Mapping[str, list[int]],
        cache: KvCache | None = None,
    ) -> dict[str, Tensor]:
        if self.device == CPU:
            npu_ops.register()
        caches = {"keys": list(cache.keys), "values": list(cache.values)} if cache else {}
        with torch.inference_mode(), npu_ops.kernels_of(self._part.soc):
            outputs = getattr(self._modules, self._specs[name].method)(**arguments, **lengths, **caches)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(self._outputs[name], outputs, strict=True))


def eager_on(artifact: Artifact, backend: str) -> EagerBackend:
    """The eager backend for `load`: on the NPU where `backend` is "npu", else on the CPU.

    Raises TargetError without an NPU that can hold the model.
    """
    if backend == "npu":
        from ...runtime.backends.npu import DEVICE_NAME, open_npu

        check_npu(artifact)
        open_npu(artifact)
        # here, and not beside: what is altered takes no device memory
        return EagerBackend(artifact, DEVICE_NAME, check_weights=True)
    return EagerBackend(artifact, CPU, check_weights=False)
