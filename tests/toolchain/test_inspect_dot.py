"""`inspect --graph NAME --dot FILE` draws one layer that Graphviz can read and a person can follow."""

import re
from pathlib import Path

import pytest

from qwen2vl_tc.toolchain.inspect.inspect import draw_artifact

from .conftest import Run

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_VALUE = rf"(?:{_QUOTED}|[A-Za-z0-9_.]+)"
_ATTRIBUTES = rf"\[(?P<attributes>\w+={_VALUE}(?:, \w+={_VALUE})*)\]"
# the statements of the DOT language that a drawing uses, after its grammar (graphviz.org/doc/info/lang.html)
_STATEMENTS = {
    "node": re.compile(rf"  (?P<name>{_QUOTED}) {_ATTRIBUTES};"),
    "edge": re.compile(rf"  (?P<source>{_QUOTED}) -> (?P<target>{_QUOTED}) {_ATTRIBUTES};"),
    "default": re.compile(rf"  (?:node|edge) {_ATTRIBUTES};"),
    "setting": re.compile(rf"  \w+={_VALUE};"),
}


def parse(text: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Labels of the nodes by name, and edges; fails on anything that is not DOT."""
    first, *lines, last = text.splitlines()
    assert re.fullmatch(rf"digraph {_QUOTED} {{", first) and last == "}"
    nodes: dict[str, str] = {}
    edges: list[tuple[str, str]] = []
    for line in lines:
        kind, found = next(((k, m) for k, s in _STATEMENTS.items() if (m := s.fullmatch(line))), ("", None))
        assert found, f"not a statement: {line}"
        if kind == "node":
            assert found["name"] not in nodes, "a node has one label"
            label = re.search(rf"label=({_QUOTED})", found["attributes"])
            assert label
            nodes[found["name"]] = label[1].strip('"')
        elif kind == "edge":
            edges.append((found["source"], found["target"]))
    return nodes, edges


def test_the_second_layer_of_decode_has_its_12_device_operators_and_its_parameters(
    built: Path, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "layer.dot"
    result = run("inspect", built, "--graph", "decode_b1", "--dot", file)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {file}: layer 1 of decode_b1, 12 device operators\n"
    text = file.read_text()
    nodes, edges = parse(text)
    assert {name for edge in edges for name in edge} == set(nodes), "every edge has its ends, every node an edge"
    kinds = [label.split("\\n")[0] for label in nodes.values()]
    expected = {"MatMul": 4, "AddRmsNorm": 2, "Scatter": 2, "RotaryPositionEmbedding": 1, "SplitV": 1, "SwiGlu": 1}
    assert {kind: kinds.count(kind) for kind in expected} == expected
    assert kinds.count("FusedInferAttentionScore") == 1
    for parameter in (
        *("input_layernorm.weight [64]", "self_attn.qkv_proj.weight [128, 64]", "self_attn.qkv_proj.bias [128]"),
        *("self_attn.o_proj.weight [64, 64]", "post_attention_layernorm.weight [64]"),
        *("mlp.gate_up_proj.weight [256, 64]", "mlp.down_proj.weight [64, 128]"),
    ):
        assert f"model.layers.1.{parameter}" in text
    assert "model.layers.0." not in text
    assert {"keys[1]", "values[1]"} <= set(kinds), "the layer's own cache"
    assert "-> fp32 [1, 256]" in text, "what gate_up_proj makes"


@pytest.mark.parametrize(("graph", "layer"), [("visual", 0), ("prefill", 0), ("prefill", 1), ("decode_b2", 0)])
def test_every_layer_of_every_graph_can_be_drawn(graph: str, layer: int, built: Path) -> None:
    drawing = draw_artifact(built, graph, layer)
    nodes, edges = parse(drawing.text)
    assert {name for edge in edges for name in edge} == set(nodes)
    assert drawing.layer == layer
    assert drawing.device_ops >= 10
    assert ".layers." in drawing.text or ".blocks." in drawing.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--graph", "decode_b1"), "--graph and --dot together"),
        (("--dot", "x.dot"), "--graph and --dot together"),
        (("--layer", "1"), "--graph and --dot together"),
        (("--graph", "visual", "--dot", "x.dot", "--json"), "no --json"),
        (("--graph", "decoder", "--dot", "x.dot"), "--graph decoder: expected one of visual, prefill, decode_b1"),
        (("--graph", "visual", "--dot", "x.dot", "--layer", "2"), "--layer 2: graph visual has layers 0 to 1"),
        (("--graph", "visual", "--dot", "absent/x.dot"), "absent/x.dot: No such file"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_leaves_no_file(
    words: tuple[str, ...], said: str, built: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("inspect", built, *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_decode_stands_for_the_graph_of_the_smallest_batch(built: Path, run: Run, tmp_path: Path) -> None:
    for name in ("decode", "decode_b1"):
        assert run("inspect", built, "--graph", name, "--dot", tmp_path / f"{name}.dot").exit_code == 0
    assert (tmp_path / "decode.dot").read_text() == (tmp_path / "decode_b1.dot").read_text()
