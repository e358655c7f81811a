"""Qwen2.5-VL's inputs: windows as transformers orders them, in both forms of the visual graph, and a clip's clock."""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import nested_config, published_2_5, tiny_windowed
from transformers import vision_utils
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from qwen2vl_tc.artifacts.errors import ArtifactError, ConfigError, RequestError
from qwen2vl_tc.runtime.models import config_from_hf, config_of, to_plain
from qwen2vl_tc.runtime.models.base import Picture, VisualLimits
from qwen2vl_tc.runtime.models.positions import segment_ends, vision_positions
from qwen2vl_tc.runtime.models.qwen2_5_vl import Qwen25VLConfig, WindowInputs
from qwen2vl_tc.runtime.models.segments import VisualCall

PUBLISHED = config_from_hf(published_2_5("3b"))
TINY = config_from_hf(tiny_windowed())
# whole windows, sides that are no multiple of one, single rows, less than a window, clips
GRIDS = [(1, 16, 24), (1, 36, 52), (1, 2, 30), (1, 30, 2), (1, 2, 2), (3, 10, 18), (1, 8, 8), (2, 36, 52)]
LIMITS = {
    "segments": VisualLimits("segments", 1 << 16),
    "tnd": VisualLimits("tnd", 1 << 16, packed=4096),
    "small": VisualLimits("segments", 512),
    "equal": VisualLimits("equal", 4096),
    "few": VisualLimits("tnd", 2048, packed=40),
}


def inputs_of(config: Any) -> WindowInputs:
    assert isinstance(config, Qwen25VLConfig)
    return WindowInputs(config)


def transformers_windows(grids: list[tuple[int, int, int]], size: int) -> tuple[np.ndarray, list[int]]:
    index, ends = vision_utils.get_vision_window_index(torch.tensor(grids), 2, size, 14)
    return index.numpy(), ends.tolist()[1:]


@pytest.mark.parametrize("config", [PUBLISHED, TINY], ids=["112", "56"])
@pytest.mark.parametrize("grids", [[grid] for grid in GRIDS] + [GRIDS], ids=str)
def test_the_order_is_that_of_transformers(grids: list[tuple[int, int, int]], config: Any) -> None:
    index, _ = transformers_windows(grids, config.vision.window_size)
    np.testing.assert_array_equal(inputs_of(config).order(np.array(grids)), index)


def taken(calls: list[VisualCall], count: int) -> np.ndarray:
    """Which patch each merged row of embeddings is made of, [merged, 4], by the first byte of the patches."""
    rows = np.full((count, 4), -1)
    for call in calls:
        made = call.arguments["patches"].reshape(-1, 4, call.arguments["patches"].shape[-1])[..., :4].copy()
        numbers = made.view(np.int32)[..., 0]
        for piece in call.pieces:
            assert (rows[piece.to : piece.to + piece.count] == -1).all(), "no row is made twice"
            rows[piece.to : piece.to + piece.count] = numbers[piece.begin : piece.begin + piece.count]
    return rows


