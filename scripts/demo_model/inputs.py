"""Prompts as the inputs of transformers' Qwen2-VL, and labels to learn their answers from."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2vl_tc.runtime.text.prompt import Processor, Prompt
from tests.helpers.synthetic import preprocessor_config

# cross_entropy's default
IGNORED = -100


class HfInputs:
    """Makes a padded batch of prompts, each with one picture, one clip or neither."""

    def __init__(self, processor: Processor) -> None:
        self._config = processor.config
        self._pad = processor.tokenizer.token_to_id("<|endoftext|>")
        self._head = processor.tokenizer.encode("<|im_start|>assistant\n").ids
        self._end = processor.tokenizer.token_to_id("<|im_end|>")
        settings = preprocessor_config(processor.config)
        values = processor.settings.patch_dim // 3
        self._mean = np.repeat(np.float32(settings["image_mean"]) * 255, values)
        self._std = np.repeat(np.float32(settings["image_std"]) * 255, values)

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """What the model takes by keyword; prompts are padded on the right."""
        ids = np.full((len(prompts), max(len(p.token_ids) for p in prompts)), self._pad)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.token_ids)] = prompt.token_ids
            mask[row, : len(prompt.token_ids)] = 1
        kinds = (ids == self._config.image_token_id) + 2 * (ids == self._config.video_token_id)
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
        for kind, pixels, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if chosen := [p for p in prompts if [each.kind for each in p.pictures] == [kind]]:
                inputs[pixels] = self.normalised(np.concatenate([p.patches for p in chosen]))
                inputs[grids] = np.concatenate([p.grids for p in chosen])
        return {name: torch.from_numpy(value) for name, value in inputs.items()}

    def normalised(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What transformers' picture processor makes of uint8 patches [n, patch_dim]."""
        return (patches.astype(np.float32) - self._mean) / self._std

    def labels(self, prompts: Sequence[Prompt]) -> Tensor:
        """[prompts, tokens]: the token to follow each one where that is an assistant's, IGNORED elsewhere."""
        labels = np.full((len(prompts), max(len(p.token_ids) for p in prompts)), IGNORED)
        for row, prompt in enumerate(prompts):
            for start, end in self._answers(prompt.token_ids):
                labels[row, start - 1 : end - 1] = prompt.token_ids[start:end]
        return torch.from_numpy(labels)

    def _answers(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Where each of the assistant's messages starts and ends, its end token included."""
        head = self._head
        for end in np.flatnonzero(ids == self._end).tolist():
            start = end
            while start and ids[start - 1] != self._end:
                start -= 1
            # after a message's end token comes a newline
            at = start + 1 + len(head)
            if ids[start + 1 : at].tolist() == head:
                yield at, end + 1
