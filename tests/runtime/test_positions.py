"""M-RoPE positions: those that the checkpoints were trained with, and transformers' own wherever it still has them."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import tiny_config
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.runtime.models.base import Picture
from qwen2vl_tc.runtime.models.config import ModelConfig
from qwen2vl_tc.runtime.models.positions import rope_positions

CONFIG = config_from_hf(tiny_config())
# get_rope_index of transformers 4.51.3: prompts, each with its positions [3, tokens], or the last of them, and delta
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "mrope_video.json").read_text())
Grid = tuple[int, int, int]


def prompt_of(*parts: int | tuple[str, Grid], config: ModelConfig = CONFIG) -> tuple[list[int], list[Grid], list[Grid]]:
    """Token ids of texts (given by length) and pictures or clips (by kind and grid), and the grids of each kind."""
    ids: list[int] = []
    grids: dict[str, list[Grid]] = {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids += [7] * part
            continue
        kind, grid = part
        token = config.image_token_id if kind == "image" else config.video_token_id
        ids += [token] * (grid[0] * grid[1] * grid[2] // 4)
        grids[kind].append(grid)
    return ids, grids["image"], grids["video"]


def positions_of(ids: list[int], images: list[Grid], videos: list[Grid], start: int = 0) -> tuple[np.ndarray, int]:
    pictures = [Picture(kind, grid) for kind, grids in (("image", images), ("video", videos)) for grid in grids]
    return rope_positions(ids, pictures, CONFIG, start)


def trained(ids: list[int], images: list[Grid], videos: list[Grid]) -> tuple[np.ndarray, int]:
    """The rule of Qwen2-VL's own code and of transformers 4.45 to 5.2: each stretch of text or vision begins behind the
    largest position of any axis before it."""
    waiting = {CONFIG.image_token_id: list(images), CONFIG.video_token_id: list(videos)}
    stretches: list[np.ndarray] = []
    at = 0
    while at < len(ids):
        start = 1 + max((int(each.max()) for each in stretches), default=-1)
        if ids[at] in waiting:
            t, h, w = waiting[ids[at]].pop(0)
            times, rows, columns = np.meshgrid(range(t), range(h // 2), range(w // 2), indexing="ij")
            stretches.append(start + np.stack([times.ravel(), rows.ravel(), columns.ravel()]))
        else:
            stretches.append(np.full((3, 1), start))
        at += stretches[-1].shape[1]
    positions = np.concatenate(stretches, axis=1)
    return positions, int(positions.max()) + 1 - len(ids)


def installed(ids: list[int], images: list[Grid], videos: list[Grid]) -> tuple[np.ndarray, int]:
    """The installed transformers: from 5.3 on it lets text begin inside a clip of more steps than rows and columns."""
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = functools.partial(Qwen2VLModel.get_vision_position_ids, model)
    tensor = torch.tensor([ids])
    kinds = (tensor == CONFIG.image_token_id) * 1 + (tensor == CONFIG.video_token_id) * 2
    positions, delta = Qwen2VLModel.get_rope_index(
        model,
        tensor,
        mm_token_type_ids=kinds,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
    )
    return positions[:, 0].numpy(), int(delta.item())


def image(*grid: int) -> tuple[str, tuple[int, ...]]:
    return ("image", grid)


def video(*grid: int) -> tuple[str, tuple[int, ...]]:
    return ("video", grid)


MIXES = {
    "text only": (9,),
    "one token": (1,),
    "one image": (5, image(1, 8, 12), 6),
    "image first": (image(1, 4, 4), 3),
    "image last": (3, image(1, 4, 4)),
    "tall image": (5, image(1, 40, 4), 6),
    "smallest image": (2, image(1, 2, 2), 2),
    "several images": (5, image(1, 8, 12), 1, image(1, 2, 2), 4, image(1, 30, 4), 20),
    "a video": (5, video(4, 6, 8), 6),
    "a long video of small frames": (5, video(20, 4, 4), 6),
    "a long video last": (5, video(20, 4, 4)),
    "videos": (5, video(2, 6, 8), 2, video(3, 4, 4), 1),
    "image then video": (5, image(1, 8, 12), 3, video(4, 6, 8), 6),
    "video beside image": (5, video(4, 6, 8), image(1, 8, 12), 6),
    "several turns": (30, image(1, 8, 12), 40, video(4, 6, 8), 50, image(1, 4, 4), 60),
}


def agree(found: tuple[np.ndarray, int], expected: tuple[np.ndarray, int]) -> None:
    assert found[0].dtype == np.int64
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: str(case["parts"]))
def test_positions_and_delta_are_those_recorded_of_the_rule_that_checkpoints_were_trained_with(
    case: dict[str, Any],
) -> None:
    parts: list[Any] = []
    for part in case["parts"]:
        # the two marks around a clip or picture are text
        parts += [part] if isinstance(part, int) else [1, (part[0], tuple(part[1])), 1]
    given = prompt_of(*parts)
    positions, delta = positions_of(*given)
    assert (positions[:, -1].tolist(), delta) == (case["last"], case["delta"])
    if "positions" in case:
        assert positions.tolist() == case["positions"]
    agree(trained(*given), (positions, delta))


@pytest.mark.parametrize("parts", MIXES.values(), ids=MIXES.keys())
def test_positions_and_delta_are_those_of_training(parts):
    given = prompt_of(*parts)
    agree(positions_of(*given), trained(*given))


def is_short(part: Any) -> bool:
    return isinstance(part, int) or part[1][0] <= max(part[1][1:]) // 2


@pytest.mark.parametrize(
    "parts", [parts for parts in MIXES.values() if all(map(is_short, parts))], ids=lambda parts: str(parts)[:60]
)
def test_positions_and_delta_are_those_of_transformers_but_after_long_clips(parts):
    given = prompt_of(*parts)
    agree(positions_of(*given), installed(*given))


def test_random_mixes_have_the_positions_of_training_and_without_long_clips_those_of_transformers():
    random = np.random.default_rng(0)
    compared = 0
    for _ in range(200):
        parts: list = [int(random.integers(1, 9))]
        for _ in range(random.integers(0, 6)):
            t, h, w = random.integers(1, 9, 3).tolist()
            parts += [image(1, 2 * h, 2 * w) if random.random() < 0.6 else video(t, 2 * h, 2 * w)]
            parts += [int(random.integers(0, 9))]
        given = prompt_of(*parts)
        agree(positions_of(*given), trained(*given))
        if all(map(is_short, parts)) and 0 not in parts:
            # it takes clips that touch for one
            agree(positions_of(*given), installed(*given))
            compared += 1
    assert 50 < compared < 180


def test_two_images_without_text_between_them_keep_a_grid_each():
    ids, images, videos = prompt_of(2, image(1, 4, 4), image(1, 2, 6), 1)
    positions, _ = positions_of(ids, images, videos)
    # 2 texts; 2 x 2 from 2 on; 1 x 3 from 4 on; the text after that at 4 + 3
    assert positions[1].tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 4, 7]
    assert positions[2].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("begun", [(4, image(1, 6, 8), 5), (4, video(9, 4, 4), 5), (4, video(9, 4, 4))], ids=str)
@pytest.mark.parametrize(
    "parts", [(7,), (3, image(1, 8, 4), 5), (3, video(2, 4, 4), 1, image(1, 4, 4), 2), (1, video(7, 4, 6), 2)], ids=str
)
def test_a_conversation_continued_from_the_next_position_has_the_positions_of_the_whole(begun, parts):
    first, first_images, first_videos = prompt_of(*begun)
    _, delta = positions_of(first, first_images, first_videos)
    following = len(first) + delta

    more, more_images, more_videos = prompt_of(*parts)
    added, added_delta = positions_of(more, more_images, more_videos, start=following)

    whole, _ = trained(first + more, first_images + more_images, first_videos + more_videos)
    np.testing.assert_array_equal(added, whole[:, len(first) :])
    assert len(more) + added_delta == whole.max() + 1


@pytest.mark.parametrize(
    ("ids", "images", "videos", "said"),
    [
        ([7, CONFIG.image_token_id], [], [], "no image was given"),
        ([7, CONFIG.video_token_id], [(1, 2, 2)], [], "no video was given"),
        ([7, 7], [(1, 2, 2)], [], "without a placeholder"),
        ([7, CONFIG.image_token_id, 7], [(1, 4, 4)], [], "needs 4 placeholders"),
        ([7, CONFIG.image_token_id, CONFIG.image_token_id], [(1, 2, 2)], [], "no image was given"),
        ([CONFIG.image_token_id], [(1, 4, 4)], [], "needs 4 placeholders"),
        ([CONFIG.image_token_id], [(1, 3, 2)], [], "multiples of 2"),
        ([], [], [], "non-empty"),
    ],
)
def test_placeholders_that_do_not_match_the_pictures_are_refused(ids, images, videos, said):
    with pytest.raises(RequestError, match=said):
        positions_of(ids, images, videos)


def test_a_negative_start_is_refused():
    with pytest.raises(RequestError, match="start"):
        positions_of([1], [], [], start=-1)
