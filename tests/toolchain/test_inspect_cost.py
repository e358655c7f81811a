"""`inspect` says what a run costs at given lengths, from shapes; figures here are worked out from the model's shape."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.synthetic import tiny_config
from rich.console import Console

from qwen2vl_tc.artifacts.ge.graph import GeGraph
from qwen2vl_tc.runtime.ops.base import OpCost, Specs, TensorSpec
from qwen2vl_tc.toolchain.inspect.cost import DEFAULT_PATCHES, DEFAULT_TOKENS, peak_activations
from qwen2vl_tc.toolchain.inspect.inspect import inspect_artifact, render
from qwen2vl_tc.toolchain.inspect.roofline import Assumptions, assumptions_for, estimate, why_no_assumptions

from ..conftest import Build
from .conftest import TINY, Run
from .test_inspect import graph_of

MAX_LENGTH = 64
HIDDEN, INNER, LAYERS, KV = TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"], 2 * 16
VOCABULARY, BF16 = TINY["vocab_size"], 2
# the 2B, 7B and 72B models share this vision tower
PUBLISHED_VISION = {"embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
MAX_PATCHES = 65536  # the processor's max_pixels, 12,845,056, in patches of 14 x 14


@pytest.fixture(scope="module")
def default(build: Build) -> Path:
    words = {"operators": "fused", "visual_attention": "segments"}
    return build("shapes_default", tiny_config(), dtype="bf16", batches="1,2", max_length=MAX_LENGTH, **words)[1]


@pytest.fixture(scope="module")
def other(build: Build) -> Path:
    words = {"operators": "recipe", "visual_attention": "tnd"}
    return build("shapes_other", tiny_config(), dtype="bf16", batches="1,2", max_length=MAX_LENGTH, **words)[1]


def costs(path: Path, run: Run, *words: str) -> dict[str, Any]:
    result = run("inspect", path, "--json", *words)
    assert result.exit_code == 0, result.output
    return {name: graph["cost"] for name, graph in json.loads(result.stdout)["graphs"].items()}


def text_matmuls(rows: int) -> int:
    """FLOPs of a layer's four MatMuls over `rows`."""
    return 2 * rows * (HIDDEN * (HIDDEN + 2 * KV) + HIDDEN * HIDDEN + 3 * HIDDEN * INNER)


def test_decode_does_the_arithmetic_of_its_matrices_and_of_the_cache_up_to_its_length(default: Path, run: Run) -> None:
    found = costs(default, run, "--tokens", "40")
    for batch in (1, 2):
        head, attention = 2 * batch * HIDDEN * VOCABULARY, 4 * batch * 40 * HIDDEN
        assert found[f"decode_b{batch}"]["flops"] == LAYERS * (text_matmuls(batch) + attention) + head
        assert found[f"decode_b{batch}"]["lengths"] == {"kv_length": 40}


