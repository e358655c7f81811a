"""`inspect` counts what is in the graphs and says what the artifact holds and needs."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qwen2vl_tc.artifacts.ge.binding import ARGUMENT, CACHE, PARAMETER, Binding, BoundInput
from qwen2vl_tc.artifacts.ge.graph import GeGraph, read_graph
from qwen2vl_tc.artifacts.ge.proto import message_class, parse_graph
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.exporters.torchair.passes import count_ops, remove_dead_ops
from qwen2vl_tc.toolchain.inspect.inspect import RECIPE_7B, count_graph_ops, inspect_artifact, render
from qwen2vl_tc.toolchain.words import format_bytes

from .conftest import TINY, Run


@pytest.fixture(scope="module")
def plain(built: Path, run: Run) -> dict[str, Any]:
    """What `inspect --json` prints of `built`."""
    result = run("inspect", built, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """An artifact compiled from a config.json alone, untouched by our passes, with readable graphs."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(TINY))
    out = folder / "graphs.artifact"
    words = ("--max-length", "64", "--dump", "pbtxt", "--passes", "none")
    result = run("compile", "--config", folder / "config.json", "--out", out, *words)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith(f"next: qwen2vl-tc convert --src HF_DIR --out {out}")
    return out


def test_every_graph_has_its_operators_counted_by_kind_and_type(plain: dict[str, Any], built: Path) -> None:
    part = read_manifest(built).ge
    assert part is not None
    assert list(plain["graphs"]) == ["visual", "prefill", "decode_b1", "decode_b2"]
    for graph in part.graphs:
        ops = plain["graphs"][graph.name]["ops"]
        assert {kind: ops[kind] for kind in graph.ops} == graph.ops, "what compile counted on its own graph"
        assert ops["total"] == sum(ops["by_type"].values())
        assert ops["total"] == ops["device"] + ops["shape"] + ops["layout"] + ops["data"]
        assert ops["transpose_weight"] == 0
        assert 0 < ops["per_layer"] <= 13
        assert ops["per_layer"] * 2 <= ops["device"], "there are two layers"
    assert plain["graphs"]["visual"]["ops"]["by_type"]["FusedInferAttentionScore"] == TINY["vision_config"]["depth"]
    assert plain["graphs"]["decode_b1"]["ops"]["by_type"]["FusedInferAttentionScore"] == TINY["num_hidden_layers"]


def test_every_graph_has_its_inputs_and_outputs_with_shapes(plain: dict[str, Any]) -> None:
    def shapes(graph: str, side: str) -> dict[str, tuple[str, list[int]]]:
        return {each["name"]: (each["dtype"], each["shape"]) for each in plain["graphs"][graph][side]}

    vocabulary, hidden = TINY["vocab_size"], TINY["hidden_size"]
    assert shapes("visual", "inputs") == {
        "patches": ("uint8", [-1, -1, 1176]),
        "positions": ("int64", [2, -1, -1]),
        "segment_lengths": ("int64", [-1]),
    }
    assert shapes("visual", "outputs") == {"embeds": ("fp32", [-1, hidden])}
    assert shapes("decode_b2", "inputs")["keys[1]"] == ("fp32", [2, 256, 32])
    assert shapes("decode_b2", "outputs") == {
        "next_token": ("int64", [2]),
        "checked_token": ("int64", [2]),
        "logits": ("fp32", [2, vocabulary]),
        "cache_index": ("int64", [2]),
        "rope_rows": ("int64", [2, 8]),
    }
    assert shapes("prefill", "outputs")["logits"] == ("fp32", [1, vocabulary])


def test_bytes_are_those_of_the_files_and_of_the_cache(plain: dict[str, Any], built: Path) -> None:
    assert plain["bytes"] == sum(entry.bytes for entry in read_manifest(built).files())
    assert plain["weights"]["bytes"] == sum(path.stat().st_size for path in (built / "weights").iterdir())
    target = plain["target"]
    # layers x keys and values x head_dim x KV heads x fp32
    per_token = 2 * 2 * 16 * 2 * 4
    assert target["kv_bytes_per_token"] == per_token
    assert target["kv_bytes"] == {"1": 256 * per_token, "2": 2 * 256 * per_token}
    assert target["device_bytes"] == target["weight_bytes"] + 2 * 256 * per_token
    assert target["weight_bytes"] == 4 * plain["weights"]["values"]


