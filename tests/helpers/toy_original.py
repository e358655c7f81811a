"""The toy family in transformers, the measure that it is verified by: Qwen2-VL with its layers."""

import transformers
from torch import Tensor, nn
from transformers.models.qwen2_vl import modeling_qwen2_vl as original

from .toy import CLOCK


class ToyConfig(transformers.Qwen2VLConfig):
    model_type = "toy_vl"


class ToyMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class ToyForConditionalGeneration(original.Qwen2VLForConditionalGeneration):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        config.vision_config.tokens_per_second = CLOCK
        text = config.text_config
        width, eps = text.hidden_size, text.rms_norm_eps
        decoder = self.model.language_model
        decoder.norm = nn.LayerNorm(width, eps)
        for layer in decoder.layers:
            layer.input_layernorm, layer.post_attention_layernorm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
            layer.mlp = ToyMlp(width, text.intermediate_size)


def register() -> None:
    """Let transformers' Auto classes know it."""
    transformers.AutoConfig.register("toy_vl", ToyConfig, exist_ok=True)
    transformers.AutoModelForImageTextToText.register(ToyConfig, ToyForConditionalGeneration, exist_ok=True)
