"""A model family that no file of the project knows: Qwen2-VL's tower before a decoder with another norm, another MLP
and another position rule."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2vl_tc.runtime.models import qwen2, qwen2_vl
from qwen2vl_tc.runtime.models.base import Family, Picture, Role, Split, Weight, linear, norm, table
from qwen2vl_tc.runtime.models.config import ModelConfig
from qwen2vl_tc.runtime.models.positions import rope_positions

# positions from one step of a clip to the next
CLOCK = 3


def read_config(plain: dict[str, Any]) -> ModelConfig:
    return qwen2.read_config(plain, ModelConfig, qwen2_vl.read_vision, qwen2_vl.VISION_DEFAULTS)


def weights(config: ModelConfig) -> Iterator[Weight]:
    text = config.text
    yield from qwen2_vl.tower_weights(config.vision)
    yield table("model.embed_tokens", text.vocab_size, text.hidden_size, Role.EMBEDDING)
    for i in range(text.num_layers):
        yield from qwen2.attention_weights(f"model.layers.{i}", text, shift=True)
        yield from linear(f"model.layers.{i}.mlp.fc1", text.intermediate_size, text.hidden_size)
        yield from linear(f"model.layers.{i}.mlp.fc2", text.hidden_size, text.intermediate_size, split=Split.ROW)
    yield from norm("model.norm", text.hidden_size, shift=True)
    yield table("lm_head", text.vocab_size, text.hidden_size, Role.HEAD)


class ClockInputs(qwen2_vl.SegmentInputs):
    def positions(
        self, token_ids: NDArray[np.int64], pictures: Sequence[Picture], start: int = 0
    ) -> tuple[NDArray[np.int64], int]:
        return rope_positions(token_ids, pictures, self.config, start, lambda steps, seconds: steps * CLOCK)


FAMILY = Family(
    name="toy_vl",
    config=ModelConfig,
    read_config=read_config,
    weights=weights,
    graphs=qwen2_vl.graphs,
    inputs=ClockInputs,
    modules="helpers.toy_modules",
)
