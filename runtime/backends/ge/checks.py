"""What a graph and its binding must agree on with the runtime, checked when they are loaded."""

from ....artifacts.errors import ArtifactError
from ....artifacts.ge.binding import ARGUMENT, CACHE, LENGTHS, Binding, BoundInput
from ....artifacts.ge.graph import GeGraph
from ....artifacts.manifest import GePart
from ...models.base import MODEL_DTYPE, Argument, GraphSpec
from ...ops.graphs import written_by

_KINDS = {ARGUMENT: "tensor", LENGTHS: "lengths", CACHE: "cache"}


def check_binding(binding: Binding, spec: GraphSpec, part: GePart, where: str) -> None:
    """Raises ArtifactError unless a graph is bound under its own name, takes what its spec says and nothing else, and
    has the spec's outputs."""
    if binding.graph != spec.name:
        raise ArtifactError(f"{where}: is the binding of {binding.graph}, the manifest says {spec.name}; compile again")
    outputs, expected = [output.name for output in binding.outputs], [output.name for output in spec.outputs]
    listed = next((graph.outputs for graph in part.graphs if graph.name == spec.name), ())
    if outputs != [output.name for output in listed]:
        raise ArtifactError(f"{where}: has the outputs {', '.join(outputs)}, the manifest lists others; compile again")
    if outputs != expected:
        raise ArtifactError(f"{where}: has the outputs {', '.join(outputs)}, expected {', '.join(expected)}")
    arguments = {argument.name: argument for argument in spec.arguments}
    for bound in binding.inputs:
        if bound.kind in _KINDS:
            _check_argument(bound, arguments.get(bound.name), spec, part.dtype, where)


def _check_argument(bound: BoundInput, argument: Argument | None, spec: GraphSpec, model: str, where: str) -> None:
    name = bound.name if bound.index is None else f"{bound.name}[{bound.index}]"
    got = f"{where}: takes {name} {list(bound.shape)} {bound.dtype} as "
    got += "a cache" if bound.kind == CACHE else f"{bound.kind} of {spec.name}"
    if argument is None or _KINDS[bound.kind] != argument.kind:
        raise ArtifactError(f"{got}, which this model's graph does not have; compile again")
    dtype = model if argument.dtype == MODEL_DTYPE else argument.dtype
    if (bound.shape, bound.dtype) != (argument.bound, dtype) or not 0 <= (bound.index or 0) < max(spec.layers, 1):
        raise ArtifactError(
            f"{got}; this model has {f'{spec.layers} layers of ' * (bound.kind == CACHE)}{argument.name}, "
            f"{list(argument.bound)} {dtype}"
        )


def check_graph(graph: GeGraph, binding: Binding, where: str) -> None:
    """Raises ArtifactError unless the graph has as many inputs as its binding, and writes into none but the KV cache.

    Parameters are mapped read-only: a write would end the process.
    """
    if len(graph.inputs) != len(binding.inputs):
        raise ArtifactError(f"{where}: has {len(graph.inputs)} inputs, its binding names {len(binding.inputs)}")
    for node in written_by(graph, where):
        bound = binding.inputs[node.attributes["index"]]
        if bound.kind != CACHE:
            raise ArtifactError(f"{where}: writes into {bound.kind} {bound.name}, which is no cache; compile again")
