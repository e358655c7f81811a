"""M-RoPE positions equal those of transformers' get_rope_index."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from qwen2vl_tc.artifacts.config import ModelConfig, model_config_from_hf
from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.runtime.positions import rope_positions
from qwen2vl_tc.toolchain.synthetic import tiny_config

CONFIG = model_config_from_hf(tiny_config())
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


def original(ids: list[int], images: list[Grid], videos: list[Grid]) -> tuple[np.ndarray, int]:
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


@pytest.mark.parametrize("parts", MIXES.values(), ids=MIXES.keys())
def test_positions_and_delta_are_those_of_transformers(parts):
    ids, images, videos = prompt_of(*parts)
    positions, delta = rope_positions(ids, images, videos, CONFIG)
    expected, expected_delta = original(ids, images, videos)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected)
    assert delta == expected_delta


def test_random_mixes_have_the_positions_of_transformers():
    random = np.random.default_rng(0)
    for _ in range(200):
        parts: list = [int(random.integers(1, 9))]
        for _ in range(random.integers(0, 6)):
            t, h, w = random.integers(1, 6, 3).tolist()
            parts += [image(1, 2 * h, 2 * w) if random.random() < 0.6 else video(t, 2 * h, 2 * w)]
            parts += [int(random.integers(1, 9))]
        ids, images, videos = prompt_of(*parts)
        positions, delta = rope_positions(ids, images, videos, CONFIG)
        expected, expected_delta = original(ids, images, videos)
        np.testing.assert_array_equal(positions, expected)
        assert delta == expected_delta


def test_two_images_without_text_between_them_keep_a_grid_each():
    ids, images, videos = prompt_of(2, image(1, 4, 4), image(1, 2, 6), 1)
    positions, _ = rope_positions(ids, images, videos, CONFIG)
    # 2 texts; 2 x 2 from 2 on; 1 x 3 from 4 on; the text after that at 4 + 3
    assert positions[1].tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 4, 7]
    assert positions[2].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("parts", [(7,), (3, image(1, 8, 4), 5), (3, video(2, 4, 4), 1, image(1, 4, 4), 2)])
def test_a_conversation_continued_from_the_next_position_has_the_positions_of_the_whole(parts):
    first, first_images, first_videos = prompt_of(4, image(1, 6, 8), 5)
    _, delta = rope_positions(first, first_images, first_videos, CONFIG)
    following = len(first) + delta

    more, more_images, more_videos = prompt_of(*parts)
    added, added_delta = rope_positions(more, more_images, more_videos, CONFIG, start=following)

    whole, _ = original(first + more, first_images + more_images, first_videos + more_videos)
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
        rope_positions(ids, images, videos, CONFIG)


def test_a_negative_start_is_refused():
    with pytest.raises(RequestError, match="start"):
        rope_positions([1], [], [], CONFIG, start=-1)
