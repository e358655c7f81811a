"""Each rule of `check`: a node that obeys it, and one that violates it."""

from dataclasses import replace
from typing import Any

import pytest

from qwen2vl_tc.artifacts.cann import RELEASES
from qwen2vl_tc.runtime.ops import OPERATORS, computed
from qwen2vl_tc.runtime.ops.base import TensorSpec
from qwen2vl_tc.runtime.ops.rule import Rule
from qwen2vl_tc.toolchain.check.facts import GraphFacts, NodeFacts
from qwen2vl_tc.toolchain.check.rules import GRAPH, GRAPH_RULES, missing_from, obeyed

FIA, PFA, IFA = "FusedInferAttentionScore", "PromptFlashAttention", "IncreFlashAttention"
RULES = [(name, rule) for name, operator in OPERATORS.items() for rule in operator.rules]
RULES += [(GRAPH, rule) for rule in GRAPH_RULES]
SENTENCES = [(op, rule) for op, rule in RULES if not rule.lists]
LISTS = [(op, rule) for op, rule in RULES if rule.lists]


def t(*shape: int, dtype: str = "bf16") -> TensorSpec:
    return TensorSpec(dtype, shape)


def node(
    op: str, outputs: tuple[TensorSpec, ...] = (), attrs: dict[str, Any] | None = None, **inputs: Any
) -> NodeFacts:
    return NodeFacts(op, inputs, outputs, attrs or {})


def attention(
    op: str = FIA, layout: str = "BSH", heads: int = 16, kv: int = 16, d: int = 80, b: int = 2, q_s: int = 32,
    kv_s: int = 32, dtype: str = "bf16", more: dict[str, Any] | None = None, **attrs: Any,
) -> NodeFacts:  # fmt: skip
    """The vision tower's node in its default form, but for what is named; `more`: inputs that replace or join."""
    names = ("query", "key", "value") if op == PFA else ("query", "key0", "value0")
    tnd = layout == "TND"
    q = t(q_s, heads, d, dtype=dtype) if tnd else t(b, q_s, heads * d, dtype=dtype)
    k = t(kv_s, kv or heads, d, dtype=dtype) if tnd else t(b, kv_s, (kv or heads) * d, dtype=dtype)
    lengths = dict.fromkeys(("actual_seq_lengths", "actual_seq_lengths_kv"), t(b, dtype="int64"))
    return NodeFacts(
        op,
        {**dict(zip(names, (q, k, k), strict=True)), **lengths, **(more or {})},
        (q,),
        {"num_heads": heads, "num_key_value_heads": kv, "input_layout": layout, "inner_precise": 0, **attrs},
    )


def tnd(**changed: Any) -> NodeFacts:
    return attention(layout="TND", **changed)


def rope(x: tuple[int, ...], table: tuple[int, ...], *, sin: tuple[int, ...] | None = None, **more: Any) -> NodeFacts:
    return node("RotaryPositionEmbedding", (t(*x),), x=t(*x), cos=t(*table), sin=t(*(sin or table)), **more)


def mul(x: tuple[int, ...], table: tuple[int, ...]) -> NodeFacts:
    return node("RotaryMul", (t(*x),), x=t(*x), r1=t(*table), r2=t(*table))


def matmul(dtype: str, bias: str | None, x1: tuple[int, ...] = (4, 8)) -> NodeFacts:
    fed = t(16, dtype=bias) if bias else None
    return node(
        "MatMul", (t(4, 16),), {"transpose_x2": True}, x1=t(*x1, dtype=dtype), x2=t(16, 8, dtype=dtype), bias=fed
    )


def norm(op: str, x: tuple[int, ...] = (4, 32), gamma: int = 32, **more: Any) -> NodeFacts:
    first = {"x1": t(*x), "x2": t(*x)} if op.startswith("Add") else {"x": t(*x)}
    beta = {"beta": t(gamma)} if "Layer" in op else {}
    return node(op, (t(*x),), **first, gamma=t(gamma), **beta, **more)


def scatter(indices: TensorSpec, rank: int = 3, **attrs: Any) -> NodeFacts:
    return node("Scatter", (), attrs, var=t(1, 8, 4), indices=indices, updates=t(*(1, 2, 4)[-rank:]))


