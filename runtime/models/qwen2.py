"""The language model of Qwen2, which several families have behind towers of their own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ...artifacts.errors import ConfigError
from .base import Argument, GraphOptions, GraphSpec, Role, Split, Weight, linear, norm, table
from .config import ModelConfig, TextConfig, VisionConfig
from .fields import Rope, Section, read_rope

# What transformers' text configs of Qwen2-VL and Qwen2.5-VL take for a field that is left out: the same numbers in all
# of its versions 4.45 to 5.23.
TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    # versions before 5 raise where it is missing; this is 5's
    "mrope_section": [16, 24, 24],
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
WHOLE_DEFAULTS: Mapping[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
}
Config = TypeVar("Config", bound=ModelConfig)


def read_config(
    plain: dict[str, Any],
    config: type[Config],
    read_vision: Callable[[Section], VisionConfig],
    vision_defaults: Mapping[str, Any],
) -> Config:
    """A parsed HF config.json, flat (published) or nested (`text_config`), as a family's config; what it leaves out has
    the default of transformers' classes. Raises ConfigError naming the field."""
    whole = Section(plain, WHOLE_DEFAULTS)
    nested = plain.get("text_config") is not None
    text = whole.inner("text_config", TEXT_DEFAULTS) if nested else Section(plain, TEXT_DEFAULTS)
    rope = read_rope(text)
    if nested and (plain.get("rope_scaling") or plain.get("rope_parameters")):
        # transformers reads the one in text_config alone; who changed this one expects it to count
        outer = read_rope(Section(plain, {**TEXT_DEFAULTS, "rope_theta": rope.theta}))
        if outer != rope:
            raise ConfigError(
                f"config.json: rope_scaling or rope_parameters at the top says {outer}, text_config {rope}; keep the "
                "one in text_config"
            )
    # saved by versions from 4.52 in text_config; 5 ties where either says so
    tied = whole.flag("tie_word_embeddings") or text.flag("tie_word_embeddings")
    return config(
        model_type=plain["model_type"],
        text=_read_text(text, rope, tied),
        vision=read_vision(whole.inner("vision_config", vision_defaults)),
        image_token_id=whole.whole("image_token_id", 0),
        video_token_id=whole.whole("video_token_id", 0),
        vision_start_token_id=whole.whole("vision_start_token_id", 0),
        vision_end_token_id=whole.whole("vision_end_token_id", 0),
    )


def _read_text(text: Section, rope: Rope, tied: bool) -> TextConfig:
    heads = text.whole("num_attention_heads")
    config = TextConfig(
        hidden_size=text.whole("hidden_size"),
        intermediate_size=text.whole("intermediate_size"),
        num_layers=text.whole("num_hidden_layers"),
        num_heads=heads,
        # null, unlike absence, means one per head
        num_kv_heads=heads if text.fields.get("num_key_value_heads", 0) is None else text.whole("num_key_value_heads"),
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        rope_theta=rope.theta,
        mrope_section=rope.section,
        tie_word_embeddings=tied,
        max_position_embeddings=text.whole("max_position_embeddings"),
    )
    text.only("hidden_act", "silu")
    text.only("use_sliding_window", False, None, why="sliding-window attention is not supported")
    # transformers computes with biases in q, k and v alone, whatever these say
    text.only("attention_bias", True, None)
    text.only("mlp_bias", False, None)
    text.only("head_dim", config.hidden_size // heads, None, why="hidden_size / num_attention_heads")
    layers = text.fields.get("layer_types")
    if layers is not None and layers != ["full_attention"] * config.num_layers:
        raise text.error("layer_types", f"full_attention for each of the {config.num_layers} layers")
    return config


def weights(text: TextConfig) -> Iterator[Weight]:
    """The decoder's weights, in load order."""
    hidden, inner = text.hidden_size, text.intermediate_size
    yield table("model.embed_tokens", text.vocab_size, hidden, Role.EMBEDDING)
    for i in range(text.num_layers):
        yield from attention_weights(f"model.layers.{i}", text)
        layer = f"model.layers.{i}.mlp"
        yield from linear(
            f"{layer}.gate_up_proj", 2 * inner, hidden, bias=False, parts={"gate_proj": inner, "up_proj": inner}
        )
        yield from linear(f"{layer}.down_proj", hidden, inner, bias=False, split=Split.ROW, reads="SwiGLU's output")
    yield from norm("model.norm", hidden, reads="the residual stream")
    if not text.tie_word_embeddings:
        yield table("lm_head", text.vocab_size, hidden, Role.HEAD)


def attention_weights(layer: str, text: TextConfig, shift: bool = False) -> Iterator[Weight]:
    """A layer's norms and attention. shift: whether the norms have one."""
    hidden, kv = text.hidden_size, text.kv_dim
    qkv = {"q_proj": hidden, "k_proj": kv, "v_proj": kv}
    yield from norm(f"{layer}.input_layernorm", hidden, shift=shift, reads="the residual stream")
    yield from linear(f"{layer}.self_attn.qkv_proj", hidden + 2 * kv, hidden, parts=qkv)
    yield from linear(
        f"{layer}.self_attn.o_proj", hidden, hidden, bias=False, split=Split.ROW, reads="the attention's output"
    )
    yield from norm(
        f"{layer}.post_attention_layernorm", hidden, shift=shift, reads="the residual stream after attention"
    )


def graphs(text: TextConfig, options: GraphOptions) -> Iterator[GraphSpec]:
    """prefill of one row, and decode_b<rows> for every batch size."""
    length, layers = options.max_length, text.num_layers

    def caches(rows: int) -> tuple[Argument, Argument]:
        shape = (rows, length, text.kv_dim)
        return Argument("keys", "model", shape, "cache"), Argument("values", "model", shape, "cache")

    def chosen(rows: int) -> tuple[Argument, ...]:
        checked = (Argument("checked_token", "int64", (rows,)),) if options.by_head else ()
        return (
            Argument("next_token", "int64", (rows,)),
            *checked,
            Argument("logits", "model", (rows, text.vocab_size)),
        )

    mask = (Argument("mask", "bool", (1, 1, "tokens", length)),) if options.operators == "recipe" else ()
    yield GraphSpec(
        "prefill",
        "prefill",
        "prefill",
        (
            Argument("token_ids", "int64", ("tokens",)),
            Argument("image_embeds", "model", ("image_tokens", text.hidden_size)),
            Argument("image_index", "int64", ("image_tokens", 1)),
            Argument("positions", "int64", (3, "tokens")),
            Argument("cache_index", "int64", (1,)),
            Argument("last", "int64", (1,)),
            Argument("kv_lengths", "int64", (1,), "lengths"),
            *caches(1),
            *mask,
        ),
        chosen(1),
        layers,
    )
    for rows in options.batches:
        place = Argument("positions", "int64", (rows,), indexes="text_rope")
        if options.by_head:
            place = Argument("rope_rows", "int64", (rows, text.rotary_heads), indexes="text_rope")
        index = Argument("cache_index", "int64", (rows,))
        yield GraphSpec(
            f"decode_b{rows}",
            "decode",
            "decode",
            (
                Argument("token_ids", "int64", (rows,)),
                index,
                place,
                Argument("kv_lengths", "int64", (rows,), "lengths"),
                *caches(rows),
            ),
            (*chosen(rows), index, place),
            layers,
        )
