"""`check`: every node of every graph against the rules, at the smallest and the largest sizes of the artifact."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...artifacts.cann import RELEASES
from ...artifacts.errors import ToolchainError
from ...artifacts.ge.binding import Binding, binding_from_bytes
from ...artifacts.ge.graph import GeGraph, Node, read_graph
from ...artifacts.soc import soc_family
from ...artifacts.store import ge_part, open_artifact
from ...runtime.backends.ge.checks import check_binding
from ...runtime.backends.ge.checks import check_graph as check_structure
from ...runtime.models import config_of, graphs_of, spec_of
from ...runtime.models.base import GraphSpec
from ...runtime.models.config import ModelConfig
from ...runtime.ops import known
from ...runtime.ops.base import DATA, Specs
from ...runtime.ops.rule import BLOCKING, Rule, Source
from ..inspect.cost import input_specs
from ..inspect.shapes import live_nodes, propagate
from .attributes import nonsense
from .facts import GraphFacts, NodeFacts, graph_facts, node_facts
from .rules import GRAPH, GRAPH_RULES, missing_from, obeyed
from .sizes import extremes

# Whose libraries and host code the rules were read from.
FAMILIES = ("Ascend910B", "Ascend910_93")


@dataclass(frozen=True)
class Violation:
    """A rule that nodes of one graph violate, in `releases`; sizes: the first at which. source: None where what is
    missing is a rule."""

    rule: str
    severity: str
    reason: str
    nodes: tuple[str, ...]
    sizes: str
    releases: tuple[str, ...]
    fix: str
    source: Source | None

    @property
    def blocks(self) -> bool:
        """Whether it keeps the graph from being admitted."""
        return self.severity in BLOCKING


@dataclass(frozen=True)
class GraphCheck:
    """What the rules say of one graph."""

    graph: str
    nodes: int
    violations: tuple[Violation, ...]

    def refusals(self, release: str) -> tuple[Violation, ...]:
        """Why the release does not admit the graph; none if it does."""
        return tuple(each for each in self.violations if each.blocks and release in each.releases)


@dataclass(frozen=True)
class ArtifactCheck:
    """What the rules say of an artifact's graphs, for the releases that were asked for."""

    name: str
    soc: str
    dtype: str
    releases: tuple[str, ...]
    graphs: tuple[GraphCheck, ...]

    @property
    def admitted(self) -> tuple[str, ...]:
        return admitted(self.graphs, self.releases)


def admitted(graphs: Iterable[GraphCheck], releases: Iterable[str] = RELEASES) -> tuple[str, ...]:
    """The releases whose rules every node of every graph obeys."""
    checked = tuple(graphs)
    return tuple(release for release in releases if not any(graph.refusals(release) for graph in checked))


def check_artifact(path: Path, releases: tuple[str, ...] = RELEASES) -> ArtifactCheck:
    """Check the GE graphs of an artifact; they are compared with their hashes, weights are not read.

    Raises ArtifactError if it is none, is damaged, or has no graphs.
    """
    with open_artifact(path) as artifact:
        manifest = artifact.manifest
        part = ge_part(manifest, path)
        graphs, config = [], config_of(manifest)
        specs = graphs_of(config, part)
        for graph in part.graphs:
            where = f"{artifact.path}: {graph.graph.path}"
            bound = f"{artifact.path}: {graph.binding.path}"
            binding = binding_from_bytes(artifact.read(graph.binding), bound)
            check_binding(binding, spec_of(specs, graph.name, str(path)), part, bound)
            parsed = read_graph(artifact.read(graph.graph), where)
            check_structure(parsed, binding, where)
            graphs.append(check_graph(parsed, binding, config, specs[graph.name], part.max_length, part.soc, where))
        return ArtifactCheck(manifest.name, part.soc, part.dtype, releases, tuple(graphs))


