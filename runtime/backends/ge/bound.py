"""GE graphs over an artifact's weights: arguments go in by binding.json; execution is a subclass'."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....artifacts.errors import ArtifactError, RequestError
from ....artifacts.ge.binding import CACHE, CONSTANT, LENGTHS, PARAMETER, Binding, BoundInput, binding_from_bytes
from ....artifacts.store import Artifact
from ...dtypes import torch_dtype
from ..model import KvCache, ModelBackend
from .checks import check_binding


class BoundGraph:
    """One graph's binding: puts named arguments into the order of the graph's inputs.

    Parameters and constants are checked when it is made, against `tensors` wherever those are, and looked up once, by
    `bind`, where the graph runs; `tensors` is None for a graph that is only loaded, not run.
    """

    def __init__(self, binding: Binding, tensors: Mapping[str, Tensor] | None) -> None:
        self.binding = binding
        self.outputs = [output.name for output in binding.outputs]
        self._fixed: list[Tensor | None] = [None] * len(binding.inputs)
        if tensors is None:
            return
        for i, bound in enumerate(binding.inputs):
            if bound.kind in (PARAMETER, CONSTANT):
                tensor = tensors.get(bound.name)
                dtype = torch_dtype(bound.dtype)
                if tensor is None or tuple(tensor.shape) != bound.shape or tensor.dtype != dtype:
                    got = "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
                    raise ArtifactError(
                        f"graph {binding.graph}: {bound.kind} {bound.name}: got {got}, the graph was compiled for "
                        f"{list(bound.shape)} {bound.dtype}; compile the artifact again"
                    )
                self._fixed[i] = tensor

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters and constants from `tensors`: the same ones, where the graph runs."""
        pairs = zip(self.binding.inputs, self._fixed, strict=True)
        self._fixed = [None if fixed is None else tensors[bound.name] for bound, fixed in pairs]

    def inputs(self, arguments: Mapping[str, Tensor], lengths: Mapping[str, list[int]], cache: KvCache | None) -> Any:
        """The graph's inputs in order. Raises RequestError where an argument does not have the compiled shape."""
        caches = {"keys": cache.keys, "values": cache.values} if cache else {}
        tensors: list[Tensor] = []
        for bound, fixed in zip(self.binding.inputs, self._fixed, strict=True):
            try:
                if fixed is not None:
                    tensor = fixed
                elif bound.kind == CACHE:
                    tensor = caches[bound.name][bound.index]  # type: ignore[index]
                elif bound.kind == LENGTHS:
                    tensor = self._fitting(bound, torch.tensor(lengths[bound.name], dtype=torch.int64))
                else:
                    tensor = self._fitting(bound, arguments[bound.name])
            except KeyError as error:
                raise ArtifactError(
                    f"graph {self.binding.graph}: takes {bound.kind} {bound.name}, which nothing feeds it; compile the "
                    "artifact again"
                ) from error
            tensors.append(tensor)
        return tensors

    def examples(self, device: str) -> list[Tensor]:
        """Inputs of the right places and formats, with 1 for every dynamic size: what GE wants to see once."""
        return [
            torch.empty(
                [1 if size == -1 else size for size in bound.shape],
                dtype=torch_dtype(bound.dtype),
                device="cpu" if bound.host else device,
            )
            if fixed is None
            else fixed
            for bound, fixed in zip(self.binding.inputs, self._fixed, strict=True)
        ]

    def _fitting(self, bound: BoundInput, tensor: Tensor) -> Tensor:
        sizes = zip(tensor.shape, bound.shape, strict=False)
        if tensor.dim() != len(bound.shape) or any(wanted not in (-1, got) for got, wanted in sizes):
            raise RequestError(
                f"{self.binding.graph}.{bound.name}: got {list(tensor.shape)}, the artifact wants {list(bound.shape)}"
            )
        return tensor


class GeBackend(ModelBackend):
    """Everything about GE graphs but their execution, which a subclass brings for its device."""

    def prepare(self, artifact: Artifact, tensors: dict[str, Tensor] | None) -> None:
        self._bound: dict[str, BoundGraph] = {}
        for graph in self._part.graphs:
            where = f"{artifact.path}: {graph.binding.path}"
            binding = binding_from_bytes(artifact.read(graph.binding), where)
            check_binding(binding, self.spec(graph.name), self._part, where)
            self._bound[graph.name] = BoundGraph(binding, tensors)
            self.load_graph(graph.name, artifact.read(graph.graph), f"{artifact.path}: {graph.graph.path}")

    def bind(self, tensors: dict[str, Tensor]) -> None:
        for bound in self._bound.values():
            bound.bind(tensors)

    @abstractmethod
    def load_graph(self, name: str, data: bytes, where: str) -> None:
        """Make a serialized graph ready to run. Takes no device memory."""

    @abstractmethod
    def run_graph(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        """Run a loaded graph."""

    def binding(self, name: str) -> Binding:
        return self._bound[name].binding

    def run(
        self,
        name: str,
        arguments: Mapping[str, Tensor],
        lengths: Mapping[str, list[int]],
        cache: KvCache | None = None,
    ) -> dict[str, Tensor]:
        bound = self._bound[name]
        outputs = self.run_graph(name, bound.inputs(arguments, lengths, cache))
        if len(outputs) != len(bound.outputs):
            raise ArtifactError(f"graph {name}: gave {len(outputs)} outputs, its binding names {len(bound.outputs)}")
        return dict(zip(bound.outputs, outputs, strict=True))
