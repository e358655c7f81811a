"""An inspection as tables for people, no wider than 100 columns."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...artifacts.ge.ops import INPUTS
from ...artifacts.manifest import OperatorNote, Tensor
from ...artifacts.signing import Signed
from ..words import format_bytes
from .cost import MEMORY_ASSUMED, GraphCost, Lengths
from .roofline import COUNTED
from .views import RECIPE_7B, GraphView, Inspection

WIDTH = 100

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


def render(inspection: Inspection, console: Console) -> None:
    """Print an inspection for people."""
    for part in _parts(inspection):
        console.print(part, width=min(console.width, WIDTH))


def _parts(inspection: Inspection) -> Iterator[Table | Text]:
    yield _overview(inspection)
    if inspection.graphs:
        yield _counts(inspection.graphs)
        yield Text("recipe at 7B: the published recipe's own graphs at the 7B shape, as torchair emits them")
        yield from _cost_parts(inspection)
        yield _signatures(inspection.graphs)
        yield _types(inspection.graphs)
    for limit in inspection.target.limits if inspection.target else ():
        yield Text(f"limit: {limit}")
    if inspection.target and inspection.target.operator_notes:
        yield operator_table(inspection.target.operator_notes)


def _signature(signed: Signed | None) -> str:
    if signed is None:
        return "none"
    if not signed.valid:
        return f"{'NOT CHECKED' if signed.valid is None else 'INVALID'}: {signed.problem}"
    whose = {
        None: "no --trusted-key says whose",
        True: f"trusted: {signed.trusted_key}",
        False: "NOT one of the trusted keys",
    }
    return f"valid, {whose[signed.trusted]}; key {signed.key}"


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
            ("admitted by CANN", _admitted(target.admitted)),
            ("passes", ", ".join(target.passes) or "none"),
            ("made with", ", ".join(f"{name} {version}" for name, version in target.versions.items())),
        ]
    else:
        rows.append(("graphs", "none: run `qwen2vl-tc compile <this artifact>`"))
    if onnx := inspection.onnx:
        kinds = "standard operators" if onnx.standard_only else "standard and com.microsoft operators"
        sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in onnx.bytes.items())
        about = f"{onnx.weights}, opset {onnx.opset}, {kinds}, for {onnx.max_length} tokens: {sizes}"
        rows += [("ONNX models", about), ("ONNX verification", onnx.verification)]
    else:
        sizes = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in inspection.onnx_planned_bytes.items())
        rows.append(("ONNX models", f"none; an export would take: {sizes}"))
    rows += [
        ("processor", ", ".join(inspection.processor) or "none"),
        ("in all", f"{format_bytes(inspection.bytes)}, schema {inspection.schema}"),
        ("verification", inspection.verification),
        ("self-test", f"answers by {inspection.selftest}" if inspection.selftest else "none"),
        ("signature", _signature(inspection.signed)),
    ]
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _admitted(releases: tuple[str, ...] | None) -> str:
    if releases is None:
        return "none: an earlier release compiled the graphs; compile them again"
    return ", ".join(releases) or "none; `qwen2vl-tc check` says why"


def _recipe(name: str) -> dict[str, int]:
    return RECIPE_7B.get("decode" if name.startswith("decode") else name, {})


def _counts(graphs: dict[str, GraphView]) -> Table:
    """A column a graph, so that it fits a terminal of 80 columns; the recipe's figures in brackets."""
    table = Table("", title="Operators (in brackets: the recipe at 7B)", title_justify="left")
    for name in graphs:
        table.add_column(Text(name), justify="right")
    for title, key in _COUNTED:
        cells = []
        for name, graph in graphs.items():
            value = getattr(graph.ops, key)
            recipe = _recipe(name).get(key)
            cells.append(("-" if value is None else str(value)) + ("" if recipe is None else f" ({recipe})"))
        table.add_row(title, *cells)
    table.add_row(
        "inserted: CANN adds these", *("-" if g.inserted is None else _by_type(g.inserted) for g in graphs.values())
    )
    table.add_row("bytes of the graph", *(format_bytes(graph.bytes) for graph in graphs.values()))
    return table


