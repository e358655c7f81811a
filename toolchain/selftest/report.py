"""A self-test's report for people."""

from collections.abc import Iterator
from math import inf

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .check import SelftestDeparture, SelftestOutcome, SelftestReport


def render(report: SelftestReport, console: Console) -> None:
    """A line for every graph; of the first that departs, how far, what looks like it, and what to compile instead."""
    title = f"Self-test of {report.artifact} on {report.device} ({report.backend}, {report.dtype})"
    table = Table("graph", title=title, title_justify="left")
    for column in ("outputs", "worst RMS", "limit", "worst value", "limit", ""):
        table.add_column(column, justify="right")
    for graph in dict.fromkeys(each.graph for each in report.outcomes):
        of = [each for each in report.outcomes if each.graph == graph]
        limit = report.limits[graph.partition("_")[0]]
        cells = (_worst(of, "rms"), f"{limit.rms:.2g}", _worst(of, "largest"), f"{limit.largest:.2g}")
        table.add_row(graph, str(len(of)), *cells, "ok" if all(each.passed for each in of) else "departs")
    console.print(table)
    source = "the reference backend" if report.source == "reference" else report.source
    console.print(Text(f"errors beside the standard deviation of what {source} computed in fp32", "dim"))
    for kind, limit in report.limits.items():
        console.print(Text(f"limit of {kind}: {limit.reason}", "dim"))
    for line in _lines(report.departure) if report.departure else ():
        console.print(Text(line))
    for what in report.not_covered:
        console.print(Text(f"not covered: {what}"))


def headline(departure: SelftestDeparture) -> str:
    """The first graph that departs and how far, in a line."""
    if departure.refused is not None:
        return departure.refused
    worst = departure.worst
    where = "" if worst is None else f" ({worst.title}{'' if worst.row is None else f', row {worst.row}'})"
    if worst is None or worst.rms is None:
        far = "holds numbers that are not finite"
    else:
        limit = departure.limit
        far = f"departs by {worst.rms:.2g} of the expected deviation (RMS), {worst.rms / limit.rms:.1f} x its limit"
        if worst.rms <= limit.rms:
            far = f"departs by {worst.largest:.2g} of the expected deviation in one value, limit {limit.largest:.2g}"
    return f"{departure.graph}{where} {far}"


def _lines(departure: SelftestDeparture) -> Iterator[str]:
    yield f"first graph that departs: {headline(departure)}; {departure.wrong} of {departure.outputs} outputs are wrong"
    yield from (f"sign: {sign}" for sign in departure.signs)
    yield from (f"known to look like it: {known}" for known in departure.known)
    yield f"compile instead: qwen2vl-tc {departure.instead}"


def _worst(outcomes: list[SelftestOutcome], field: str) -> str:
    worst = max(inf if getattr(each, field) is None else getattr(each, field) for each in outcomes)
    return "not finite" if worst == inf else f"{worst:.2g}"
