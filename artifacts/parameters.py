"""The restructured weights: names, shapes and order. The converter, the graphs and the runtime all follow this list."""

from collections.abc import Iterator
from dataclasses import dataclass

from .config import ModelConfig

FP32 = "fp32"
MODEL_DTYPE = "model"


@dataclass(frozen=True)
class Parameter:
    """One tensor of the artifact. `dtype` is "model" (the artifact's --dtype) or "fp32" whatever that is."""

    name: str
    shape: tuple[int, ...]
    dtype: str = MODEL_DTYPE

    @property
    def size(self) -> int:
        total = 1
        for dimension in self.shape:
            total *= dimension
        return total


def _linear(name: str, outputs: int, inputs: int, bias: str | None) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (outputs, inputs))
    if bias:
        yield Parameter(f"{name}.bias", (outputs,), bias)


def _layer_norm(name: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,))
    yield Parameter(f"{name}.bias", (width,))


def parameters(config: ModelConfig, biases: str | None = FP32) -> Iterator[Parameter]:
    """Every parameter of the graphs in load order: visual first (it runs first), then the text model.

    biases: dtype of the linear layers' biases, WeightsPart.bias_dtype. The device's MatMul takes an fp32 bias beside
    half-precision weights, and a bias of any other dtype costs a Cast a node; None is the model's dtype, as the
    schemas before 3 have it.
    """
    bias = biases or MODEL_DTYPE
    vision, text = config.vision, config.text
    width = vision.embed_dim
    yield Parameter("visual.patch_embed.weight", (width, vision.patch_dim))
    # the folded mean is a large constant: fp32 keeps it exact, and MatMul takes an fp32 bias beside bf16 weights
    yield Parameter("visual.patch_embed.bias", (width,), FP32)
    for i in range(vision.depth):
        block = f"visual.blocks.{i}"
        yield from _layer_norm(f"{block}.norm1", width)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width, bias)
        yield from _linear(f"{block}.attn.proj", width, width, bias)
        yield from _layer_norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.mlp.fc1", vision.mlp_dim, width, bias)
        yield from _linear(f"{block}.mlp.fc2", width, vision.mlp_dim, bias)
    yield from _layer_norm("visual.merger.ln_q", width)
    yield from _linear("visual.merger.mlp.0", vision.merged_dim, vision.merged_dim, bias)
    yield from _linear("visual.merger.mlp.2", vision.hidden_size, vision.merged_dim, bias)

    hidden, inner = text.hidden_size, text.intermediate_size
    yield Parameter("model.embed_tokens.weight", (text.vocab_size, hidden))
    for i in range(text.num_layers):
        layer = f"model.layers.{i}"
        yield Parameter(f"{layer}.input_layernorm.weight", (hidden,))
        yield from _linear(f"{layer}.self_attn.qkv_proj", hidden + 2 * text.kv_dim, hidden, bias)
        yield from _linear(f"{layer}.self_attn.o_proj", hidden, hidden, None)
        yield Parameter(f"{layer}.post_attention_layernorm.weight", (hidden,))
        yield from _linear(f"{layer}.mlp.gate_up_proj", 2 * inner, hidden, None)
        yield from _linear(f"{layer}.mlp.down_proj", hidden, inner, None)
    yield Parameter("model.norm.weight", (hidden,))
    if not text.tie_word_embeddings:
        yield Parameter("lm_head.weight", (text.vocab_size, hidden))
