"""The language model as ONNX: one model for prefill and decode, with a free number of rows and tokens.

Shapes as in toolchain/models/text.py, which this follows operator by operator: B rows, S tokens, H hidden_size,
D head_dim, KV num_kv_heads x D, L cache length, V vocabulary.
"""

import numpy as np

from ...artifacts.onnx_ops import MICROSOFT
from ...runtime.models.config import TextConfig
from .graph import Graph
from .linear import TABLE_BITS, Linears
from .rotary import frequencies, rotary_tables


def add_text(graph: Graph, linears: Linears, config: TextConfig) -> None:
    """Inputs: token_ids [B, S]; image_embeds [M, H] replace the embeddings at image_index [M, 1], counted over B x S;
    positions [3, B, S] of M-RoPE; kv_lengths [B], with the new tokens; last [1], the token whose logits are wanted;
    key.N and value.N, a cache each. A cache is [B, num_kv_heads, L, D], or [B, L, KV] with standard operators only;
    its new content, present_key.N and present_value.N, may be bound to the same memory.
    Outputs: next_token [B], logits [B, V].
    """
    _Text(graph, linears, config).run()


class _Text:
    def __init__(self, graph: Graph, linears: Linears, config: TextConfig) -> None:
        self.graph, self.linears, self.config = graph, linears, config
        self.standard = linears.form.standard_only
        self.cache_shape: list[int | str] = (
            ["rows", "length", config.kv_dim]
            if self.standard
            else ["rows", config.num_kv_heads, "length", config.head_dim]
        )

    def run(self) -> None:
        graph, linears, config = self.graph, self.linears, self.config
        ids = graph.input("token_ids", "int64", ["rows", "tokens"])
        images = graph.input("image_embeds", "fp32", ["merged_patches", config.hidden_size])
        index = graph.input("image_index", "int64", ["merged_patches", 1])
        positions = graph.input("positions", "int64", [3, "rows", "tokens"])
        lengths = graph.input("kv_lengths", "int64", ["rows"])
        self.last = graph.input("last", "int64", [1])
        self.flat = graph.constant("flat", [-1, config.hidden_size], np.int64)
        embedded = linears.embedding(ids, "model.embed_tokens.weight", "embed")
        embedded = graph.node("Reshape", "embed.flat", embedded, self.flat)
        x = graph.node("ScatterND", "embed.images", embedded, index, images)
        # [B, S, -1], whatever the width
        self.by_token = graph.node(
            "Concat",
            "by_token",
            graph.node("Shape", "by_token.rows", ids),
            graph.constant("any", [-1], np.int64),
            axis=0,
        )
        self.cos, self.sin = rotary_tables(graph, positions, _axes(config), ("rows", "tokens"))
        self._lengths(ids, lengths)
        residual = x
        for i in range(config.num_layers):
            x, residual = self._layer(i, x, residual)
        y, _ = linears.add_norm(residual, x, "model.norm", "norm", config.rms_norm_eps, bias=False)
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        bits = TABLE_BITS if linears.form.bits else None
        logits = linears.blocks(y, head, "logits", bias=False, bits=bits)
        graph.node("ArgMax", "next_token", logits, axis=-1, keepdims=0)
        graph.output("next_token", "int64", ["rows"])
        graph.output("logits", "fp32", ["rows", config.vocab_size])
        for i in range(config.num_layers):
            graph.output(f"present_key.{i}", "fp32", self.cache_shape)
            graph.output(f"present_value.{i}", "fp32", self.cache_shape)

    def _lengths(self, ids: str, lengths: str) -> None:
        graph = self.graph
        if self.standard:
            tokens = graph.node("Shape", "tokens", ids, start=1, end=2)
            self.kv_lengths, self.write_at = lengths, graph.node("Sub", "write_at", lengths, tokens)
            return
        before = graph.node("Sub", "last_position", lengths, graph.constant("one_int", 1, np.int64))
        self.last_position = graph.cast("last_position.int32", before, "int32")
        longest = graph.node("ReduceMax", "longest", lengths, keepdims=0)
        self.longest = graph.cast("longest.int32", longest, "int32")

    def _layer(self, i: int, x: str, residual: str) -> tuple[str, str]:
        """x is what the layer before adds to the residual; returns the same of this one."""
        graph, linears, name, parameter = self.graph, self.linears, f"layer.{i}", f"model.layers.{i}"
        norm = (f"{parameter}.input_layernorm", f"{name}.input_norm", self.config.rms_norm_eps)
        if i == 0:
            y = linears.norm(x, *norm, bias=False)
        else:
            y, residual = linears.add_norm(residual, x, *norm, bias=False)
        attention = self._attention(i, y)
        if i == self.config.num_layers - 1:
            # only the last position's logits are wanted: nothing after the last attention is needed of the others
            attention = self._only_last(attention, f"{name}.attention.last")
            by_token = graph.node("Reshape", f"{name}.residual.by_token", residual, self.by_token)
            residual = self._only_last(by_token, f"{name}.residual.last")
        attention = graph.node("Reshape", f"{name}.attention.flat", attention, self.flat)
        out = linears.blocks(attention, f"{parameter}.self_attn.o_proj", f"{name}.attention.out", bias=False)
        norm = (f"{parameter}.post_attention_layernorm", f"{name}.mlp_norm", self.config.rms_norm_eps)
        y, residual = linears.add_norm(residual, out, *norm, bias=False)
        return self._mlp(f"{parameter}.mlp", f"{name}.mlp", y), residual

    def _only_last(self, x: str, name: str) -> str:
        """[B, S, H] to [B, H]."""
        return self.graph.node(
            "Reshape", name, self.graph.node("Gather", f"{name}.row", x, self.last, axis=1), self.flat
        )

    def _mlp(self, parameter: str, name: str, x: str) -> str:
        graph = self.graph
        gate_up = self.linears.blocks(x, f"{parameter}.gate_up_proj", f"{name}.gate_up", bias=False)
        gate, up = graph.nodes(
            "Split", f"{name}.split", gate_up, outputs=(f"{name}.gate", f"{name}.up"), axis=-1, num_outputs=2
        )
        swish = self.linears.swish(gate, f"{name}.swish")
        product = graph.node("Mul", f"{name}.swiglu", swish, up)
        return self.linears.blocks(product, f"{parameter}.down_proj", f"{name}.down", bias=False)

    def _attention(self, i: int, x: str) -> str:
        """x [B * S, H] to [B, S, H], before the output projection."""
        graph, config, name = self.graph, self.config, f"layer.{i}.attention"
        qkv = self.linears.blocks(x, f"model.layers.{i}.self_attn.qkv_proj", f"{name}.qkv")
        widths = graph.constant("qkv_widths", [config.hidden_size, config.kv_dim, config.kv_dim], np.int64)
        q, k, v = graph.nodes(
            "Split",
            f"{name}.split",
            graph.node("Reshape", f"{name}.by_token", qkv, self.by_token),
            widths,
            outputs=tuple(f"{name}.{each}" for each in "qkv"),
            axis=-1,
        )
        q, k = (
            graph.node("RotaryEmbedding", f"{name}.rope_{each}", value, self.cos, self.sin, num_heads=heads)
            for each, value, heads in (("q", q, config.num_heads), ("k", k, config.num_kv_heads))
        )
        keys = graph.input(f"key.{i}", "fp32", self.cache_shape)
        values = graph.input(f"value.{i}", "fp32", self.cache_shape)
        present = (f"present_key.{i}", f"present_value.{i}")
        if not self.standard:
            return graph.nodes(
                "GroupQueryAttention",
                name,
                *(q, k, v, keys, values, self.last_position, self.longest),
                outputs=(name, *present),
                domain=MICROSOFT,
                num_heads=config.num_heads,
                kv_num_heads=config.num_kv_heads,
                scale=config.head_dim**-0.5,
            )[0]
        for new, cache, out in ((k, keys, present[0]), (v, values, present[1])):
            graph.nodes("TensorScatter", out, cache, new, self.write_at, outputs=(out,), axis=1)
        return graph.node(
            "Attention",
            name,
            *(q, *present, "", "", "", self.kv_lengths),
            is_causal=1,
            q_num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=config.head_dim**-0.5,
        )


def _axes(config: TextConfig) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Frequencies [3, D / 2] by axis: each turns by the temporal, height or width position, and is 0 for the others."""
    turning = np.repeat(np.arange(3), config.mrope_section)
    return np.where(turning == np.arange(3)[:, None], frequencies(config.head_dim, config.rope_theta), np.float32(0))
