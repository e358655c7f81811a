"""What the commands print about what they did."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...artifacts.cann import RELEASES
from ...artifacts.errors import TargetError
from ...artifacts.manifest import GePart, Graph, Manifest
from ...artifacts.store import is_signed
from ...runtime.memory import check_fits, soc_memory
from ..words import command, format_bytes
from .console import result, stdout, warn

if TYPE_CHECKING:
    from rich.table import Table

    from ..host.warm import Warmed
    from ..weights.convert import ConvertResult


def warn_signed(target: Path) -> None:
    """Said before a command that may change the artifact."""
    if is_signed(target):
        warn(f"{target} is signed; a change drops the signature: sign it again with `qwen2vl-tc sign`")


def warn_notes(converted: "ConvertResult") -> None:
    """Where the checkpoint's files contradict each other, and which of them counts."""
    for note in converted.notes:
        warn(note)


def print_converted(converted: "ConvertResult", out: Path, has_graphs: bool) -> None:
    """What `convert` wrote, and what to run next."""
    warn_notes(converted)
    weights = converted.weights
    resumed = f"; {converted.resumed_shards} resumed from a run that was stopped" if converted.resumed_shards else ""
    following = command("qwen2vl-tc", "inspect" if has_graphs else "compile", out)
    result(
        f"wrote {out}: {format_bytes(converted.bytes)} of {weights.dtype} weights in {len(weights.files)} file(s)"
        f"{resumed}; next: {following}"
    )


def print_compiled(manifest: Manifest) -> None:
    """The graphs, what must be checked on the device, and whether one device holds the model."""
    from ..inspect.inspect import operator_table

    part = manifest.ge
    if part is None:
        return
    console = stdout()
    console.print(_graphs(part))
    if part.operator_notes:
        console.print(operator_table(part.operator_notes))
    for limit in part.limits:
        warn(limit)
    memory = soc_memory(part.soc)
    if memory is not None:
        try:
            check_fits(manifest, part, memory)
        except TargetError as error:
            warn(str(error))


def _graphs(part: GePart) -> "Table":
    from rich.table import Table
    from rich.text import Text

    title = f"GE graphs for {part.soc}: {part.dtype}, up to {part.max_length} tokens"
    table = Table("graph", title=Text(title), title_justify="left")
    for column in ("operators", "device operators", "bytes"):
        table.add_column(column, justify="right")
    for graph in part.graphs:
        table.add_row(Text(graph.name), str(graph.ops["total"]), str(graph.ops["device"]), format_bytes(_size(graph)))
    return table


def _size(graph: Graph) -> int:
    return graph.graph.bytes + graph.binding.bytes


def print_onnx(manifest: Manifest) -> None:
    """The ONNX models: nodes and bytes."""
    from rich.table import Table
    from rich.text import Text

    part = manifest.onnx
    if part is None:
        return
    kinds = "standard operators only" if part.standard_only else f"opset {part.opset} and com.microsoft"
    table = Table("model", title=Text(f"ONNX models: {part.weights}, {kinds}"), title_justify="left")
    for column in ("nodes", "model", "tensors"):
        table.add_column(column, justify="right")
    for graph in part.graphs:
        sizes = (format_bytes(graph.model.bytes), format_bytes(graph.data.bytes))
        table.add_row(Text(graph.name), str(sum(graph.ops.values())), *sizes)
    stdout().print(table)


def print_exported(manifest: Manifest, out: Path) -> None:
    """The offline models, and the ATC commands that take them on, each in its folder."""
    from ..build.air import atc_commands

    result("No device and no ATC has run these models yet. On a host with CANN:")
    for folder, line in atc_commands(manifest):
        result(f"cd {command(out / folder)}\n  {line}")
    models = manifest.air.graphs if manifest.air else ()
    size = format_bytes(sum(graph.model.bytes for graph in models))
    result(f"wrote {out}/graphs/air: {len(models)} offline models, {size} beside the weights that they refer to")


def next_after_compile(manifest: Manifest, out: Path) -> str:
    """What to run on an artifact that has graphs."""
    if manifest.weights is None:
        return command("qwen2vl-tc", "convert", "--src", "HF_DIR", "--out", out)
    if manifest.verification == "none":
        return command("qwen2vl-tc", "verify", out, "--against", "HF_DIR")
    return _next_after_loading(out)


def _next_after_loading(artifact: Path) -> str:
    return command("qwen2vl-tc", "generate", artifact, "--image", "PICTURE", "--prompt", "What is this?")


def print_warmed(warmed: "Warmed", artifact: Path) -> None:
    """Where the cache is, what may be wrong with it, and what to run next."""
    if not warmed.files:
        warn(f"GE left nothing in {warmed.cache}: this CANN keeps no compiled graphs, and every start compiles them")
    if warmed.driver is None:
        warn(f"the driver's version is not recorded here: delete {warmed.cache} when the driver is updated")
    result(
        f"warmed {', '.join(warmed.graphs)} in {warmed.seconds:.0f} s: {format_bytes(warmed.bytes)} in "
        f"{warmed.files} file(s), {warmed.cache}; next: {_next_after_loading(artifact)}"
    )


def print_admitted(manifest: Manifest) -> None:
    """Which CANN releases take the graphs, by the rules of `check`."""
    part = manifest.ge
    if part is None:
        return
    if part.admitted:
        result(f"admitted by CANN {', '.join(part.admitted)}, by the rules of `qwen2vl-tc check`")
    elif part.dtype == "fp32":
        result("admitted by no CANN: its attention takes no fp32; these graphs are for CPU")
    else:
        warn(f"no CANN from {RELEASES[0]} to {RELEASES[-1]} admits the graphs: `qwen2vl-tc check` says why")


def print_written(manifest: Manifest, out: Path) -> None:
    """Where it is and what to run next: the last line of compile and build."""
    size = format_bytes(sum(entry.bytes for entry in manifest.files()))
    result(f"wrote {out}: {size}, verification: {manifest.verification}; next: {next_after_compile(manifest, out)}")