def _by_type(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {op_type}" for op_type, count in counts.items()) or "0"


def _cost_parts(inspection: Inspection) -> Iterator[Table | Text]:
    """The costs of the graphs that have them, what they assume, and a line for every mask."""
    costs = {name: graph.cost for name, graph in inspection.graphs.items() if graph.cost is not None}
    if costs and inspection.lengths:
        yield _costs(costs, inspection.lengths)
        yield Text(COUNTED, "dim")
        yield Text(MEMORY_ASSUMED, "dim")
        if assumed := inspection.estimate_assumptions:
            yield Text(
                f"estimate: {assumed.soc} with {assumed.bandwidth_bytes_per_s / 1e12:g} TB/s of HBM and "
                f"{assumed.peak_flops_per_s / 1e12:g} TFLOPS dense peak in bf16 and fp16, {assumed.launch_us:g} us a "
                f"launch; {assumed.note}"
                + ("; this model does not fit one such device" if _too_large(inspection) else "")
            )
        else:
            yield Text(f"no estimate: {inspection.no_estimate}")
    for name, graph in inspection.graphs.items():
        if graph.no_cost:
            yield Text(f"{name}: no cost: {graph.no_cost}")
        for mask in graph.cost.masks if graph.cost else ():
            line = f"{name}: mask {mask.name} {mask.dtype} {list(mask.shape)}, {format_bytes(mask.bytes)}"
            yield Text(f"warning: {line}: {mask.warning}", "yellow") if mask.warning else Text(f"{line}, of fixed size")


def _too_large(inspection: Inspection) -> bool:
    target = inspection.target
    return bool(target and target.device_memory_bytes and target.device_bytes > target.device_memory_bytes)


def _costs(costs: dict[str, GraphCost], lengths: Lengths) -> Table:
    """A column a graph, as in the table of operators."""
    title = (
        f"Cost of one run: {lengths.patches} patches in {len(lengths.segments)} segment(s); a prompt of "
        f"{lengths.tokens} tokens, {lengths.image_tokens} of them image; decode at cache length {lengths.tokens}"
    )
    table = Table("", title=title, title_justify="left")
    for name in costs:
        table.add_column(Text(name), justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("FLOPs", [_flops(cost.flops) for cost in costs.values()]),
        ("bytes moved by kernels", [format_bytes(cost.moved_bytes) for cost in costs.values()]),
        ("peak activations", [format_bytes(cost.peak_activation_bytes) for cost in costs.values()]),
        ("... while this runs", [cost.peak_operator for cost in costs.values()]),
        ("run-time arguments", [format_bytes(cost.argument_bytes) for cost in costs.values()]),
        ("largest tensor", [format_bytes(cost.largest_tensor.bytes) for cost in costs.values()]),
        ("... made by", [_made_by(cost) for cost in costs.values()]),
        ("... shape", [str(list(cost.largest_tensor.shape)) for cost in costs.values()]),
    ]
    estimates = [cost.roofline_estimate for cost in costs.values() if cost.roofline_estimate]
    if estimates:
        rows += [
            ("estimate: kernels", [f"{each.kernels_ms:.2f} ms" for each in estimates]),
            ("estimate: launches", [f"{each.launch_ms:.2f} ms" for each in estimates]),
            ("kernels bound by arithmetic", [str(each.compute_bound_ops) for each in estimates]),
        ]
    for title, cells in rows:
        table.add_row(title, *map(Text, cells))
    return table


def _made_by(cost: GraphCost) -> str:
    largest = cost.largest_tensor
    return largest.name if largest.operator in INPUTS else largest.operator


def _flops(count: int) -> str:
    return f"{count / 1e12:.3g} T" if count >= 1e12 else f"{count / 1e9:.3g} G"


def _grouped(tensors: tuple[Tensor, ...]) -> list[str]:
    """One line a tensor; a list with one tensor a layer becomes one line."""
    lists: dict[str, list[Tensor]] = {}
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
        table.add_row(Text(name), Text("\n".join(_grouped(graph.inputs))), Text("\n".join(_grouped(graph.outputs))))
    return table


def _types(graphs: dict[str, GraphView]) -> Table:
    table = Table("graph", "live operators by type", title_justify="left")
    for name, graph in graphs.items():
        table.add_row(Text(name), Text(", ".join(f"{op_type} {count}" for op_type, count in graph.ops.by_type.items())))
    return table


def operator_table(notes: tuple[OperatorNote, ...]) -> Table:
    """The operators that the device must be asked about."""
    table = Table("operator", "why", title="Operators to check on the device", title_justify="left")
    for note in notes:
        table.add_row(Text(note.operator), Text(note.reason))
    return table
