"""Which variants of the graphs are measured: the modules with one optimisation undone, as the published recipe or plain
transformers has it, and what was tried beyond.

Each variant swaps classes or methods of `toolchain.graphs` while the model is built and traced; nothing else changes.
No variant is ever shipped: they exist to be counted.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from ablation_text import (
    AllLogits,
    AttentionV2,
    ConcatAttention,
    ConcatModel,
    HostLoopModel,
    PairRotation,
    PerLayerRope,
    PerLayerRopeModel,
    PlainAttention,
    PlainRotation,
    Prefetching,
    ScatterPair,
    SeparateRotations,
    ThreeProducts,
    TwoProductsMlp,
    add_then_norm,
    all_rows,
    blocked_cache,
    growing_cache,
    host_loop,
    narrow_rotary,
    plain_linear,
    plain_logits,
    plain_rms_add,
    plain_rms_norm,
    silu_mul,
)
from ablation_visual import (
    FusedFfn,
    PerLayerRopeVisual,
    PerLayerRopeVisualAttention,
    PixelModel,
    VisualJointRotation,
    VisualOneRotation,
    VisualPlainRotation,
    VisualThreeProducts,
    WideRopeVisual,
    host_normalised,
    plain_masked,
    quick_gelu,
)

from qwen2vl_tc.artifacts.config import ModelConfig
from qwen2vl_tc.exporters.torchair.passes import PASSES
from qwen2vl_tc.toolchain.graphs import signatures, text, visual
from qwen2vl_tc.toolchain.graphs.form import Form
from qwen2vl_tc.toolchain.graphs.layers import LayerNorm, Linear, RMSNorm
from qwen2vl_tc.toolchain.graphs.signatures import CACHES, Qwen2VL, Signature

Change = Callable[[Qwen2VL, Signature], Signature]
VISUAL, PREFILL, DECODE = "visual", "prefill", "decode_b1"


TEXT = (PREFILL, DECODE)


ALL = (VISUAL, PREFILL, DECODE)


Patch = tuple[Any, str, Any]


OURS, MASKED, RECIPE = Form(), Form(visual_attention="masked"), Form(operators="recipe")


@dataclass(frozen=True)
class Variant:
    """undone: what the optimisation replaces. graphs: those that it concerns. patches: (owner, attribute, stand-in)."""

    name: str
    undone: str
    graphs: tuple[str, ...]
    patches: tuple[Patch, ...] = ()
    form: Form = OURS
    passes: tuple[str, ...] = tuple(PASSES)
    change: Change | None = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, attribute, standin in self.patches:
                stack.enter_context(mock.patch.object(owner, attribute, standin))
            yield


def trace_variant(variant: Variant, config: ModelConfig, max_length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The variant's graphs by name, as (ModelDef, Binding), traced by torchair and run through its passes.

    The device must be open. Raises TargetError for what torchair cannot trace.
    """
    from qwen2vl_tc.exporters.torchair.passes import run_passes
    from qwen2vl_tc.exporters.torchair.trace import trace

    found = {}
    with variant.applied():
        model = signatures.empty_model(config, max_length, variant.form, dtype).to_empty(device="npu")
        model.requires_grad_(False)
        for signature in signatures.signatures(model, config, dtype, max_length, (1,), "npu"):
            if signature.name in variant.graphs:
                changed = variant.change(model, signature) if variant.change else signature
                traced = trace(changed.name, changed.method, changed.arguments, tuple(changed.outputs), CACHES)
                run_passes(traced.model.graph[0], variant.passes)
                found[signature.name] = (traced.model, traced.binding)
    return found


BASE = Variant("ours", "", ALL)


_ROTARY: Patch = (signatures.Qwen2VL, "rotary", narrow_rotary)


