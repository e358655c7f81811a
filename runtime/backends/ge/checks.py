"""What a graph and its binding must agree on with the runtime, checked when they are loaded."""

from ....artifacts.config import ModelConfig
from ....artifacts.errors import ArtifactError
from ....artifacts.ge.binding import CACHE, Binding
from ....artifacts.ge.graph import GeGraph
from ....artifacts.manifest import GePart
from ...ops.graphs import written_by

# what the runtime reads of a graph's outputs
_OUTPUTS = {
    "visual": ("embeds",),
    "prefill": ("next_token", "logits"),
    "decode": ("next_token", "logits", "cache_index"),
}


def check_binding(binding: Binding, name: str, part: GePart, model: ModelConfig, where: str) -> None:
    """Raises ArtifactError unless a graph is bound under its own name, to the caches that there are, and has the
    outputs that are read."""
    if binding.graph != name:
        raise ArtifactError(f"{where}: is the binding of {binding.graph}, the manifest says {name}; compile again")
    kind, _, batch = name.partition("_b")
    outputs = [output.name for output in binding.outputs]
    listed = next((graph.outputs for graph in part.graphs if graph.name == name), ())
    if outputs != [output.name for output in listed]:
        raise ArtifactError(f"{where}: has the outputs {', '.join(outputs)}, the manifest lists others; compile again")
    if set(_OUTPUTS.get(kind, ())) - set(outputs) or len(set(outputs)) != len(outputs):
        raise ArtifactError(
            f"{where}: has the outputs {', '.join(outputs)}, expected {', '.join(_OUTPUTS.get(kind, ()))}"
        )
    expected = (int(batch) if batch else 1, part.max_length, model.text.kv_dim)
    for bound in binding.inputs:
        if bound.kind == CACHE and (
            kind == "visual"
            or bound.name not in ("keys", "values")
            or not 0 <= (bound.index or 0) < model.text.num_layers
            or (bound.shape, bound.dtype) != (expected, part.dtype)
        ):
            raise ArtifactError(
                f"{where}: takes {bound.name}[{bound.index}] {list(bound.shape)} {bound.dtype} as a cache; this model "
                f"has keys and values of {model.text.num_layers} layers, {list(expected)} {part.dtype}"
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
