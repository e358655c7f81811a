"""The vision tower's inputs beside pixels: settings as transformers reads them, positions and segments as it counts."""

import json

import numpy as np
import pytest
import torch
from transformers import vision_utils
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as original

from qwen2vl_tc.artifacts.errors import ArtifactError, RequestError
from qwen2vl_tc.runtime.models.positions import segment_ends, vision_positions
from qwen2vl_tc.runtime.pictures.vision import image_settings_from_hf

GRIDS = [
    [(1, 2, 2)],
    [(1, 36, 52)],
    [(3, 4, 6)],
    [(1, 4, 8), (2, 6, 4), (1, 2, 2), (5, 2, 4)],
]


@pytest.mark.parametrize("grids", GRIDS)
def test_vision_positions_and_segments_are_those_of_transformers(grids):
    tensor = torch.tensor(grids)
    expected = vision_utils.get_vision_position_ids(tensor, 2).T.numpy()
    positions = vision_positions(grids, 2)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected)
    assert [0, *segment_ends(grids)] == vision_utils.get_vision_cu_seqlens(tensor).tolist()


def test_no_pictures_have_no_positions():
    assert vision_positions([], 2).shape == (2, 0)
    assert segment_ends([]) == []


@pytest.mark.parametrize("grid", [(1, 3, 2), (0, 2, 2), (1, 2, -2)])
def test_a_grid_that_merge_windows_do_not_tile_is_refused(grid):
    with pytest.raises(RequestError, match="multiples of 2"):
        vision_positions([grid], 2)


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}, "min_pixels": 3136, "max_pixels": 12845056},
        {"patch_size": 16, "merge_size": 1, "temporal_patch_size": 4, "resample": 3},
    ],
)
def test_settings_are_read_as_transformers_reads_them(plain):
    theirs = original.Qwen2VLImageProcessorPil(**json.loads(json.dumps(plain)))
    ours = image_settings_from_hf(json.dumps(plain).encode())
    assert (ours.min_pixels, ours.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    assert (ours.patch_size, ours.temporal_patch_size) == (theirs.patch_size, theirs.temporal_patch_size)
    assert ours.merge_size == theirs.merge_size


@pytest.mark.parametrize(
    "plain",
    [
        {"resample": 2},
        {"do_resize": False},
        {"do_convert_rgb": False},
        {"patch_size": 0},
        {"patch_size": "14"},
        {"min_pixels": True},
        {"min_pixels": 10, "max_pixels": 9},
        {"size": {"height": 224, "width": 224}},
        {"size": 224},
        [],
    ],
)
def test_settings_that_cannot_be_served_are_refused(plain):
    with pytest.raises(ArtifactError, match=r"preprocessor_config\.json"):
        image_settings_from_hf(json.dumps(plain).encode())
