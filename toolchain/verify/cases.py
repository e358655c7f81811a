"""What verification asks of the model: deterministic pictures and prompts that every tokenizer can express."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...artifacts.errors import ArtifactError, TargetError
from ...runtime.pictures.request import VisionOptions
from ...runtime.text.prompt import Processor, Prompt

# (width, height): no multiples of a merge window, so that resizing is checked too; small, so that the 16 decode steps
# and not the pictures take the time
_FIRST, _SECOND = (150, 117), (61, 90)
# Steps in time of the clip, each of at most 4 merge windows: more than its rows and columns, so that the positions of
# the text behind it depend on its length.
_FRAME, _FRAME_WINDOWS, _CLIP_STEPS = (61, 57), 4, 6
_QUESTION = "What is in the picture? Describe 3 things that you see."


@dataclass(frozen=True, eq=False)
class Case:
    """One request: its pictures, for transformers' own image processor, and the prompt that the artifact makes.

    clip: the frames of a video, each resized to about clip_area pixels; clip_seconds: from one step of its grid to the
    next, of frames without a rate.
    """

    name: str
    pictures: tuple[Image.Image, ...]
    prompt: Prompt
    clip: tuple[Image.Image, ...] = ()
    clip_area: int = 0
    clip_seconds: float = 1.0


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth gradient, two flat shapes and noise: all of low, sharp and high frequencies; equal on every machine."""
    rows, columns = np.mgrid[0:height, 0:width]
    ramps = [columns * 255 // width, rows * 255 // height, (rows + columns) * 255 // (width + height)]
    pixels = np.stack(ramps[seed % 3 :] + ramps[: seed % 3], -1).astype(np.int64)
    pixels[height // 5 : height // 2, width // 6 : width // 2] = (220, 40, 90)
    disc = (rows - height * 2 // 3) ** 2 + (columns - width * 2 // 3) ** 2 < (min(width, height) // 5) ** 2
    pixels[disc] = (20, 200, 60)
    pixels += np.random.default_rng(seed).integers(-24, 25, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _content(processor: Processor, kind: str, count: int, template: bool) -> Any:
    """A question about `count` pictures or clips: messages, or without a chat template a raw prompt."""
    if template:
        return [{"role": "user", "content": [*[{"type": kind}] * count, {"type": "text", "text": _QUESTION}]}]
    config, token = processor.config, processor.tokenizer.id_to_token
    middle = config.image_token_id if kind == "image" else config.video_token_id
    marks = (config.vision_start_token_id, middle, config.vision_end_token_id)
    return "".join(token(mark) or "" for mark in marks) * count + _QUESTION


def template_problem(processor: Processor) -> str | None:
    """Why prompts are made without the artifact's chat template; None when it works."""
    try:
        _ = processor.template
    except ArtifactError as error:
        # the graphs can be verified without it
        return str(error)
    return None


def make_cases(processor: Processor, max_length: int) -> tuple[Case, ...]:
    """One picture, two of different sizes, a clip, text only. Raises TargetError if one does not fit the KV cache."""
    template = template_problem(processor) is None
    first, second = picture(*_FIRST, seed=1), picture(*_SECOND, seed=2)
    cases = []
    for name, pictures in (("one image", (first,)), ("two images", (first, second)), ("text only", ())):
        request = _content(processor, "image", len(pictures), template)
        cases.append(Case(name, pictures, processor.prepare(request, pictures)))
    clip = tuple(picture(*_FRAME, seed) for seed in range(_CLIP_STEPS * processor.settings.temporal_patch_size))
    area = _FRAME_WINDOWS * processor.settings.factor**2
    small = VisionOptions(min_pixels=area, max_pixels=area, video_sampling="transformers")
    prompt = processor.prepare(_content(processor, "video", 1, template), videos=[clip], vision=small)
    cases.insert(2, Case("a clip", (), prompt, clip, area))
    longest = max(len(case.prompt.token_ids) for case in cases)
    if longest >= max_length:
        raise TargetError(
            f"verification needs a cache of at least {longest + 1} tokens, the artifact has {max_length}; compile it "
            f"with --max-length {longest + 1} or more"
        )
    return tuple(cases)
