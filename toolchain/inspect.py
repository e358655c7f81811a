"""What is in an artifact: graphs with their operators counted, bytes, versions. Reads files, imports no engine."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..artifacts.binding import PARAMETER, Binding, binding_from_bytes
from ..artifacts.config import ModelConfig
from ..artifacts.ge_ops import TRANSPOSES, Op, count_kinds, device_ops_per_layer, input_behind, live_ops
from ..artifacts.manifest import GePart, Graph, Manifest, OperatorNote
from ..artifacts.parameters import parameters
from ..artifacts.store import Artifact, open_artifact
from ..runtime.backends.ge.graph import GeGraph, read_graph
from ..runtime.memory import device_memory, soc_memory
from .console import format_bytes

# The published recipe's graphs, as torchair emits them at the 7B shape (bf16, batch 1, 1368 patches, 367 tokens).
RECIPE_7B: dict[str, dict[str, int]] = {
    "visual": {"total": 4072, "device": 1639, "transpose_weight": 130, "per_layer": 51},
    "prefill": {"total": 3930, "device": 789, "transpose_weight": 196, "per_layer": 27},
    "decode": {"total": 1984, "device": 732, "transpose_weight": 196, "per_layer": 25},
}
# what the table of operators says, in this order
_COUNTED = (
    ("all live operators", "total"),
    ("device: kernels", "device"),
    ("device, per layer", "per_layer"),
    ("transposes of a weight", "transpose_weight"),
    ("shape: arithmetic on shapes", "shape"),
    ("layout: moves no bytes", "layout"),
    ("data: inputs, constants", "data"),
)


@dataclass(frozen=True)
class TensorView:
    """A graph's input or output. shape: -1 where the size is known at run time only."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OpCounts:
    """Live operators: those that reach NetOutput or write into an input, and the inputs themselves.

    device: kernels. shape: arithmetic on shapes. layout: Reshape and the like, which move no bytes. data: inputs,
    constants, output. transpose_weight: kernels that transpose a parameter. per_layer: device operators of one layer;
    None where there is one layer only, or where layers differ.
    """

    total: int
    device: int
    shape: int
    layout: int
    data: int
    transpose_weight: int
    per_layer: int | None
    by_type: dict[str, int]


@dataclass(frozen=True)
class GraphView:
    """One compiled graph; parameters and constants are not among its inputs."""

    inputs: tuple[TensorView, ...]
    outputs: tuple[TensorView, ...]
    parameters: int
    ops: OpCounts
    bytes: int


@dataclass(frozen=True)
class WeightsView:
    """What the weight files hold."""

    dtype: str
    bytes: int
    files: int
    tensors: int
    values: int


