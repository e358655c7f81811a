"""FusedInferAttentionScore: inputs query, key, value, and as 4 to 6 mask, lengths of the queries and of the keys.

Without a mask pre_tokens and next_tokens have no effect, as documented. Outputs attention_out; softmax_lse is a
placeholder of one fp32 zero, as with softmax_lse_flag false on the device.
"""

from functools import partial

from .attention import (
    FULL,
    LENGTHS,
    LENGTHS_KV,
    MASK,
    RIGHT_DOWN_CAUSAL,
    UNLIMITED,
    attend_bsh,
    attend_tnd,
    attention_cost,
    attention_shape,
    check_causal_mask,
    operands,
)
from .base import Call, Eager, Operator, Shape, TensorSpec
from .kernel import Outputs, Tensor, attribute, refused
from .rule import Rule, Source, cann_8_1, ge, listed, rows, since, transformer, until

TND = "(eq layout 'TND')"
BSH = "(eq layout 'BSH')"
ALL_HEADS = "(or (eq kv_heads 0) (eq kv_heads heads))"
TILING = transformer("9.1.0", "attention/fused_infer_attention_score/op_host/fused_infer_attention_score_tiling.cpp")
PROMPT_TILING = transformer("9.1.0", "attention/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp")
PROMPT_TILING_8_5 = transformer("8.5.0", "attention/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp")
DECODE_CHECKS = transformer("9.1.0", "attention/incre_flash_attention/op_host/incre_flash_attention_tiling_check.cpp")
MASK_DTYPES = "(in in.atten_mask.dtype bool int8 uint8)"

EAGER = Eager(
    schema=(
        "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, "
        "Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, "
        "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, "
        "Tensor? quant_scale2=None, Tensor? quant_offset2=None, Tensor? antiquant_scale=None, "
        "Tensor? antiquant_offset=None, Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, "
        "Tensor? value_antiquant_scale=None, Tensor? value_antiquant_offset=None, Tensor? block_table=None, "
        "Tensor? query_padding_size=None, Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, "
        "Tensor? value_shared_prefix=None, SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, "
        "Tensor? key_rope=None, Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1., "
        'int pre_tokens=2147483647, int next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, '
        "int sparse_mode=0, int inner_precise=0, int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, "
        "int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)"
    ),
    inputs=("query", "key", "value", None, "atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv"),
    # inner_precise chooses between speed and precision on the device; the reference is always precise
    attributes=(
        "num_heads",
        "num_key_value_heads",
        "scale",
        "input_layout",
        "sparse_mode",
        "pre_tokens",
        "next_tokens",
        "inner_precise",
        "softmax_lse_flag",
    ),
)


def shape(node: Call, q: TensorSpec, k: TensorSpec, v: TensorSpec, *rest: TensorSpec | None) -> tuple[Shape, ...]:
    return (*attention_shape(node, q, k, v, *rest), (1,))


def run(node: Call, *inputs: Tensor | None) -> Outputs:
    import torch

    layout, mode = attribute(node, "input_layout", "BSH"), attribute(node, "sparse_mode", FULL)
    scale = attribute(node, "scale", 1.0)
    if layout not in ("BSH", "TND") or (layout == "TND" and mode != FULL):
        raise refused(node, f"layout {layout} with sparse_mode {mode} is not supported")
    if attribute(node, "softmax_lse_flag", False):
        raise refused(node, "softmax_lse_flag is not supported")
    of = operands(node, inputs, layout, {MASK, LENGTHS, LENGTHS_KV})
    mask, lengths, lengths_kv = (*inputs, *[None] * LENGTHS_KV)[MASK : LENGTHS_KV + 1]
    if mode not in (FULL, RIGHT_DOWN_CAUSAL) or (mode == FULL and mask is not None):
        raise refused(node, f"sparse_mode {mode} with this mask is not supported")
    if layout == "TND":
        return attend_tnd(node, of, scale, lengths, lengths_kv), torch.zeros(1)
    if mode == RIGHT_DOWN_CAUSAL:
        if mask is None:
            raise refused(node, "sparse_mode 3 needs its 2048 x 2048 mask")
        check_causal_mask(node, mask)
        if of.q.shape[1] == 1:
            raise refused(node, "with one query token the operator takes no causal mask")
    out = attend_bsh(node, of, scale, lengths, lengths_kv, causal=mode == RIGHT_DOWN_CAUSAL)
    return out, torch.zeros(1)


