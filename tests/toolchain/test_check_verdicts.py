"""The rules and the default graphs' attention against CANN's own host code: tests/data/tiling_verdicts.tsv.

A row says what the tiling code of a release, built from its published sources and run, made of one node: a and g are
the tower in TND, b in BSH, c is prefill with the compressed causal mask, d is decode.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.synthetic import published

from qwen2vl_tc.artifacts.cann import cann_release
from qwen2vl_tc.artifacts.ge.binding import binding_from_bytes
from qwen2vl_tc.artifacts.ge.graph import read_graph
from qwen2vl_tc.artifacts.store import ge_part, open_artifact
from qwen2vl_tc.runtime.models import config_of, graphs_of
from qwen2vl_tc.runtime.ops import OPERATORS, known
from qwen2vl_tc.runtime.ops.base import TensorSpec
from qwen2vl_tc.runtime.ops.rule import BLOCKING
from qwen2vl_tc.toolchain.check.facts import NodeFacts, graph_facts, node_facts
from qwen2vl_tc.toolchain.check.rules import obeyed
from qwen2vl_tc.toolchain.check.sizes import pictures, prompt
from qwen2vl_tc.toolchain.inspect.cost import Lengths, input_specs
from qwen2vl_tc.toolchain.inspect.shapes import live_nodes, propagate

FIA = "FusedInferAttentionScore"
# heads, key heads
MODELS = {"2B": (12, 2), "7B": (28, 4), "72B": (64, 8)}
_TABLE = [
    line.split("\t")
    for line in (Path(__file__).parents[1] / "data" / "tiling_verdicts.tsv").read_text("utf-8").splitlines()
]
RELEASES = tuple(str(cann_release(version)) for version in _TABLE[0][1:])
VERDICTS = {name: dict(zip(RELEASES, verdicts, strict=True)) for name, *verdicts in _TABLE[1:]}
TEXT = 128


@dataclass(frozen=True)
class Form:
    """One attention node as the rows tell nodes apart: all but the number of rows and of tokens."""

    kind: str
    dtype: str
    heads: int
    kv_heads: int
    d: int
    sparse_mode: int
    masked: bool


def node(form: Form, b: int, q_s: int, kv_s: int, lengths: int | None) -> NodeFacts:
    """The node of a form at a size; `lengths`: how many lengths of keys, and in the tower of queries, are fed."""
    tnd = form.kind == "TND"
    kv = form.kv_heads or form.heads
    query = TensorSpec(form.dtype, (q_s, form.heads, form.d) if tnd else (b, q_s, form.heads * form.d))
    key = TensorSpec(form.dtype, (kv_s, kv, form.d) if tnd else (b, kv_s, kv * form.d))
    fed = None if lengths is None else TensorSpec("int64", (lengths,))
    return NodeFacts(
        FIA,
        {
            "query": query,
            "key0": key,
            "value0": key,
            "atten_mask": TensorSpec("bool", (2048, 2048)) if form.masked else None,
            "actual_seq_lengths": fed if form.kind in ("TND", "visual") else None,
            "actual_seq_lengths_kv": fed,
        },
        (query, TensorSpec("fp32", (1,))),
        {
            "num_heads": form.heads,
            "num_key_value_heads": form.kv_heads,
            "input_layout": "TND" if tnd else "BSH",
            "sparse_mode": form.sparse_mode,
            "inner_precise": 0,
        },
    )


def row_node(name: str) -> tuple[Form, int, int, int, NodeFacts]:
    """A row's node: its form, rows, tokens and keys of a row, and facts."""
    kind, *parts = name.split(".")
    sizes = {m[1]: int(m[2]) for part in parts if (m := re.fullmatch(r"(kvheads|kv|seg|[BSDLN])(\d+)", part))}
    dtype = next(part for part in parts if part in ("bf16", "fp16"))
    if kind in ("a", "g"):
        form = Form("TND", dtype, 16, sizes.get("kv", 0), sizes["D"], 0, False)
        return form, 1, sizes["N"], sizes["N"], node(form, 1, sizes["N"], sizes["N"], sizes["seg"])
    if kind == "b":
        form = Form("visual", dtype, 16, sizes.get("kvheads", 0), sizes["D"], 0, False)
        rows, tokens = sizes["B"], sizes["S"]
        return form, rows, tokens, tokens, node(form, rows, tokens, tokens, rows if "lens" in parts else None)
    heads, kv_heads = MODELS[parts[0]]
    length, rows, tokens = sizes.get("L", 8192), sizes.get("B", 1), sizes.get("S", 1)
    sparse = "sparse3mask" in parts
    masked = (kind == "c" and "nomask" not in parts) or sparse
    form = Form("prefill" if kind == "c" else "decode", dtype, heads, kv_heads, TEXT, 3 * masked, masked)
    if "nomask" in parts:
        form = Form("prefill", dtype, heads, kv_heads, TEXT, 3, False)
    facts = node(form, rows, tokens, length, 3 if "threelens" in parts else rows)
    if "fp16mask" in parts:
        facts = NodeFacts(
            FIA, {**facts.inputs, "atten_mask": TensorSpec("fp16", (2048, 2048))}, facts.outputs, facts.attributes
        )
    return form, rows, tokens, length, facts