@dataclass(frozen=True)
class TargetView:
    """What the graphs were compiled for, with what, and what they need of the device."""

    soc: str
    operators: str
    visual_attention: str
    dtype: str
    max_length: int
    batches: tuple[int, ...]
    passes: tuple[str, ...]
    versions: dict[str, str]
    operator_notes: tuple[OperatorNote, ...]
    kv_bytes: dict[str, int]
    kv_bytes_per_token: int
    weight_bytes: int
    device_bytes: int
    device_memory_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` says. kv_bytes is by batch size; device_bytes is weights and the largest KV cache."""

    name: str
    schema: int
    model: ModelConfig
    weights: WeightsView | None
    target: TargetView | None
    graphs: dict[str, GraphView]
    processor: tuple[str, ...]
    bytes: int
    verification: str
    recipe_at_7b: dict[str, dict[str, int]]


def inspect_artifact(path: Path) -> Inspection:
    """Look into an artifact; graphs and bindings are checked against their hashes, weights are not read.

    Raises ArtifactError if it is none, or damaged.
    """
    with open_artifact(path) as artifact:
        manifest = artifact.manifest
        part = manifest.ge
        return Inspection(
            name=manifest.name,
            schema=manifest.schema,
            model=manifest.model,
            weights=_weights(manifest),
            target=_target(manifest, part) if part else None,
            graphs={graph.name: _graph(artifact, graph) for graph in (part.graphs if part else ())},
            processor=tuple(Path(entry.path).name for entry in manifest.processor),
            bytes=sum(entry.bytes for entry in manifest.files()),
            verification=manifest.verification,
            recipe_at_7b=RECIPE_7B,
        )


def count_graph_ops(graph: GeGraph, binding: Binding) -> OpCounts:
    """Count the live operators of a graph."""
    ops = [Op(node.name, node.op, tuple(edge[0] if edge else None for edge in node.inputs)) for node in graph.nodes]
    live = live_ops(ops)
    kept = [op for op in ops if op.name in live]
    by_name = {op.name: op for op in kept}
    weights = {node.name for node, bound in zip(graph.inputs, binding.inputs, strict=True) if bound.kind == PARAMETER}
    transposed = [op for op in kept if op.type in TRANSPOSES and input_behind(op.inputs[0], by_name) in weights]
    return OpCounts(
        **count_kinds(op.type for op in kept),
        transpose_weight=len(transposed),
        per_layer=device_ops_per_layer(kept),
        by_type=dict(sorted(Counter(op.type for op in kept).items(), key=lambda item: (-item[1], item[0]))),
    )


def _weights(manifest: Manifest) -> WeightsView | None:
    part = manifest.weights
    if part is None:
        return None
    tensors = list(parameters(manifest.model))
    return WeightsView(
        dtype=part.dtype,
        bytes=sum(entry.bytes for entry in part.files),
        files=len(part.files),
        tensors=len(tensors),
        values=sum(tensor.size for tensor in tensors),
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
        operator_notes=part.operator_notes,
        kv_bytes={str(batch): batch * per_row for batch in part.batches},
        kv_bytes_per_token=per_row // part.max_length,
        weight_bytes=needed.weights,
        device_bytes=needed.total,
        device_memory_bytes=soc_memory(part.soc),
    )


def _graph(artifact: Artifact, graph: Graph) -> GraphView:
    binding = binding_from_bytes(artifact.read(graph.binding), f"{artifact.path}: {graph.binding.path}")
    parsed = read_graph(artifact.read(graph.graph), f"{artifact.path}: {graph.graph.path}")
    files = [entry for entry in (graph.graph, graph.binding) if entry]
    return GraphView(
        inputs=tuple(TensorView(tensor.name, tensor.dtype, tensor.shape) for tensor in graph.inputs),
        outputs=tuple(TensorView(tensor.name, tensor.dtype, tensor.shape) for tensor in graph.outputs),
        parameters=sum(bound.kind == PARAMETER for bound in binding.inputs),
        ops=count_graph_ops(parsed, binding),
        bytes=sum(entry.bytes for entry in files),
    )


def render(inspection: Inspection, console: Console) -> None:
    """Print an inspection for people."""
    console.print(_overview(inspection))
    if inspection.graphs:
        console.print(_counts(inspection.graphs))
        console.print("recipe at 7B: the published recipe's own graphs at the 7B shape, as torchair emits them")
        console.print(_signatures(inspection.graphs))
        console.print(_types(inspection.graphs))
    if inspection.target and inspection.target.operator_notes:
        console.print(operator_table(inspection.target.operator_notes))


def _overview(inspection: Inspection) -> Table:
    table = Table(show_header=False, title=Text(inspection.name, "bold"), title_justify="left")
    text, vision = inspection.model.text, inspection.model.vision
    rows = [
        (
            "model",
            f"{inspection.model.model_type}: {text.num_layers} text layers of {text.hidden_size}, "
            f"{text.num_heads} heads ({text.num_kv_heads} KV), vocabulary {text.vocab_size}; "
            f"{vision.depth} vision layers of {vision.embed_dim}",
        )
    ]
    if weights := inspection.weights:
        rows.append(
            (
                "weights",
                f"{format_bytes(weights.bytes)} {weights.dtype}, {weights.values:,} values in {weights.tensors} "
                f"tensors, {weights.files} file(s)",
            )
        )
    else:
        rows.append(("weights", "none: run `qwen2vl-tc convert --src <hf_dir> --out <this artifact>`"))
    if target := inspection.target:
        caches = ", ".join(f"{format_bytes(size)} at batch {batch}" for batch, size in target.kv_bytes.items())
        of = f" of {format_bytes(target.device_memory_bytes)}" if target.device_memory_bytes else ""
        rows += [
            ("target", f"{target.soc}, {target.dtype}, operators {target.operators}, ViT {target.visual_attention}"),
            ("KV cache", f"{caches}, for {target.max_length} tokens ({format_bytes(target.kv_bytes_per_token)} each)"),
            ("device memory", f"{format_bytes(target.device_bytes)}{of}, weights and largest KV cache"),
            ("passes", ", ".join(target.passes) or "none"),
            ("made with", ", ".join(f"{name} {version}" for name, version in target.versions.items())),
        ]
    else:
        rows.append(("graphs", "none: run `qwen2vl-tc compile <this artifact>`"))
    rows += [
        ("processor", ", ".join(inspection.processor) or "none"),
        ("in all", f"{format_bytes(inspection.bytes)}, schema {inspection.schema}"),
        ("verification", inspection.verification),
    ]
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _recipe(name: str) -> dict[str, int]:
    return RECIPE_7B.get("decode" if name.startswith("decode") else name, {})


def _counts(graphs: dict[str, GraphView]) -> Table:
    """A column a graph, so that it fits a terminal of 80 columns; the recipe's figures in brackets."""
    table = Table("", title="Operators (in brackets: the recipe at 7B)", title_justify="left")
    for name in graphs:
        table.add_column(name, justify="right")
    for title, key in _COUNTED:
        cells = []
        for name, graph in graphs.items():
            value = getattr(graph.ops, key)
            recipe = _recipe(name).get(key)
            cells.append(("-" if value is None else str(value)) + ("" if recipe is None else f" ({recipe})"))
        table.add_row(title, *cells)
    table.add_row("bytes of the graph", *(format_bytes(graph.bytes) for graph in graphs.values()))
    return table


def _grouped(tensors: tuple[TensorView, ...]) -> list[str]:
    """One line a tensor; a list with one tensor a layer becomes one line."""
    lists: dict[str, list[TensorView]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.name.partition("[")[0], []).append(tensor)
    lines = []
    for name, members in lists.items():
        first = members[0]
        shape = "[" + ", ".join("?" if n < 0 else str(n) for n in first.shape) + "]"
        times = f"{len(members)} x " if "[" in first.name else ""
        lines.append(f"{name}: {times}{first.dtype} {shape}")
    return lines


def _signatures(graphs: dict[str, GraphView]) -> Table:
    table = Table("graph", "inputs", "outputs", title="Signatures (? is known at run time)", title_justify="left")
    for name, graph in graphs.items():
        table.add_row(name, Text("\n".join(_grouped(graph.inputs))), Text("\n".join(_grouped(graph.outputs))))
    return table


def _types(graphs: dict[str, GraphView]) -> Table:
    table = Table("graph", "live operators by type", title_justify="left")
    for name, graph in graphs.items():
        table.add_row(name, Text(", ".join(f"{op_type} {count}" for op_type, count in graph.ops.by_type.items())))
    return table


def operator_table(notes: tuple[OperatorNote, ...]) -> Table:
    """The operators that the device must be asked about."""
    table = Table("operator", "why", title="Operators to check on the device", title_justify="left")
    for note in notes:
        table.add_row(note.operator, Text(note.reason))
    return table