def check_graph(
    graph: GeGraph, binding: Binding, config: ModelConfig, spec: GraphSpec, max_length: int, soc: str, where: str
) -> GraphCheck:
    """Check one graph for a SoC, at both ends of the sizes that prompts of up to `max_length` tokens and pictures of up
    to 65,536 patches give it."""
    by_rule: dict[str, Violation] = {}
    nodes = [node for node in live_nodes(graph) if known(node.op).kind != DATA]
    if soc_family(soc) not in FAMILIES:
        have = " and ".join(FAMILIES)
        _add(by_rule, _unproven("no rules", f"the rules are of {have}, and not of {soc}", "ask CANN on the device"), [])
    _add_unknown(by_rule, nodes)
    for name, attribute, problem in nonsense(nodes):
        rule = replace(_unproven(f"nonsense, {attribute}", problem, "compile the artifact again"), severity="refused")
        _add(by_rule, rule, [name])
    if any(each.severity == "refused" for each in by_rule.values()):
        # the rules compare and divide what makes sense
        return GraphCheck(binding.graph, len(nodes), tuple(by_rule.values()))
    facts = graph_facts(graph, binding)
    for title, lengths in extremes(spec, config, max_length):
        try:
            specs = propagate(graph, input_specs(binding, spec, config, lengths), where)
        except ToolchainError as error:
            _add(by_rule, _unproven("no sizes", str(error), "compile the artifact again"), [], sizes=title)
            continue
        for rule, node in violations(graph, specs, facts):
            _add(by_rule, rule, [node.name] if node else [], rule.releases, title)
    return GraphCheck(binding.graph, len(nodes), tuple(by_rule.values()))


def violations(graph: GeGraph, specs: Mapping[str, Specs], about: GraphFacts) -> Iterator[tuple[Rule, Node | None]]:
    """Every rule that a node violates, with None for the node where the graph does. specs: of every live node."""
    for rule in GRAPH_RULES:
        if not obeyed(rule, NodeFacts(GRAPH, {}, graph=about)):
            yield rule, None
    nodes = live_nodes(graph)
    constants = frozenset(node.name for node in nodes if node.constant is not None)
    # layers repeat each other: a node like one before it needs no second look
    seen: dict[tuple[object, ...], tuple[Rule, ...]] = {}
    for node in nodes:
        rules = known(node.op).rules
        if not rules:
            continue
        facts = node_facts(node, specs, constants, about)
        key = (node.op, *facts.inputs.items(), facts.outputs, repr(facts.attributes), facts.constants)
        if key not in seen:
            seen[key] = tuple(rule for rule in rules if not obeyed(rule, facts))
        for rule in seen[key]:
            yield rule, node


def inserted(graph: GeGraph, binding: Binding, specs: Mapping[str, Specs]) -> dict[str, int]:
    """How many operators of which type CANN adds to the graph, by the rules; at most, over the releases."""
    counts: dict[str, dict[str, int]] = {}
    for rule, _ in violations(graph, specs, graph_facts(graph, binding)):
        for release in rule.releases if rule.inserts else ():
            types = counts.setdefault(release, {})
            types[str(rule.inserts)] = types.get(str(rule.inserts), 0) + 1
    return max(counts.values(), key=lambda types: sum(types.values()), default={})


def _add_unknown(by_rule: dict[str, Violation], nodes: list[Node]) -> None:
    """Operators of which no rule says that a release has them: one violation for those that the same releases lack."""
    lacking: dict[tuple[str, ...], dict[str, None]] = {}
    for node in nodes:
        if releases := missing_from(node.op):
            lacking.setdefault(releases, {})[node.op] = None
    for releases, ops in lacking.items():
        rule = _unproven(
            f"no rule, {', '.join(releases)}",
            f"no rule says that the release has {', '.join(ops)}",
            "use another release" if len(releases) < len(RELEASES) else "use another operator, or another form",
        )
        _add(by_rule, rule, [node.name for node in nodes if node.op in ops], releases)


def _unproven(rule: str, reason: str, fix: str) -> Rule:
    return Rule(rule, reason, "(true)", fix, Source("", "", ""), severity="unproven")


def _add(
    by_rule: dict[str, Violation], rule: Rule, nodes: list[str], releases: tuple[str, ...] = RELEASES, sizes: str = ""
) -> None:
    before = by_rule.get(rule.id)
    if before is None:
        source = rule.source if rule.source.path else None
        by_rule[rule.id] = Violation(rule.id, rule.severity, rule.rule, tuple(nodes), sizes, releases, rule.fix, source)
    elif new := tuple(name for name in nodes if name not in before.nodes):
        by_rule[rule.id] = Violation(**{**vars(before), "nodes": (*before.nodes, *new)})
