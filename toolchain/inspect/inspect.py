"""What is in an artifact: graphs with operators counted and costs, bytes, versions. Reads files, imports no engine."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...artifacts.errors import ArtifactError, TargetError
from ...artifacts.ge.binding import PARAMETER, Binding, binding_from_bytes
from ...artifacts.ge.graph import GeGraph, read_graph
from ...artifacts.manifest import GePart, Graph, Manifest, OnnxPart
from ...artifacts.store import Artifact, ge_part, open_artifact, read_signed
from ...runtime.backends.ge.checks import check_graph
from ...runtime.memory import device_memory, soc_memory
from ...runtime.models import config_of, family_of, graphs_of, spec_of
from ...runtime.models.base import GraphSpec
from ...runtime.models.config import ModelConfig
from ...runtime.ops import known
from ...runtime.ops.graphs import count_kinds, device_ops_per_layer, input_behind, live_ops
from ..build.onnx import WEIGHTS, planned_bytes
from ..check.check import inserted
from .cost import Lengths, choose_lengths, graph_cost, input_specs
from .dot import Drawing, draw_layer
from .report import operator_table, render
from .roofline import Assumptions, assumptions_for, why_no_assumptions
from .shapes import graph_ops, propagate
from .views import RECIPE_7B, GraphView, Inspection, OnnxView, OpCounts, TargetView, WeightsView

__all__ = [
    "RECIPE_7B",
    "Inspection",
    "count_graph_ops",
    "draw_artifact",
    "inspect_artifact",
    "operator_table",
    "render",
]


def inspect_artifact(
    path: Path,
    tokens: int | None = None,
    patches: int | None = None,
    trusted_keys: Sequence[str | Path] | None = None,
) -> Inspection:
    """Look into an artifact; graphs and bindings are checked against their hashes, weights are not read.

    Costs are those of a prompt of `tokens` with one picture of `patches`, by default `inspect_cost.DEFAULT_*`.
    A signature is reported, not insisted on: trusted_keys say which keys are known.
    Raises ArtifactError if it is none, or damaged, and TargetError for lengths that do not fit it.
    """
    with open_artifact(path) as artifact:
        manifest = artifact.manifest
        config = config_of(manifest)
        part = manifest.ge
        lengths, assumed, no_estimate = None, None, None
        graphs: dict[str, GraphView] = {}
        if part:
            lengths = choose_lengths(config, part.max_length, tokens, patches)
            assumed = assumptions_for(part.soc, part.dtype)
            no_estimate = None if assumed else why_no_assumptions(part.soc, part.dtype)
            specs = graphs_of(config, part)
            graphs = {
                graph.name: _graph(artifact, graph, spec_of(specs, graph.name, str(path)), config, lengths, assumed)
                for graph in part.graphs
            }
        return Inspection(
            name=manifest.name,
            schema=manifest.schema,
            model=config,
            weights=_weights(manifest, config),
            target=_target(manifest, part) if part else None,
            graphs=graphs,
            processor=tuple(Path(entry.path).name for entry in manifest.processor),
            bytes=sum(entry.bytes for entry in manifest.files()),
            verification=manifest.verification,
            selftest=manifest.selftest.source if manifest.selftest else None,
            signed=read_signed(path, trusted_keys),
            recipe_at_7b=RECIPE_7B,
            lengths=lengths,
            estimate_assumptions=assumed,
            no_estimate=no_estimate,
            onnx=_onnx(manifest.onnx) if manifest.onnx else None,
            onnx_planned_bytes={kind: planned_bytes(config, kind) for kind in WEIGHTS},
        )


def draw_artifact(
    path: Path, graph_name: str, layer: int | None = None, tokens: int | None = None, patches: int | None = None
) -> Drawing:
    """One layer of one graph as Graphviz text, with the shapes of the lengths that `inspect_artifact` takes.

    Raises TargetError for a graph or a layer that is not there.
    """
    with open_artifact(path) as artifact:
        part = ge_part(artifact.manifest, path)
        config = config_of(artifact.manifest)
        specs, graphs = graphs_of(config, part), {graph.name: graph for graph in part.graphs}
        # a kind stands for its first graph: decode for that of the smallest batch
        name = next((name for name in graphs if name in specs and graph_name in (name, specs[name].kind)), None)
        if name is None:
            raise TargetError(f"--graph {graph_name}: expected one of {', '.join(graphs)}")
        binding, parsed, where = _read(artifact, graphs[name])
        lengths = choose_lengths(config, part.max_length, tokens, patches)
        inputs = input_specs(binding, specs[name], config, lengths)
        return draw_layer(parsed, binding, propagate(parsed, inputs, where), layer)


def count_graph_ops(graph: GeGraph, binding: Binding) -> OpCounts:
    """Count the live operators of a graph."""
    ops = graph_ops(graph)
    live = live_ops(ops)
    kept = [op for op in ops if op.name in live]
    by_name = {op.name: op for op in kept}
    weights = {node.name for node, bound in zip(graph.inputs, binding.inputs, strict=True) if bound.kind == PARAMETER}
    transposed = [op for op in kept if known(op.type).transposes and input_behind(op.first, by_name) in weights]
    return OpCounts(
        **count_kinds(op.type for op in kept),
        transpose_weight=len(transposed),
        per_layer=device_ops_per_layer(kept),
        by_type=dict(sorted(Counter(op.type for op in kept).items(), key=lambda item: (-item[1], item[0]))),
    )


def _weights(manifest: Manifest, config: ModelConfig) -> WeightsView | None:
    part = manifest.weights
    if part is None:
        return None
    tensors = list(family_of(config).weights(config))
    return WeightsView(
        dtype=part.dtype,
        bytes=sum(entry.bytes for entry in part.files),
        files=len(part.files),
        tensors=len(tensors),
        values=sum(tensor.size for tensor in tensors),
    )


def _onnx(part: OnnxPart) -> OnnxView:
    return OnnxView(
        weights=part.weights,
        block_size=part.block_size,
        standard_only=part.standard_only,
        opset=part.opset,
        max_length=part.max_length,
        versions=part.versions,
        verification=part.verification,
        bytes={graph.name: graph.model.bytes + graph.data.bytes for graph in part.graphs},
        ops={graph.name: graph.ops for graph in part.graphs},
    )


def _target(manifest: Manifest, part: GePart) -> TargetView:
    needed = device_memory(manifest, part)
    per_row = needed.cache // max(part.batches)
    return TargetView(
        soc=part.soc,
        operators=part.operators,
        visual_attention=part.visual_attention,
        dtype=part.dtype,
        max_length=part.max_length,
        batches=part.batches,
        passes=part.passes,
        versions=part.versions,
        limits=part.limits,
        admitted=part.admitted,
        operator_notes=part.operator_notes,
        kv_bytes={str(batch): batch * per_row for batch in part.batches},
        kv_bytes_per_token=per_row // part.max_length,
        weight_bytes=needed.weights,
        device_bytes=needed.total,
        device_memory_bytes=soc_memory(part.soc),
    )


def _read(artifact: Artifact, graph: Graph) -> tuple[Binding, GeGraph, str]:
    where = f"{artifact.path}: {graph.graph.path}"
    binding = binding_from_bytes(artifact.read(graph.binding), f"{artifact.path}: {graph.binding.path}")
    parsed = read_graph(artifact.read(graph.graph), where)
    check_graph(parsed, binding, where)
    return binding, parsed, where


def _graph(
    artifact: Artifact,
    graph: Graph,
    spec: GraphSpec,
    config: ModelConfig,
    lengths: Lengths,
    assumed: Assumptions | None,
) -> GraphView:
    binding, parsed, where = _read(artifact, graph)
    cost, no_cost, added = None, None, None
    try:
        inputs = input_specs(binding, spec, config, lengths)
        cost = graph_cost(parsed, binding, spec, inputs, lengths, assumed, where)
        added = inserted(parsed, binding, propagate(parsed, inputs, where))
    except ArtifactError as error:
        # counting needs no shapes: a graph with an operator unknown here is still worth looking at
        no_cost = str(error)
    return GraphView(
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=sum(bound.kind == PARAMETER for bound in binding.inputs),
        ops=count_graph_ops(parsed, binding),
        inserted=added,
        bytes=graph.graph.bytes + graph.binding.bytes,
        cost=cost,
        no_cost=no_cost,
    )