def test_prefill_counts_what_lies_below_the_diagonal_and_the_dense_form_everything(
    default: Path, other: Path, run: Run
) -> None:
    tokens = 20
    # the last layer computes what follows its attention for one row only
    after = 2 * (HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    qkv = 2 * tokens * HIDDEN * (HIDDEN + 2 * KV)
    matmuls = LAYERS * qkv + (LAYERS - 1) * tokens * after + after + 2 * HIDDEN * VOCABULARY
    causal = 4 * HIDDEN * LAYERS * sum(range(1, tokens + 1))
    dense = 4 * HIDDEN * LAYERS * tokens * MAX_LENGTH
    assert costs(default, run, "--tokens", str(tokens))["prefill"]["flops"] == matmuls + causal
    assert costs(other, run, "--tokens", str(tokens))["prefill"]["flops"] == matmuls + dense


def test_the_vision_tower_attends_among_all_patches_of_one_segment(default: Path, run: Run) -> None:
    def flops(patches: int) -> int:
        found: int = costs(default, run, "--patches", str(patches))["visual"]["flops"]
        return found

    # what is not linear in the patches is attention: 4 n^2 x width, over two layers
    assert flops(200) - 2 * flops(100) == 2 * 4 * 32 * (200**2 - 2 * 100**2)


def test_a_longer_cache_costs_decode_the_bytes_of_its_rows_and_nothing_else(default: Path, run: Run) -> None:
    short, long = (costs(default, run, "--tokens", str(tokens))["decode_b2"] for tokens in (30, 40))
    assert long["moved_bytes"] - short["moved_bytes"] == 10 * 2 * LAYERS * 2 * KV * BF16
    assert long["peak_activation_bytes"] == short["peak_activation_bytes"]


def test_decode_reads_every_weight_once_and_few_bytes_more(default: Path, run: Run) -> None:
    moved = costs(default, run, "--tokens", "1")["decode_b1"]["moved_bytes"]
    layer = HIDDEN * (HIDDEN + 2 * KV) + HIDDEN + 2 * KV + HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
    weights = BF16 * (LAYERS * layer + HIDDEN + HIDDEN * VOCABULARY)
    # the table of embeddings would be as much as the head; one row of it is read
    assert weights < moved < weights + BF16 * HIDDEN * VOCABULARY // 2


def specs_of(**sizes: int | tuple[int, ...]) -> dict[str, Specs]:
    """Tensors of so many bytes, by node."""
    return {
        name: tuple(TensorSpec("int8", (n,)) for n in (size if isinstance(size, tuple) else (size,)))
        for name, size in sizes.items()
    }


def peak(graph: GeGraph, **sizes: int | tuple[int, ...]) -> tuple[int, str]:
    return peak_activations(graph, specs_of(**sizes))


def test_the_peak_counts_what_lives_at_once_and_not_inputs() -> None:
    graph = graph_of(
        ("x", "Data"), ("a", "FastGelu", "x"), ("b", "Cast", "a"), ("c", "Mul", "b"), ("out", "NetOutput", "c")
    )
    assert peak(graph, x=1000, a=10, b=20, c=5) == (30, "Cast")
    assert peak(graph, x=1000, a=10, b=20, c=50) == (70, "Mul")


def test_a_reshape_shares_memory_and_keeps_it_alive_a_split_copies_and_unread_outputs_count() -> None:
    graph = graph_of(
        ("x", "Data"),
        ("a", "FastGelu", "x"),
        ("view", "Reshape", "a"),
        ("b", "Cast", "x"),
        ("c", "Add", "b", "view"),
        ("out", "NetOutput", "c"),
    )
    assert peak(graph, x=1, a=10, view=10, b=20, c=5) == (35, "Add")
    split = graph_of(("x", "Data"), ("a", "Cast", "x"), ("s", "SplitV", "a"), ("out", "NetOutput", "s"))
    assert peak(split, x=1, a=10, s=(6, 4)) == (20, "SplitV")


def test_a_write_in_place_takes_no_memory_and_one_into_a_copy_keeps_the_copy() -> None:
    graph = graph_of(
        ("cache", "Data"), ("x", "Data"), ("k", "Cast", "x"), ("w", "Scatter", "cache", "x", "k"), ("out", "NetOutput")
    )
    assert peak(graph, cache=1000, x=1, k=7, w=1000) == (7, "Cast")
    graph = graph_of(
        ("x", "Data"),
        ("copy", "TensorMove", "x"),
        ("w", "ScatterNdUpdate", "copy", "x"),
        ("y", "Cast", "w"),
        ("out", "NetOutput", "y"),
    )
    assert peak(graph, x=1, copy=30, w=30, y=4) == (34, "Cast")


def test_the_default_form_reads_no_mask_but_a_fixed_one_and_the_other_form_is_warned_of(
    default: Path, other: Path, run: Run
) -> None:
    plain = costs(default, run, "--tokens", "32")
    assert [(mask["name"], mask["shape"], mask["quadratic"]) for mask in plain["prefill"]["masks"]] == [
        ("causal_mask", [2048, 2048], False)
    ]
    assert not plain["prefill"]["masks"][0]["warning"]
    assert not plain["visual"]["masks"] and not plain["decode_b1"]["masks"]
    (mask,) = costs(other, run, "--tokens", "32", "--patches", "16")["prefill"]["masks"]
    assert (mask["shape"], mask["quadratic"], mask["bytes"]) == ([1, 1, 32, MAX_LENGTH], True, 32 * MAX_LENGTH)
    assert "grows with" in mask["warning"]
    assert "warning: prefill: mask mask" in run("inspect", other).stdout
    assert "warning" not in run("inspect", default).stdout


def test_lengths_are_stated_and_default_to_one_picture_as_far_as_the_cache_holds_it(
    default: Path, built: Path, run: Run
) -> None:
    assert (DEFAULT_PATCHES, DEFAULT_TOKENS) == (1872, 507)
    found = costs(default, run)
    assert found["visual"]["lengths"] == {"patches": 1872, "segments": 1}
    assert found["prefill"]["lengths"] == {"tokens": MAX_LENGTH, "image_tokens": MAX_LENGTH, "kv_length": MAX_LENGTH}
    assert costs(built, run)["decode_b1"]["lengths"] == {"kv_length": 256}
    text = " ".join(run("inspect", default, "--tokens", "50", "--patches", "40").stdout.split())
    assert "40 patches in 1 segment(s); a prompt of 50 tokens, 10 of them image; decode at cache length 50" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tokens", "65"), "--tokens 65: expected 1 to 64"),
        (("--tokens", "0"), "--tokens 0: expected 1 to 64"),
        (("--patches", "6"), "--patches 6: expected a multiple of 4"),
        (("--patches", "0"), "--patches 0: expected a multiple of 4"),
    ],
)
def test_lengths_that_no_request_can_have_are_refused(
    words: tuple[str, str], said: str, default: Path, run: Run
) -> None:
    result = run("inspect", default, *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_roofline_takes_the_longer_of_arithmetic_and_bytes_and_shows_launches_apart() -> None:
    assumed = Assumptions("X", bandwidth_bytes_per_s=1e9, peak_flops_per_s=1e12, launch_us=5.0)
    found = estimate([OpCost(flops=2 * 10**9, bytes=10**6), OpCost(flops=10**9, bytes=4 * 10**6)], assumed)
    assert found.kernels_ms == pytest.approx(2 + 4)
    assert found.launch_ms == pytest.approx(0.01)
    assert found.total_ms == pytest.approx(6.01)
    assert (found.compute_bound_ops, found.bandwidth_bound_ops) == (1, 1)


def test_the_estimate_is_marked_and_prints_what_it_assumes(default: Path, run: Run) -> None:
    text = " ".join(run("inspect", default).stdout.split())
    assert "Ascend910B2 with 1.6 TB/s of HBM and 350 TFLOPS dense peak in bf16 and fp16, 3 us a launch" in text
    assert "an estimate from assumptions, not a measurement" in text
    plain = json.loads(run("inspect", default, "--json").stdout)
    assert "not a measurement" in plain["estimate_assumptions"]["note"]
    for graph in plain["graphs"].values():
        found = graph["cost"]["roofline_estimate"]
        assert found["bandwidth_bound_ops"] + found["compute_bound_ops"] == graph["ops"]["device"]
        assert found["launch_ms"] == pytest.approx(3e-3 * graph["ops"]["device"])


def test_what_nothing_is_assumed_about_has_no_estimate_and_is_named(built: Path, run: Run) -> None:
    assert assumptions_for("Ascend310P3", "bf16") is None
    assert "Ascend310P3" in why_no_assumptions("Ascend310P3", "bf16")
    plain = json.loads(run("inspect", built, "--json").stdout)
    assert plain["estimate_assumptions"] is None
    assert "fp32" in plain["no_estimate"]
    assert plain["graphs"]["visual"]["cost"]["roofline_estimate"] is None
    assert "no estimate: no peak rate is assumed for fp32 on Ascend910B2" in run("inspect", built).stdout


def test_the_report_fits_in_100_columns(default: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    render(inspect_artifact(default), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)


def largest_picture(run: Run, folder: Path, depth: int) -> dict[str, Any]:
    """Cost of the visual graph with the published vision shape, and next to nothing behind it."""
    config = tiny_config(num_hidden_layers=1, vision={"depth": depth, **PUBLISHED_VISION})
    (folder / "config.json").write_text(json.dumps(config))
    words = ("--out", folder / "graphs", "--max-length", "64")
    result = run("compile", "--config", folder / "config.json", *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = costs(folder / "graphs", run, "--patches", str(MAX_PATCHES))["visual"]
    return found


@pytest.mark.slow
def test_at_the_processor_s_largest_picture_no_tensor_of_the_tower_takes_1_5_gb(run: Run, tmp_path: Path) -> None:
    found = largest_picture(run, tmp_path, depth=32)
    assert found["lengths"]["patches"] == MAX_PATCHES
    assert found["largest_tensor"]["bytes"] == MAX_PATCHES * 5120 * BF16 < 1.5e9
    assert found["masks"] == []


def test_an_estimate_for_a_model_that_no_single_device_holds_says_so(default: Path) -> None:
    inspection = inspect_artifact(default)
    assert inspection.target is not None and inspection.target.device_memory_bytes is not None

    def report(device_bytes: int) -> str:
        console = Console(file=io.StringIO(), width=100)
        render(replace(inspection, target=replace(inspection.target, device_bytes=device_bytes)), console)
        return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]

    said = "this model does not fit one such device"
    assert said in report(inspection.target.device_memory_bytes + 1)
    assert said not in report(inspection.target.device_memory_bytes)