def refused_by_rules(facts: NodeFacts, release: str) -> set[str]:
    return {
        rule.id
        for rule in OPERATORS[FIA].rules
        if release in rule.releases and rule.severity in BLOCKING and not obeyed(rule, facts)
    }


# Stricter than the code: 9.1 takes one token with the causal mask, 8.5 and 9.0 do not, and prefill never runs one.
STRICTER = {"FIA-14"}


@pytest.mark.parametrize("release", RELEASES)
def test_the_rules_take_what_canns_own_code_takes_and_nothing_else(release: str) -> None:
    taken, refused = 0, 0
    for name, verdicts in VERDICTS.items():
        if name.startswith("b.") and name.split(".")[3] == "B65537":
            # one release takes a row more than is documented
            continue
        found = refused_by_rules(row_node(name)[-1], release)
        if verdicts[release] == "accept":
            taken += 1
            assert not found - STRICTER, name
        else:
            refused += 1
            assert found, name
    assert taken > 80 and refused > 3


@dataclass(frozen=True)
class Attention:
    """One attention node of a graph at one size."""

    form: Form
    b: int
    q_s: int
    kv_s: int


def covered(found: Attention) -> bool:
    """Whether the rows show that every release takes the node.

    Rules of coverage, beside a row of the very node: the code bounds rows and tokens each by itself (FIA-10, FIA-11),
    so accepted rows of a form cover the sizes between them, where no row of it is refused; lengths of the tower's rows
    and num_key_value_heads written change no verdict in BSH (rows .lens and .kvheads16). Prefill and decode have rows
    of their own sizes.
    """
    # the rows of the tower leave num_key_value_heads at 0, which means num_heads in BSH
    forms = {found.form, replace(found.form, kv_heads=0) if found.form.kind == "visual" else found.form}
    sizes = []
    for name, verdicts in VERDICTS.items():
        form, b, q_s, kv_s, _ = row_node(name)
        if form in forms:
            sizes.append((b, q_s, kv_s, all(verdict == "accept" for verdict in verdicts.values())))
    if (found.b, found.q_s, found.kv_s, True) in sizes:
        return True
    accepted = [size for size in sizes if size[3]]
    if found.form.kind != "visual" or found.q_s != found.kv_s or not accepted:
        return False
    between = all(
        min(size[axis] for size in accepted) <= value <= max(size[axis] for size in accepted)
        for axis, value in enumerate((found.b, found.q_s))
    )
    return between and not any(b <= found.b and q_s <= found.q_s for b, q_s, _, taken in sizes if not taken)


TOWER = Form("visual", "bf16", 16, 16, 80, 0, False)


@pytest.mark.parametrize("size", [(1, 4), (1, 1872), (1, 65536), (16384, 4), (35, 1872), (2, 936), (65536, 4)])
def test_the_towers_node_is_covered_at_every_size(size: tuple[int, int]) -> None:
    assert covered(Attention(TOWER, *size, size[1]))


