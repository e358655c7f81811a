"""How the terminal shows a verification."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .report import Comparison, VerifyReport, number, worst
from .tolerances import INTERMEDIATE_OF_ORIGINAL


def render(report: VerifyReport, console: Console) -> None:
    """Print a row for each case and graph, decode steps together at their worst, and the conclusion."""
    table = Table(title=Text(f"{report.artifact} ({report.dtype}) against transformers fp32 on CPU"))
    for column in ("case", "graph", "max error", "allowed", "rel. RMS", "cosine", "top-1", "verdict"):
        table.add_column(column, justify="left" if column in ("case", "graph", "verdict") else "right", no_wrap=True)
    for (case, graph), group in _grouped(report.comparisons).items():
        cosines = [each.cosine for each in group]
        tops = [each.top1 for each in group if each.top1 is not None]
        wrong = sum(not each.passed for each in group)
        steps = f" x {len(group)}" if group[0].step is not None else ""
        verdict = Text("ok", "green")
        if wrong:
            verdict = Text.assemble(("FAILED", "red"), f" ({wrong} of {len(group)})" if steps else "")
        table.add_row(
            Text(case),
            Text(graph + steps),
            number(worst(each.max_error for each in group)),
            number(min(each.limit for each in group)),
            number(worst(each.relative_rms for each in group)),
            "-" if None in cosines else f"{min(c for c in cosines if c is not None):.7f}",
            f"{sum(tops)}/{len(tops)}" if tops else "",
            verdict,
        )
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(f"tolerance: {report.tolerance.reason}"))
    if report.intermediates and report.dtype != "fp32":
        allowed = f"at most {INTERMEDIATE_OF_ORIGINAL:g} times the error of transformers computing in {report.dtype}"
        console.print(f"intermediates: {report.intermediates} compared, {allowed}", highlight=False)
    # one line whatever the terminal's width: it is what people copy into a report
    console.print(Text(report.conclusion, "green" if report.passed else "red"), soft_wrap=True)


def _grouped(comparisons: Iterable[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for each in comparisons:
        groups.setdefault((each.case, each.graph), []).append(each)
    return groups