def test_the_target_the_versions_and_the_verdict_are_there(plain: dict[str, Any]) -> None:
    target = plain["target"]
    assert (target["soc"], target["max_length"], target["batches"]) == ("Ascend910B2", 256, [1, 2])
    assert target["versions"].keys() >= {"torch", "torch-npu", "cann"}
    assert "GeluV2" in [note["operator"] for note in target["operator_notes"]]
    assert plain["verification"] == "passed"
    assert plain["recipe_at_7b"] == RECIPE_7B


def test_a_person_reads_the_counts_beside_the_recipe_s(built: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    render(inspect_artifact(built), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "recipe at 7B" in text
    for figures in RECIPE_7B.values():
        assert all(str(number) in text for number in figures.values())
    assert "keys: 2 x fp32 [2, 256, 32]" in text
    assert "GeluV2" in text


def test_graphs_without_weights_are_inspected_too(config_only: Path, run: Run) -> None:
    plain = json.loads(run("inspect", config_only, "--json").stdout)
    assert plain["weights"] is None
    assert plain["target"]["passes"] == []
    assert plain["target"]["dtype"] == "bf16"
    text = run("inspect", config_only).stdout
    assert "qwen2vl-tc convert --src" in text


def test_dead_operators_are_not_counted_whether_or_not_a_pass_removed_them(config_only: Path) -> None:
    part = read_manifest(config_only).ge
    assert part is not None
    inspected = inspect_artifact(config_only)
    for graph in part.graphs:
        ops = inspected.graphs[graph.name].ops
        assert ops.total < graph.ops["total"], "untouched, torchair's graphs carry dead operators"
        cleaned = parse_graph((config_only / graph.graph.path).read_bytes(), graph.name)
        remove_dead_ops(cleaned)
        counted = count_ops(cleaned)
        assert counted == {kind: getattr(ops, kind) for kind in counted}
        assert graph.readable is not None
        assert "MatMul" in (config_only / graph.readable.path).read_text()


def test_a_damaged_graph_is_an_error_and_not_a_count(built: Path, run: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    graph = copy / "graphs/ge/prefill/graph.pb"
    data = graph.read_bytes()
    graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    result = run("inspect", copy)
    assert result.exit_code == 2
    assert "graphs/ge/prefill/graph.pb" in result.stderr


def bound(kind: str, name: str) -> BoundInput:
    return BoundInput(kind, name, 0 if kind == CACHE else None, "fp32", (2, 2), False, kind == PARAMETER)


def graph_of(*ops: tuple[str, ...]) -> GeGraph:
    """A graph from (name, type, producers...), each with one output; inputs are numbered as they come."""
    model = message_class("ModelDef")()
    graph = model.graph.add(name="g")
    for name, op_type, *producers in ops:
        op = graph.op.add(name=name, type=op_type, input=[f"{producer}:0" for producer in producers])
        op.output_desc.add()
        if op_type == "Data":
            op.attr["index"].i = sum(each.type == "Data" for each in graph.op) - 1
    return read_graph(model.SerializeToString(), "g")


def test_transposes_of_parameters_are_told_from_those_of_activations_and_dead_ones_from_writes() -> None:
    graph = graph_of(
        ("x", "Data"),
        ("w", "Data"),
        ("cache", "Data"),
        ("reshaped", "Reshape", "w"),
        ("weight_transposed", "Transpose", "reshaped"),
        ("also", "TransposeD", "w"),
        ("activation_transposed", "Transpose", "x"),
        ("dead", "Transpose", "w"),
        ("written", "Scatter", "cache", "x"),
        ("x_copy", "TensorMove", "x"),
        ("lost", "Scatter", "x_copy", "x"),
        ("size", "Shape", "x"),
        ("product", "MatMul", "activation_transposed", "weight_transposed", "also", "size"),
        ("out", "NetOutput", "product"),
    )
    inputs = (bound(ARGUMENT, "x"), bound(PARAMETER, "w"), bound(CACHE, "keys"))
    ops = count_graph_ops(graph, Binding("g", inputs, (), {}, {}))
    assert ops.transpose_weight == 2
    assert ops.by_type == {
        "Data": 3,
        "Transpose": 2,
        "MatMul": 1,
        "NetOutput": 1,
        "Reshape": 1,
        "Scatter": 1,
        "Shape": 1,
        "TransposeD": 1,
    }
    assert (ops.total, ops.device, ops.shape, ops.layout, ops.data) == (11, 5, 1, 1, 4)
    assert ops.per_layer is None, "there is no layer in it"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (784064, "784 kB"), (999_600, "1 MB"), (14_100_000_000, "14.1 GB")],
)
def test_sizes_are_decimal_with_three_digits(count: int, shown: str) -> None:
    assert format_bytes(count) == shown
