"""What `check` found: for people within 80 columns, and as one JSON object."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from .check import ArtifactCheck, GraphCheck, Violation

WIDTH = 80


def as_json(check: ArtifactCheck) -> dict[str, Any]:
    """The check with its verdicts: graphs.NAME.RELEASE has accepted, violations, and remarks, which do not block."""
    return {
        "artifact": check.name,
        "soc": check.soc,
        "dtype": check.dtype,
        "releases": list(check.releases),
        "admitted": list(check.admitted),
        "graphs": {
            graph.graph: {release: _verdict(graph, release) for release in check.releases} for graph in check.graphs
        },
    }


def _verdict(graph: GraphCheck, release: str) -> dict[str, Any]:
    here = [each for each in graph.violations if release in each.releases]
    return {
        "accepted": not graph.refusals(release),
        "violations": [dataclasses.asdict(each) for each in here if each.blocks],
        "remarks": [dataclasses.asdict(each) for each in here if not each.blocks],
    }


def lines(check: ArtifactCheck) -> Iterator[str]:
    """The report for people: a table of graphs and releases, then every violated rule once."""
    yield f"{check.name}: {check.dtype} graphs for {check.soc}"
    yield ""
    wide = max(len(graph.graph) for graph in check.graphs)
    yield " " * wide + "".join(f"{'CANN ' + release:>10}" for release in check.releases)
    for graph in check.graphs:
        words = ("refused" if graph.refusals(release) else "accepted" for release in check.releases)
        yield f"{graph.graph:<{wide}}" + "".join(f"{word:>10}" for word in words)
    for graphs, violation in _merged(check):
        yield ""
        yield from _paragraph(graphs, violation, check.releases)
    yield ""
    yield from textwrap.wrap(_summary(check), WIDTH)


def _summary(check: ArtifactCheck) -> str:
    if check.admitted == check.releases:
        return f"accepted by CANN {', '.join(check.admitted)}, as published sources have it; no device has run this"
    refusing = [release for release in check.releases if release not in check.admitted]
    taken = f"; accepted by {', '.join(check.admitted)}" if check.admitted else ""
    return f"refused by CANN {', '.join(refusing)}{taken}"


def _merged(check: ArtifactCheck) -> list[tuple[list[str], Violation]]:
    """Violations in the releases that were asked for, each once for all graphs that have it; blocking ones first."""
    merged: dict[tuple[str, str], tuple[list[str], Violation]] = {}
    for graph in check.graphs:
        for each in graph.violations:
            if set(each.releases) & set(check.releases):
                merged.setdefault((each.rule, each.reason), ([], each))[0].append(graph.graph)
    return sorted(merged.values(), key=lambda item: not item[1].blocks)


def _paragraph(graphs: list[str], violation: Violation, releases: tuple[str, ...]) -> Iterator[str]:
    named = ", ".join(release for release in releases if release in violation.releases)
    kind = violation.severity if violation.blocks else f"remark, {violation.severity}"
    yield from _field(f"{violation.rule}: {kind}, CANN {named}", "")
    yield from _field("why", violation.reason)
    where = ", ".join(graphs)
    if violation.nodes:
        more = len(violation.nodes) - 1
        where += f": {violation.nodes[0]}" + (f" and {more} more" if more else "")
    yield from _field("where", where + (f"; {violation.sizes}" if violation.sizes else ""))
    yield from _field("do", violation.fix)
    if violation.source:
        yield from _field("source", f"{violation.source.repository} {violation.source.ref} {violation.source.path}")


def _field(name: str, text: str) -> list[str]:
    if not text:
        return textwrap.wrap(name, WIDTH)
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {name:<7}", subsequent_indent=" " * 9)