UNDONE: tuple[Variant, ...] = (
    Variant(
        "fused attention, ViT",
        "products, softmax, dense mask",
        (VISUAL,),
        ((visual.Attention, "attend_masked", plain_masked),),
        MASKED,
    ),
    Variant("TND without a mask, ViT", "PromptFlashAttention, mask N x N", (VISUAL,), form=MASKED),
    Variant("FusedInferAttentionScore", "PromptFlash-/IncreFlashAttention, mask S x L", TEXT, form=RECIPE),
    Variant(
        "fixed KV cache, in place",
        "cache grown by concat",
        (DECODE,),
        ((text, "Attention", ConcatAttention), (signatures, "Qwen2VL", ConcatModel)),
        change=growing_cache,
    ),
    Variant(
        "fused attention, decode",
        "products, softmax, repeated heads, cache by concat",
        (DECODE,),
        ((text, "Attention", PlainAttention), (signatures, "Qwen2VL", ConcatModel)),
        change=growing_cache,
    ),
    Variant(
        "npu_rotary_mul",
        "rotate_half",
        ALL,
        ((text, "Attention", PlainRotation), (visual, "Attention", VisualPlainRotation)),
    ),
    Variant(
        "cos and sin once",
        "looked up in every layer",
        ALL,
        (
            (text, "Attention", PerLayerRope),
            (visual, "Attention", PerLayerRopeVisualAttention),
            (visual, "Visual", PerLayerRopeVisual),
            (signatures, "Visual", PerLayerRopeVisual),
            (signatures, "Qwen2VL", PerLayerRopeModel),
        ),
    ),
    Variant(
        "npu_rms_norm",
        "pow, mean, rsqrt, multiplications",
        TEXT,
        ((RMSNorm, "forward", plain_rms_norm), (RMSNorm, "add", plain_rms_add)),
    ),
    Variant("Add + RMSNorm in one", "Add, RmsNorm", TEXT, ((RMSNorm, "add", add_then_norm),)),
    Variant("Add + LayerNorm in one", "Add, LayerNorm", (VISUAL,), ((LayerNorm, "add", add_then_norm),)),
    Variant("last position's logits", "lm_head over all positions", (PREFILL,), ((signatures, "Qwen2VL", AllLogits),)),
    Variant("last layer's tail on one row", "all rows", (PREFILL,), ((text.Model, "layers_forward", all_rows),)),
    Variant(
        "npu_linear", "F.linear", ALL, ((Linear, "forward", plain_linear), (signatures.Qwen2VL, "logits", plain_logits))
    ),
    Variant(
        "fused qkv",
        "three products, two rotations",
        ALL,
        ((text, "Attention", ThreeProducts), (visual, "Attention", VisualThreeProducts), _ROTARY),
    ),
    Variant(
        "one rotation over q, k, v",
        "split, two rotations",
        TEXT,
        ((text, "Attention", SeparateRotations), _ROTARY),
    ),
    Variant(
        "fused gate/up and npu_swiglu", "two products, silu, multiplication", TEXT, ((text, "Mlp", TwoProductsMlp),)
    ),
    Variant("npu_swiglu", "split, silu, multiplication", TEXT, ((text.Mlp, "forward", silu_mul),)),
    Variant("npu_fast_gelu", "x * sigmoid(1.702 x)", (VISUAL,), ((visual.Mlp, "forward", quick_gelu),)),
    Variant(
        "token loop in the graph",
        "embedding, cos/sin, argmax, positions by the host",
        (DECODE,),
        ((signatures, "Qwen2VL", HostLoopModel),),
        change=host_loop,
    ),
    Variant("normalisation in the weights", "in the graph", (VISUAL,), ((signatures, "Qwen2VL", PixelModel),)),
    Variant("uint8 patches", "normalised on the host, fp32 patches", (VISUAL,), change=host_normalised(torch.float32)),
    *(Variant(f"pass {name}", "off", ALL, passes=tuple(p for p in PASSES if p != name)) for name in PASSES),
    Variant("all passes", "off", ALL, passes=()),
)


# What was tried and is not in the graphs: the undone column says what is new, and a positive difference is a saving.
TRIED: tuple[Variant, ...] = (
    Variant("npu_prefetch of o_proj", "Cmo before attention", (DECODE,), ((text, "Attention", Prefetching),)),
    Variant(
        "npu_scatter_pa_kv_cache",
        "one write for K and V",
        TEXT,
        ((text, "Attention", ScatterPair),),
        change=blocked_cache,
    ),
    Variant(
        "npu_apply_rotary_pos_emb",
        "one rotation of q and k, after a split",
        TEXT,
        ((text, "Attention", PairRotation), _ROTARY),
    ),
    Variant(
        "npu_fused_infer_attention_score_v2", "in place of the first version", TEXT, ((text, "Attention", AttentionV2),)
    ),
    Variant(
        "one rotation over q, k in the ViT",
        "a split before it and one after",
        (VISUAL,),
        ((visual, "Attention", VisualJointRotation),),
    ),
    Variant(
        "one rotation over q, k, v in the ViT",
        "wide cos and sin",
        (VISUAL,),
        ((visual, "Attention", VisualOneRotation), (signatures, "Visual", WideRopeVisual)),
    ),
    Variant("npu_ffn in the ViT", "fc1, FastGelu, fc2 in one", (VISUAL,), ((visual, "Mlp", FusedFfn),)),
)
