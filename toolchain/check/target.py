"""What `compile` asks of the rules: heads that no release takes, before it traces; releases that must admit, after."""

from collections.abc import Iterable

from ...artifacts.cann import RELEASES
from ...artifacts.errors import TargetError
from ...runtime.models.config import ModelConfig
from ...runtime.ops import OPERATORS
from ...runtime.ops.base import TensorSpec
from ...runtime.ops.rule import BLOCKING, Rule
from .check import GraphCheck, admitted
from .facts import NodeFacts
from .rules import missing_from, obeyed

_FUSED = "FusedInferAttentionScore"
# What the language model attends with where a row has several tokens, by set of operators.
_PREFILL = {"fused": _FUSED, "recipe": "PromptFlashAttention"}


def check_head_dims(config: ModelConfig, dtype: str, operators: str, visual_layout: str) -> None:
    """Raises TargetError with the rule's sentence for heads of a width that no release takes.

    dtype fp32 is for CPU, where every width of a head is taken.
    """
    if dtype == "fp32":
        return
    vision, text = config.vision, config.text
    for which, width, facts in (
        (
            "the vision tower",
            vision.head_dim,
            _attention(_FUSED, dtype, visual_layout, vision.num_heads, vision.num_heads, vision.head_dim),
        ),
        (
            "the language model",
            text.head_dim,
            _attention(_PREFILL[operators], dtype, "BSH", text.num_heads, text.num_kv_heads, text.head_dim),
        ),
    ):
        refused = _refused_everywhere(facts)
        if refused is not None:
            raise TargetError(
                f"{which} has heads of {width} columns, and no CANN takes them: {refused.rule} ({refused.id}); "
                f"{refused.fix}, or compile with --dtype fp32 for CPUs"
            )


def _attention(op: str, dtype: str, layout: str, heads: int, kv_heads: int, width: int) -> NodeFacts:
    """Two tokens that attend to each other, without a mask."""

    def tensor(count: int) -> TensorSpec:
        return TensorSpec(dtype, (2, count, width) if layout == "TND" else (1, 2, count * width))

    names = ("query", "key0", "value0") if op == _FUSED else ("query", "key", "value")
    lengths = TensorSpec("int64", (1,))
    inputs = dict(zip(names, (tensor(heads), tensor(kv_heads), tensor(kv_heads)), strict=True))
    return NodeFacts(
        op,
        {**inputs, "actual_seq_lengths": lengths, "actual_seq_lengths_kv": lengths},
        (tensor(heads),),
        {"num_heads": heads, "num_key_value_heads": kv_heads, "input_layout": layout, "inner_precise": 0},
    )


def _refused_everywhere(facts: NodeFacts) -> Rule | None:
    """The rule that refuses a node in most releases, where every release has one that does."""
    refusing = [rule for rule in OPERATORS[facts.op].rules if rule.severity == "refused" and not obeyed(rule, facts)]
    known = set(RELEASES) - set(missing_from(facts.op))
    if not known <= {release for rule in refusing for release in rule.releases}:
        return None
    return max(refusing, key=lambda rule: len(rule.releases))


def require_admitted(graphs: Iterable[GraphCheck], releases: Iterable[str]) -> None:
    """Raises TargetError with the sentence of a violated rule for a release that does not admit every graph."""
    checked = tuple(graphs)
    taken = admitted(checked)
    for release in releases:
        if release in taken:
            continue
        refusing = [(graph, why) for graph in checked for why in graph.refusals(release)]
        # the plainest reason: a refusal says more than a want of proof
        graph, why = min(refusing, key=lambda item: BLOCKING.index(item[1].severity))
        node = f" {why.nodes[0]}" if why.nodes else ""
        others = f"; CANN {', '.join(taken)} admits them" if taken else ""
        raise TargetError(
            f"--cann {release}: CANN {release} does not admit the graphs: {graph.graph}{node}: {why.reason} "
            f"({why.rule}, {why.severity}); {why.fix}{others}"
        )