MASK, CAUSAL = t(1, 64, 64, dtype="bool"), t(2048, 2048, dtype="bool")
LONG = t(5000, dtype="int64")
INDEX = t(1, dtype="int64")
CASES: dict[str, tuple[NodeFacts, NodeFacts]] = {
    "FIA-01": (attention(), tnd()),
    "FIA-02": (tnd(d=192), tnd()),
    "FIA-03": (tnd(d=128), tnd(d=80)),
    "FIA-04": (tnd(), tnd(more={"actual_seq_lengths": LONG})),
    "FIA-05": (tnd(), tnd(d=288)),
    "FIA-06": (tnd(kv=16), tnd(kv=0)),
    "FIA-07": (tnd(), tnd(more={"actual_seq_lengths_kv": None})),
    "FIA-08": (tnd(d=128, more={"atten_mask": MASK}), tnd(more={"atten_mask": MASK})),
    "FIA-10": (attention(d=80), attention(d=72)),
    "FIA-11": (attention(b=65536), attention(b=65537)),
    "FIA-12": (attention(heads=28, kv=4, d=128), attention(heads=28, kv=3, d=128)),
    "FIA-13": (
        attention(sparse_mode=3, more={"atten_mask": CAUSAL}),
        attention(sparse_mode=3, more={"atten_mask": t(1024, 1024, dtype="bool")}),
    ),
    "FIA-14": (attention(q_s=1), attention(q_s=1, sparse_mode=3)),
    "FIA-15": (attention(b=4), attention(b=4, more={"actual_seq_lengths_kv": t(3, dtype="int64")})),
    "FIA-16": (attention(q_s=1, d=512), attention(q_s=1, d=528)),
    "FIA-17": (attention(), attention(dtype="fp32")),
    "FIA-18": (attention(more={"atten_mask": MASK}), attention(more={"atten_mask": t(1, 64, 64)})),
    "FIA-19": (attention(), replace(attention(), attributes={"num_heads": 16, "input_layout": "BNSD"})),
    "FIA-20": (attention(), attention(more={"learnable_sink": None})),
    "FIA-22": (tnd(d=64), tnd(d=80)),
    "FIA-23": (tnd(), attention()),
    "PFA-01": (attention(PFA), attention(PFA, "TND")),
    "PFA-02": (attention(PFA, d=80), attention(PFA, d=84)),
    "PFA-03": (
        attention(PFA, more={"atten_mask": t(1, 32, 32, dtype="bool")}),
        attention(PFA, more={"atten_mask": t(1, 32, 16, dtype="bool")}),
    ),
    "PFA-04": (attention(PFA), attention(PFA, heads=272, kv=272, d=16)),
    "PFA-05": (
        attention(PFA, more={"atten_mask": MASK}),
        attention(PFA, more={"atten_mask": t(1, 65536, 65536, dtype="bool")}),
    ),
    "PFA-08": (attention(PFA, b=4), attention(PFA, b=4, more={"actual_seq_lengths": t(3, dtype="int64")})),
    "IFA-01": (attention(IFA, q_s=1), attention(IFA, q_s=2)),
    "IFA-02": (
        attention(IFA, q_s=1, b=4),
        attention(IFA, q_s=1, b=4, more={"actual_seq_lengths": t(3, dtype="int64")}),
    ),
    "ROT-01": (mul((1, 8, 2, 128), (1, 8, 1, 128)), mul((1, 8, 2, 80), (1, 8, 1, 80))),
    "ROT-02": (mul((1, 5000, 2, 128), (1, 5000, 1, 128)), mul((1000, 1, 2, 128), (1000, 1, 1, 128))),
    "ROT-03": (mul((1, 8, 2, 128), (1, 8, 1, 128)), mul((1, 8, 2, 128), (1, 8, 1, 64))),
    "RPE-01": (rope((1, 8, 16, 80), (1, 8, 1, 80)), rope((1, 8, 16, 81), (1, 8, 1, 81))),
    "RPE-02": (rope((1, 8, 16, 80), (1, 8, 1, 80)), rope((1, 8, 16, 80), (1, 1, 1, 80))),
    "RPE-03": (rope((1, 8, 16, 80), (1, 8, 1, 80)), rope((1, 8, 16, 80), (1, 8, 1, 80), rotate=None)),
    "RPE-04": (rope((1, 65536, 16, 80), (1, 65536, 1, 80)), rope((1000, 4, 16, 80), (1000, 4, 1, 80))),
    "RPE-05": (rope((4, 8, 16, 80), (1, 8, 1, 80)), rope((4, 8, 16, 80), (2, 8, 1, 80))),
    "MM-01": (matmul("bf16", "fp32"), matmul("bf16", "bf16")),
    "MM-02": (matmul("bf16", None), matmul("bf16", None, x1=(4, 9))),
    "MM-03": (matmul("bf16", "fp32"), matmul("bf16", "fp16")),
    "MM-04": (matmul("fp16", "fp32"), matmul("fp32", "fp16")),
    "LN-01": (
        norm("LayerNormV4", normalized_shape=t(1, dtype="int32")),
        norm("LayerNormV4", normalized_shape=t(1, dtype="int64")),
    ),
    "LN-02": (norm("LayerNormV4"), norm("LayerNormV4", gamma=16)),
    "ALN-01": (norm("AddLayerNorm"), norm("AddLayerNorm", x=(0, 32))),
    "RN-01": (norm("RmsNorm"), norm("RmsNorm", x=(0, 32))),
    "RN-02": (norm("AddRmsNorm"), norm("AddRmsNorm", gamma=16)),
    "SWI-01": (node("SwiGlu", x=t(4, 32)), node("SwiGlu", x=t(4, 33))),
    "GELU-01": (
        node("GeluV2", attrs={"approximate": "none"}, x=t(4)),
        node("GeluV2", attrs={"approximate": "erf"}, x=t(4)),
    ),
    "SC-01": (scatter(INDEX), scatter(t(1, 2, 1, dtype="int64"))),
    "SC-03": (
        node("ScatterNdUpdate", var=t(8, 4), indices=t(2, 1, dtype="int64"), updates=t(2, 4)),
        node("ScatterNdUpdate", var=t(8, 4), indices=t(2, 3, dtype="int64"), updates=t(2, 4)),
    ),
    "RS-01": (
        node("Reshape", x=t(6), shape=TensorSpec("int64", (2,), (-1, 2))),
        node("Reshape", x=t(6), shape=TensorSpec("int64", (2,), (-1, -1))),
    ),
    "GR-02": (
        NodeFacts(GRAPH, {}, graph=GraphFacts(frozenset({FIA}), static=True, tiling_schedule=True)),
        NodeFacts(GRAPH, {}, graph=GraphFacts(frozenset({FIA}), static=False, tiling_schedule=True)),
    ),
    "SEL-01": (
        node("SelectV2", condition=t(1, dtype="bool"), then=t(1), **{"else": t(1)}),
        node("SelectV2", condition=t(1, dtype="int8"), then=t(1), **{"else": t(1)}),
    ),
    "RA-01": (
        node("ReduceAll", x=t(1, 8, dtype="bool"), axes=t(1, dtype="int64")),
        node("ReduceAll", x=t(1, 8, dtype="bool"), axes=t(1, 1, dtype="int64")),
    ),
    "ACM-01": (
        node("Addcmul", input_data=t(4), x1=t(4), x2=t(4), value=t()),
        node("Addcmul", input_data=t(4), x1=t(4), x2=t(4), value=t(dtype="fp32")),
    ),
    "SP-01": (
        NodeFacts("SplitV", {"x": t(4)}, constants=frozenset({"size_splits", "split_dim"})),
        NodeFacts("SplitV", {"x": t(4)}, constants=frozenset({"size_splits"})),
    ),
    "GA-01": (
        NodeFacts("GatherV2", {"axis": INDEX}, constants=frozenset({"axis"})),
        NodeFacts("GatherV2", {"axis": INDEX}),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("op", "rule"), SENTENCES, ids=[rule.id for _, rule in SENTENCES])
def test_a_node_obeys_each_rule_and_another_violates_it(op: str, rule: Rule) -> None:
    obeying, violating = CASES[rule.id]
    assert op == obeying.op == violating.op
    assert obeyed(rule, obeying)
    assert not obeyed(rule, violating)


def listed(op: str, rule: Rule, row: str) -> NodeFacts:
    """A node with the dtypes of one row of a library."""
    inputs: dict[str, TensorSpec | None] = {}
    outputs: dict[int, TensorSpec] = {}
    for fact, dtype in zip(rule.require[1], row.split(), strict=True):
        side, key, what = fact.split(".")
        assert what == "dtype"
        if side == "in":
            inputs[key] = t(2, dtype=dtype)
        else:
            outputs[int(key)] = t(2, dtype=dtype)
    return NodeFacts(op, inputs, tuple(outputs[i] for i in sorted(outputs)))


@pytest.mark.parametrize(("op", "rule"), LISTS, ids=[rule.id for _, rule in LISTS])
def test_dtypes_that_a_library_lists_are_taken_and_others_are_not(op: str, rule: Rule) -> None:
    for row in rule.require[2]:
        assert obeyed(rule, listed(op, rule, row)), row
    facts = listed(op, rule, rule.require[2][0])
    first = next(iter(facts.inputs))
    assert not obeyed(rule, replace(facts, inputs={**facts.inputs, first: t(2, dtype="complex64")}))
    assert not obeyed(rule, replace(facts, inputs={**facts.inputs, first: None}))


def test_every_rule_says_what_to_do_and_where_it_was_read() -> None:
    for _, rule in RULES:
        assert rule.rule and rule.fix and rule.source.repository and rule.source.ref and rule.source.path, rule.id
        assert rule.releases, rule.id


def test_the_operators_that_this_toolchain_knows_are_listed_from_8_1_on() -> None:
    assert {op: missing_from(op) for op in computed()} == dict.fromkeys(computed(), ("8.0",))
    assert missing_from("Erf") == RELEASES


@pytest.mark.parametrize(
    ("op", "row"),
    [
        ("IsFinite", "bf16 bool"),
        ("ReduceAll", "bool int64 bool"),
        ("SelectV2", "bool int64 int64 int64"),
        ("Addcmul", "bf16 bf16 bf16 bf16 bf16"),
        ("RotaryPositionEmbedding", "bf16 bf16 bf16 bf16"),
        ("Cast", "uint8 bf16"),
        ("Cast", "uint8 fp16"),
    ],
)
def test_what_the_graphs_end_with_is_listed_in_the_dtypes_that_they_use(op: str, row: str) -> None:
    (rule,) = (rule for rule in OPERATORS[op].rules if rule.lists)
    assert obeyed(rule, listed(op, rule, row))
