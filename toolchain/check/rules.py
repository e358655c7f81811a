"""The rules, from rules.json: what each CANN release takes, one entry each with the source that says so."""

import functools
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ...artifacts.cann import RELEASES
from ...artifacts.errors import ArtifactError
from ...artifacts.schema import from_plain, parse_json
from .predicate import Lookup, holds

# refused: the release does not take the node. crash: the host process may end. wrong: taken, with a result that may be
# wrong. unproven: no source says that it is taken, and evidence may. All of these keep a release from being admitted.
BLOCKING = ("refused", "crash", "wrong", "unproven")
# undocumented: the code takes it, the documentation does not say so. cost: taken, with a cost that can be avoided.
REMARKS = ("undocumented", "cost")
# The operator of rules about a graph as a whole.
GRAPH = "@graph"


@dataclass(frozen=True)
class Source:
    """Where a rule was read."""

    repository: str
    ref: str
    path: str


@dataclass(frozen=True)
class Rule:
    """What `releases` ask of an operator: wherever `applies` holds, `require` must. inserts: the operator that CANN
    adds for each node that violates it."""

    id: str
    op: str
    rule: str
    applies: Any
    require: Any
    releases: tuple[str, ...]
    severity: str
    fix: str
    inserts: str | None
    source: Source

    @property
    def lists(self) -> bool:
        """Whether it says with which dtypes the operator is in the releases' library."""
        return isinstance(self.require, list) and self.require[0] == "row"

    def obeyed(self, look: Lookup) -> bool:
        """Whether a node with the facts that `look` finds obeys it."""
        return not holds(self.applies, look) or holds(self.require, look)


@dataclass(frozen=True)
class RuleSet:
    """The rules, and the value of an attribute that a node does not write, by operator."""

    defaults: dict[str, dict[str, Any]]
    rules: tuple[Rule, ...]

    @functools.cached_property
    def by_op(self) -> dict[str, tuple[Rule, ...]]:
        found: dict[str, list[Rule]] = {}
        for rule in self.rules:
            found.setdefault(rule.op, []).append(rule)
        return {op: tuple(rules) for op, rules in found.items()}

    def missing_from(self, op: str) -> tuple[str, ...]:
        """Releases of which no rule says that they have the operator."""
        listed = {release for rule in self.by_op.get(op, ()) if rule.lists for release in rule.releases}
        return tuple(release for release in RELEASES if release not in listed)


@functools.cache
def rule_set() -> RuleSet:
    """The rules of this package. Raises ArtifactError where the file is damaged."""
    where = "toolchain/check/rules.json"
    found = from_plain(RuleSet, parse_json(files(__package__).joinpath("rules.json").read_bytes(), where), where)
    ids = [rule.id for rule in found.rules]
    for rule in found.rules:
        if rule.severity not in (*BLOCKING, *REMARKS) or not set(rule.releases) <= set(RELEASES):
            raise ArtifactError(f"{where}: {rule.id}: unknown severity or release; install qwen2vl-tc again")
        if ids.count(rule.id) > 1:
            raise ArtifactError(f"{where}: {rule.id} appears twice; install qwen2vl-tc again")
    return found