@pytest.mark.parametrize(
    "found",
    [
        Attention(Form("TND", "bf16", 16, 0, 80, 0, False), 1, 1872, 1872),
        Attention(Form("TND", "bf16", 16, 16, 80, 0, False), 1, 1872, 1872),
        Attention(Form("visual", "bf16", 16, 16, 72, 0, False), 1, 1872, 1872),
        Attention(Form("visual", "fp32", 16, 16, 80, 0, False), 1, 1872, 1872),
        Attention(TOWER, 65537, 4, 4),
        Attention(TOWER, 1, 65540, 65540),
        Attention(Form("prefill", "bf16", 28, 4, 128, 3, True), 1, 1, 8192),
        Attention(Form("prefill", "bf16", 28, 4, 128, 3, True), 1, 5, 8192),
        Attention(Form("decode", "bf16", 20, 4, 128, 0, False), 1, 1, 8192),
    ],
)
def test_what_no_row_shows_is_not_covered(found: Attention) -> None:
    assert not covered(found)


def sizes_of(graph: str) -> Iterator[tuple[str, Lengths]]:
    """Pictures of 4, 1872 and 65,536 patches, several of one size, and the longest of different sizes; prompts of 2,
    367 and 8192 tokens; every step of decode."""
    if graph == "visual":
        for segments, patches in ((1, 4), (1, 1872), (1, 65536), (2, 936), (35, 1872), (16384, 4)):
            yield f"{segments} x {patches}", pictures(segments, patches)
    elif graph == "prefill":
        for tokens in (2, 367, 8192):
            yield f"{tokens}", prompt(tokens, 1)
    else:
        yield "a step", prompt(2, 1)


def attentions(path: Path) -> Iterator[tuple[str, Attention, NodeFacts]]:
    """The attention nodes of every graph of an artifact, at every size of `sizes_of`."""
    with open_artifact(path) as artifact:
        config, part = config_of(artifact.manifest), ge_part(artifact.manifest, path)
        specs_of = graphs_of(config, part)
        for graph in part.graphs:
            binding = binding_from_bytes(artifact.read(graph.binding), graph.name)
            parsed = read_graph(artifact.read(graph.graph), graph.name)
            about = graph_facts(parsed, binding)
            for title, lengths in sizes_of(graph.name):
                specs = propagate(parsed, input_specs(binding, specs_of[graph.name], config, lengths), graph.name)
                for each in live_nodes(parsed):
                    if known(each.op).attention:
                        facts = node_facts(each, specs, frozenset(), about)
                        yield f"{graph.name} {title} {each.name}", described(graph.name, facts), facts


def described(graph: str, facts: NodeFacts) -> Attention:
    assert facts("attr.inner_precise") == 0
    kind = "TND" if facts("layout") == "TND" else "decode" if graph.startswith("decode") else graph
    form = Form(
        kind, facts("in.query.dtype"), facts("heads"), facts("kv_heads"), facts("d"), facts("attr.sparse_mode"),
        facts("in.atten_mask.fed"),
    )  # fmt: skip
    return Attention(form, facts("b") or 1, facts("q_s"), facts("kv_s"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["2b", "7b", "72b"])
def test_every_attention_of_the_default_graphs_is_covered(model: str, run: Any, tmp_path: Path) -> None:
    """From the published config alone, with two layers of each kind: the others repeat them, node by node."""
    config = published(model)
    config["num_hidden_layers"] = 2
    config["vision_config"]["depth"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "a.artifact"
    result = run("compile", "--config", tmp_path / "config.json", "--out", out, "--batch", "1,4,16")
    assert result.exit_code == 0, result.output
    found = list(attentions(out))
    assert len(found) == 2 * (6 + 3 + 3)
    for where, attention, facts in found:
        assert covered(attention), f"{where}: {attention}"
        for release in RELEASES:
            assert not refused_by_rules(facts, release), where
