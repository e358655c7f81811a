"""The table of benchmarks/ablation.py cannot rot unseen: on a tiny model, undoing something changes what it should."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_tc.artifacts.config import model_config_from_hf
from qwen2vl_tc.toolchain.synthetic import tiny_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LAYERS = 5
GRAPH = "decode_b1"


@pytest.fixture(scope="module")
def ablation() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import ablation

        ablation.open_emulated_device()
        config = model_config_from_hf(tiny_config())
        config = replace(config, text=replace(config.text, num_layers=LAYERS))
        yield ablation.Ablation(config, max_length=2048, graphs=(GRAPH,))
    for name in [name for name in sys.modules if name.startswith("ablation")]:
        del sys.modules[name]


def difference(ablation: Any, name: str) -> Any:
    (row,) = ablation.rows(next(v for v in ablation.variants.UNDONE if v.name == name))
    return row


def test_three_products_for_q_k_and_v_are_two_more_a_layer(ablation: Any) -> None:
    row = difference(ablation, "fused qkv")
    assert row.types["MatMul"] == 2 * LAYERS
    assert row.types["RotaryMul"] == LAYERS
    assert row.types["SplitV"] == -LAYERS
    assert (row.transpose_weight, row.shape) == (0, 0)


def test_f_linear_transposes_every_weight_and_moves_its_bytes_twice(ablation: Any) -> None:
    row = difference(ablation, "npu_linear")
    text = ablation.config.text
    # qkv, o, gate and up, down of every layer, and lm_head
    assert row.transpose_weight == 4 * LAYERS + 1
    layer = 2 * text.hidden_size**2 + 2 * text.hidden_size * text.kv_dim + 3 * text.hidden_size * text.intermediate_size
    weights = LAYERS * layer + text.hidden_size * text.vocab_size
    # read and written again in bf16, and the order of its axes read by every Transpose
    assert row.bytes - 2 * 2 * weights in range(1, 8 * 8 * row.transpose_weight)


def test_a_cache_grown_by_concat_is_read_and_written_whole_for_every_token(ablation: Any) -> None:
    row = difference(ablation, "fixed KV cache, in place")
    assert row.device == 0
    rows = ablation.cost.Sizes().length - 1
    assert row.bytes >= LAYERS * 2 * (2 * rows) * ablation.config.text.kv_dim * 2


def test_counts_of_the_full_depth_are_those_of_the_whole_graph(ablation: Any) -> None:
    whole = type(ablation)(ablation.config, ablation.max_length, full=True, graphs=(GRAPH,))
    ours = ablation.ours[GRAPH]
    assert replace(whole.ours[GRAPH], per_layer=ours.per_layer) == ours
    assert ours.device == 12 * LAYERS + 11


def test_a_count_that_is_on_no_line_stops_the_script(ablation: Any) -> None:
    import ablation as script

    assert script._line([14, 26, 38], (2, 3, 4), 28, "device") == 326
    with pytest.raises(script.NotAffine, match="device"):
        script._line([14, 26, 39], (2, 3, 4), 28, "device")


def test_the_modules_are_as_before_once_a_variant_is_traced(ablation: Any) -> None:
    before = ablation.ours[GRAPH]
    difference(ablation, "Add + RMSNorm in one")
    ablation._raw.clear()
    assert ablation.costs(ablation.base)[GRAPH] == before
