"""What each CANN release takes: the operators' own rules, and those of a graph as a whole."""

from ...artifacts.cann import RELEASES
from ...runtime.ops import known
from ...runtime.ops.rule import Rule, ge
from .predicate import Lookup, holds

# The operator of rules about a graph as a whole.
GRAPH = "@graph"
GRAPH_RULES = (
    Rule(
        "GR-02",
        "the tiling option has an effect only on a graph of fixed sizes whose attention is registered "
        "for tiling on the device",
        "(and graph.static (not (hasop PromptFlashAttention)))",
        "ask for it on decode graphs only",
        ge("9.1.0", "compiler/graph/partition/dynamic_shape_partition.cc"),
        applies="graph.tiling_schedule",
        severity="cost",
    ),
)


def obeyed(rule: Rule, look: Lookup) -> bool:
    """Whether a node with the facts that `look` finds obeys the rule."""
    return not holds(rule.applies, look) or holds(rule.require, look)


def missing_from(op: str) -> tuple[str, ...]:
    """Releases of which no rule says that they have the operator."""
    listed = {release for rule in known(op).rules if rule.lists for release in rule.releases}
    return tuple(release for release in RELEASES if release not in listed)