@pytest.mark.parametrize("limits", LIMITS.values(), ids=list(LIMITS))
def test_every_patch_is_in_one_window_and_in_its_segment(limits: VisualLimits) -> None:
    grids = np.array(GRIDS)
    total = int(grids.prod(1).sum())
    patches = np.zeros((total, 8), np.uint8)
    patches[:, :4] = np.arange(total, dtype=np.int32)[:, None].view(np.uint8)
    inputs = inputs_of(PUBLISHED)
    calls = list(inputs.visual(patches, grids, limits))
    index, window_ends = transformers_windows(GRIDS, 112)
    expected = np.arange(total).reshape(-1, 4)[index]
    np.testing.assert_array_equal(taken(calls, total // 4), expected)
    places = vision_positions(grids, 2)
    windows, segments = [], []
    for call in calls:
        numbers = call.arguments["patches"].reshape(-1, 8)[:, :4].copy().view(np.int32)[:, 0]
        positions = call.arguments["positions"].reshape(2, -1)
        if limits.attention == "tnd":
            ends = call.lengths["window_ends"], call.lengths["segment_ends"]
            assert max(map(len, ends)) <= limits.packed or len(call.lengths["segment_ends"]) == 1
            windows += [set(part.tolist()) for part in np.split(numbers, ends[0][:-1])]
            segments += [set(part.tolist()) for part in np.split(numbers, ends[1][:-1])]
            valid = np.ones(len(numbers), bool)
        else:
            rows, lengths = numbers.reshape(-1, 64), call.lengths["window_lengths"]
            windows += [set(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]
            each = call.arguments["keys"]
            assert limits.attention == "segments" or "segment_lengths" not in call.lengths
            keys = zip(each, call.lengths.get("segment_lengths", [each.shape[1]] * len(each)), strict=True)
            segments += [set(numbers[row[:length]].tolist()) for row, length in keys]
            valid = (np.arange(64) < np.array(lengths)[:, None]).ravel()
            assert call.arguments["keys"].max() < len(numbers), "no key lies outside"
        np.testing.assert_array_equal(positions[:, valid], places[:, numbers[valid]])
    flat = expected.ravel()
    assert sorted(map(sorted, windows)) == sorted(
        sorted(flat[a:b].tolist()) for a, b in zip([0, *window_ends[:-1]], window_ends, strict=True)
    )
    ends = segment_ends(grids)
    assert sorted(map(sorted, segments)) == [list(range(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_a_picture_that_is_too_large_is_refused() -> None:
    with pytest.raises(RequestError, match="a picture has 832 patches, the visual graph takes 800"):
        list(
            inputs_of(PUBLISHED).visual(
                np.zeros((832, 1), np.uint8), np.array([[1, 26, 32]]), VisualLimits("tnd", 800, 800, packed=9)
            )
        )


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 3.0, 5.0])
def test_a_clip_counts_time_as_transformers_does_and_text_goes_on_behind_all_of_it(fps: float) -> None:
    grid, seconds = (7, 4, 6), 2 / fps
    ids = np.array([7, 7, *[TINY.video_token_id] * 42, 7, 7, 7])
    positions, delta = inputs_of(TINY).positions(ids, [Picture("video", grid, seconds)])
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    )
    model.get_vision_position_ids = functools.partial(Qwen2_5_VLModel.get_vision_position_ids, model)
    theirs, _ = Qwen2_5_VLModel.get_rope_index(
        model,
        torch.from_numpy(ids)[None],
        mm_token_type_ids=torch.from_numpy((ids == TINY.video_token_id) * 2)[None],
        video_grid_thw=torch.tensor([grid]),
        second_per_grid_ts=torch.tensor([seconds]),
    )
    np.testing.assert_array_equal(positions[:, :44], theirs[:, 0, :44].numpy())
    # as the checkpoints were trained: behind the largest position of any axis
    behind = positions[:, :44].max() + 1
    assert positions[:, 44:].tolist() == [[behind, behind + 1, behind + 2]] * 3
    assert delta == behind + 3 - len(ids)


def test_published_files_may_leave_fields_out_and_nest_the_text() -> None:
    flat = published_2_5("7b")
    config = config_from_hf(flat)
    assert config == config_from_hf(nested_config(flat))
    vision: Any = config.vision
    assert (vision.depth, vision.num_heads, vision.embed_dim, vision.hidden_size) == (32, 16, 1280, 3584)
    assert (vision.window_patches, vision.full_blocks, vision.tokens_per_second) == (64, (7, 15, 23, 31), 2)
    assert (vision.mlp_dim, vision.stored_mlp_dim) == (3420, 3456)
    manifest: Any = SimpleNamespace(name="a", model=to_plain(config))
    assert config_of(manifest) == config


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"window_size": 100}, "window_size is 100, expected a multiple of patch_size 14 times spatial_merge_size 2"),
        ({"fullatt_block_indexes": [4]}, r"fullatt_block_indexes are \[4\], of 4 blocks"),
        ({"fullatt_block_indexes": "all"}, "fullatt_block_indexes is 'all', expected a list of integers"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', expected 'silu'"),
        ({"out_hidden_size": 32}, "the vision tower's output 32 differs from the text model's 64"),
    ],
)
def test_a_tower_that_cannot_be_is_refused(vision: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from_hf(tiny_windowed(vision=vision))


def test_another_model_type_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="model_type 'qwen3_vl' is not supported; supported: qwen2_vl, qwen2_5_vl"):
        config_from_hf({**tiny_windowed(), "model_type": "qwen3_vl"})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("patch_size", 0, "vision patch_size is 0"),
        ("spatial_merge_size", 0, "vision spatial_merge_size is 0"),
        ("window_size", 28 << 20, "of at most 65536 patches in all"),
    ],
)
def test_a_hostile_manifest_is_one_error(field: str, value: int, said: str) -> None:
    model = to_plain(PUBLISHED)
    model["vision"][field] = value
    hostile: Any = SimpleNamespace(name="a", model=model)
    with pytest.raises(ArtifactError, match=said):
        config_of(hostile)


def test_windows_that_padding_makes_too_many_are_refused() -> None:
    # 213 windows of 16 patches, each padded to 64
    patches, grids = np.zeros((3400, 1), np.uint8), np.array([[1, 2, 1700]])
    narrow = inputs_of(config_from_hf(published_2_5("3b")))
    with pytest.raises(RequestError, match=r"a picture has .* patches, the visual graph takes 13,000"):
        list(narrow.visual(patches, grids, VisualLimits("segments", 13000, longest=13000)))
    with pytest.raises(RequestError, match="a picture has 213 windows, the visual graph takes 200"):
        list(narrow.visual(patches, grids, VisualLimits("tnd", 1 << 16, packed=200)))
    with pytest.raises(RequestError, match="a picture is 1,700 patches long, the visual graph takes 1,600"):
        list(narrow.visual(patches, grids, VisualLimits("segments", 1 << 16, side=1600)))
