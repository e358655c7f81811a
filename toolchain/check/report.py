"""What `check` found: for people within 80 columns, and as one JSON object."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from .check import ArtifactCheck, GraphCheck, Violation

WIDTH = 80


def as_json(found: ArtifactCheck) -> dict[str, Any]:
    """The check with its verdicts: graphs.NAME.RELEASE has accepted, violations, and remarks, which do not block."""
    return {
        "artifact": found.name,
        "soc": found.soc,
        "dtype": found.dtype,
        "releases": list(found.releases),
        "admitted": list(found.admitted),
        "graphs": {
            graph.graph: {release: _verdict(graph, release) for release in found.releases} for graph in found.graphs
        },
    }


def _verdict(graph: GraphCheck, release: str) -> dict[str, Any]:
    here = [each for each in graph.violations if release in each.releases]
    return {
        "accepted": not graph.refusals(release),
        "violations": [dataclasses.asdict(each) for each in here if each.blocks],
        "remarks": [dataclasses.asdict(each) for each in here if not each.blocks],
    }


def lines(found: ArtifactCheck) -> Iterator[str]:
    """The report for people: a table of graphs and releases, then every violated rule once."""
    yield f"{found.name}: {found.dtype} graphs for {found.soc}"
    yield ""
    wide = max(len(graph.graph) for graph in found.graphs)
    yield " " * wide + "".join(f"{'CANN ' + release:>10}" for release in found.releases)
    for graph in found.graphs:
        words = ("refused" if graph.refusals(release) else "accepted" for release in found.releases)
        yield f"{graph.graph:<{wide}}" + "".join(f"{word:>10}" for word in words)
    for graphs, violation in _merged(found):
        yield ""
        yield from _paragraph(graphs, violation, found.releases)
    yield ""
    yield from textwrap.wrap(_summary(found), WIDTH)


def _summary(found: ArtifactCheck) -> str:
    if found.admitted == found.releases:
        return f"accepted by CANN {', '.join(found.admitted)}, as published sources have it; no device has run this"
    refusing = [release for release in found.releases if release not in found.admitted]
    taken = f"; accepted by {', '.join(found.admitted)}" if found.admitted else ""
    return f"refused by CANN {', '.join(refusing)}{taken}"


def _merged(found: ArtifactCheck) -> list[tuple[list[str], Violation]]:
    """Violations in the releases that were asked for, each once for all graphs that have it; blocking ones first."""
    merged: dict[tuple[str, str], tuple[list[str], Violation]] = {}
    for graph in found.graphs:
        for each in graph.violations:
            if set(each.releases) & set(found.releases):
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