OPERATOR = Operator(
    "FusedInferAttentionScore",
    gives=(0, "fp32"),
    shape=shape,
    cost=partial(attention_cost, lengths=LENGTHS, lengths_kv=LENGTHS_KV),
    run=run,
    eager=EAGER,
    attention=True,
    defaults={"num_key_value_heads": 0, "input_layout": "BSH", "inner_precise": 1},
    unwritten={
        "antiquant_mode": 0,
        "block_size": 0,
        "key_antiquant_mode": 0,
        "next_tokens": UNLIMITED,
        "out_dtype": 0,
        "pre_tokens": UNLIMITED,
        "pse_type": 0,
        "query_quant_mode": 0,
        "softmax_lse_flag": False,
        "sparse_mode": FULL,
        "value_antiquant_mode": 0,
    },
    rules=(
        Rule(
            "FIA-01",
            "TND is not among the layouts of this release",
            f"(not {TND})",
            "use BSH, one run per picture size",
            cann_8_1("op_proto/inc/fusion_ops.h"),
            releases=until("8.1"),
        ),
        Rule(
            "FIA-02",
            "TND without a separate rope takes only q/k head_dim 192 (value 128 or 192)",
            "(eq d 192)",
            "BSH",
            Source(
                "yueliang13/cann-ops-adv-vllm",
                "HEAD",
                "external/ascend-pytorch-newest/third_party/op-plugin/docs/context/torch_npu-npu_fused_infer_attention_score.md",
            ),
            applies=TND,
            releases=("8.2", "8.3"),
        ),
        Rule(
            "FIA-03",
            "TND, same number of heads for k/v, bf16 or inner_precise 0: goes to the "
            "PromptFlashAttention branch, which takes head_dim 64, 128 or 192 only",
            "(in d 64 128 192)",
            "use BSH",
            PROMPT_TILING_8_5,
            applies=f"(and {TND} {ALL_HEADS} (not (and (eq in.query.dtype 'fp16') (eq attr.inner_precise 1))))",
            releases=("8.5",),
        ),
        Rule(
            "FIA-04",
            "TND on the same branch: at most 4096 sequences",
            "(le in.actual_seq_lengths.dim0 4096)",
            "use BSH",
            PROMPT_TILING_8_5,
            applies=f"(and {TND} {ALL_HEADS})",
            releases=("8.5",),
        ),
        Rule(
            "FIA-05",
            "TND without mask, sparse 0/3/4, no paged cache, no rope inputs: split-fuse tiling takes "
            "equal q/k/v head_dim up to 256",
            "(and (le d 256) (eq d d_v) (in attr.sparse_mode 0 3 4) (not (and (eq in.query.dtype 'bf16') "
            "(eq attr.inner_precise 1))))",
            "use BSH",
            TILING,
            applies=f"(and {TND} {ALL_HEADS} (not in.atten_mask.fed))",
            releases=since("9.0"),
        ),
        Rule(
            "FIA-06",
            "the TND tiling divides num_heads by num_key_value_heads as written: 0, the default, is a division by zero",
            "(gt kv_heads 0)",
            "write num_key_value_heads",
            transformer("9.1.0", "attention/fused_infer_attention_score/op_host/flash_attention_infer_tiling.h"),
            applies=TND,
            releases=since("9.0"),
            severity="crash",
        ),
        Rule(
            "FIA-07",
            "TND needs both length inputs, at least one element each, running sums",
            "(and in.actual_seq_lengths.fed in.actual_seq_lengths_kv.fed)",
            "feed both lengths",
            TILING,
            applies=TND,
            releases=since("8.5"),
        ),
        Rule(
            "FIA-08",
            "TND with a mask and sparse 0 is not taken by split-fuse for equal head counts and falls to "
            "the 64/128/192 rule",
            "(in d 64 128 192)",
            "feed no mask, or use BSH",
            TILING,
            applies=f"(and {TND} {ALL_HEADS} in.atten_mask.fed (eq attr.sparse_mode 0))",
            releases=since("9.0"),
        ),
        Rule(
            "FIA-10",
            "BSH: head_dim is a multiple of 16 and at most 512",
            "(and (mult d 16) (le d 512))",
            "use a model whose heads are a multiple of 16 wide",
            PROMPT_TILING,
            applies=f"(and {BSH} (gt q_s 1))",
        ),
        Rule(
            "FIA-11",
            "BSH: batch up to 65,536, up to 256 heads, heads x head_dim below 65,535",
            "(and (le b 65536) (le heads 256) (lt (mul heads d) 65535))",
            "decode fewer rows at once",
            PROMPT_TILING,
            applies=BSH,
        ),
        Rule(
            "FIA-12",
            "query heads are a multiple of the key heads, at most 64 of them to one",
            "(and (mult heads kv_heads) (le (div heads kv_heads) 64))",
            "no form of these heads is taken",
            DECODE_CHECKS,
            applies="(gt kv_heads 0)",
        ),
        Rule(
            "FIA-13",
            "sparse 2, 3 and 4 take the compressed mask of 2048 x 2048 only, bool, int8 or uint8",
            f"(and in.atten_mask.fed (eq in.atten_mask.dim-1 2048) (eq in.atten_mask.dim-2 2048) {MASK_DTYPES})",
            "feed the compressed mask of 2048 x 2048 as bool",
            transformer(
                "8.5.0",
                "attention/fused_infer_attention_score/op_host/arch32/fused_infer_attention_score_tiling_check_feature.cpp",
            ),
            applies="(and (in attr.sparse_mode 2 3 4) (gt q_s 1))",
        ),
        Rule(
            "FIA-14",
            "one query token: sparse mode 2, 3 or 4 with a mask is not taken",
            "(in attr.sparse_mode 0 1)",
            "never run prefill with one token",
            transformer(
                "9.1.0",
                "attention/fused_infer_attention_score/op_host/arch22/fused_infer_attention_score_tiling_check_feature.cpp",
            ),
            applies=f"(and (eq q_s 1) (not {TND}))",
            releases=since("8.5"),
        ),
        Rule(
            "FIA-15",
            "the lengths of queries and of keys are one for all rows, or at least one a row",
            "(and (or (eq in.actual_seq_lengths_kv.dim0 1) (ge in.actual_seq_lengths_kv.dim0 b)) (or "
            "(not in.actual_seq_lengths.fed) (eq in.actual_seq_lengths.dim0 1) (ge in.actual_seq_lengths.dim0 b)))",
            "feed one length a row",
            transformer(
                "8.5.0",
                "attention/fused_infer_attention_score/op_host/arch32/fused_infer_attention_score_tiling_check_single_para.cpp",
            ),
            applies=f"(and {BSH} in.actual_seq_lengths_kv.fed)",
        ),
        Rule(
            "FIA-16",
            "one query token per row, batch up to 65,536, key head_dim up to 512",
            "(and (le b 65536) (le d 512))",
            "decode fewer rows at once",
            DECODE_CHECKS,
            applies=f"(and {BSH} (eq q_s 1))",
        ),
        Rule(
            "FIA-17",
            "query, key and value are of one dtype, bf16 or fp16",
            "(and (eq in.query.dtype in.key0.dtype) (eq in.query.dtype in.value0.dtype) (in in.query.dtype bf16 fp16))",
            "compile with --dtype bf16 or fp16",
            transformer(
                "9.1.0",
                "attention/fused_infer_attention_score/op_host/arch22/fused_infer_attention_score_tiling_v3.cpp",
            ),
            releases=since("8.1"),
        ),
        Rule(
            "FIA-20",
            "a description of an unfed input that this library lacks counts when inputs are mapped, and "
            "maps by position only if the counts agree",
            "(not (hasdesc learnable_sink q_start_idx kv_start_idx))",
            "compile with the pass that drops unfed inputs",
            ge("8.5.0", "compiler/engines/nn_engine/opskernel/ops_store/ops_kernel_common.cc"),
            releases=until("8.3"),
            severity="unproven",
        ),
        Rule(
            "FIA-22",
            "the newest interface documents head_dim 64, 128 and 192 for TND; the code behind it takes up to 256",
            "(in d 64 128 192)",
            "none needed: the code takes it",
            transformer("9.1.0", "attention/fused_infer_attention_score/docs/aclnnFusedInferAttentionScoreV4.md"),
            applies=TND,
            releases=since("9.0"),
            severity="undocumented",
        ),
        Rule(
            "FIA-18",
            "a mask is bool, int8 or uint8",
            MASK_DTYPES,
            "feed the mask as bool",
            TILING,
            applies="in.atten_mask.fed",
        ),
        Rule(
            "FIA-19",
            "the layout is BSH or TND: no rule here covers another",
            "(in layout BSH TND)",
            "use BSH",
            TILING,
            severity="unproven",
        ),
        Rule(
            "FIA-23",
            "the code that checks this operator was first published with 8.5: of earlier releases there "
            "is documentation alone",
            "(false)",
            "use CANN 8.5 or newer",
            transformer(
                "8.5.0", "attention/fused_infer_attention_score/op_host/fused_infer_attention_score_tiling.cpp"
            ),
            applies=BSH,
            releases=until("8.3"),
            severity="unproven",
        ),
        listed("FusedInferAttentionScore", "query key0 value0 0", rows("T T T T", "bf16 fp16")),
    ),
)
