"""PromptFlashAttention: all query tokens over all keys, in layout BSH and sparse_mode 0.

Inputs query, key, value, and as 4 to 6 a dense mask that is true where hidden, lengths of the queries and of the keys.
Without a mask nothing is hidden, whatever pre_tokens and next_tokens say; with one, they limit what it shows and must
not, here.
"""

from typing import Any

from .attention import FULL, LENGTHS, LENGTHS_KV, MASK, attend_bsh, attention_cost, attention_shape, full_mask, operands
from .base import Call, Eager, Operator
from .kernel import Outputs, Tensor, attribute, refused
from .rule import LIBRARY, Rule, listed, rows, transformer

TILING = transformer("9.1.0", "attention/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp")

# torch_npu's operator has no inner_precise: these ask for 0, the exact mode, with sparse_mode 0 to 4
_EXACT_SPARSE_MODES = range(10, 15)


def _exact(attributes: dict[str, Any]) -> dict[str, Any]:
    mode = attributes["sparse_mode"]
    return {**attributes, "sparse_mode": mode - _EXACT_SPARSE_MODES.start if mode in _EXACT_SPARSE_MODES else mode}


EAGER = Eager(
    schema=(
        "npu_prompt_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
        "Tensor? atten_mask=None, Tensor? pse_shift=None, int[]? actual_seq_lengths=None, Tensor? deq_scale1=None, "
        "Tensor? quant_scale1=None, Tensor? deq_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, "
        "int num_heads=1, float scale_value=1., int pre_tokens=2147483647, int next_tokens=0, "
        'str input_layout="BSH", int num_key_value_heads=0, int[]? actual_seq_lengths_kv=None, int sparse_mode=0) '
        "-> Tensor"
    ),
    inputs=("query", "key", "value", None, "atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv"),
    attributes=(
        "num_heads",
        "num_key_value_heads",
        "scale_value",
        "input_layout",
        "sparse_mode",
        "pre_tokens",
        "next_tokens",
    ),
    adapt=_exact,
)


def run(node: Call, *inputs: Tensor | None) -> Outputs:
    layout, mode = attribute(node, "input_layout", "BSH"), attribute(node, "sparse_mode", FULL)
    if layout != "BSH" or mode != FULL:
        raise refused(node, f"layout {layout} with sparse_mode {mode} is not supported")
    of = operands(node, inputs, layout, {MASK, LENGTHS, LENGTHS_KV})
    mask, lengths, lengths_kv = (*inputs, *[None] * LENGTHS_KV)[MASK : LENGTHS_KV + 1]
    hidden = None
    if mask is not None:
        hidden = full_mask(node, mask, of)
        before, after = attribute(node, "pre_tokens", 214748647), attribute(node, "next_tokens", 0)
        if before < of.q.shape[1] - 1 or after < of.k.shape[1] - 1:
            raise refused(node, f"pre_tokens {before} and next_tokens {after} beside a mask are not supported")
    return (attend_bsh(node, of, attribute(node, "scale_value", 1.0), lengths, lengths_kv, hidden),)


OPERATOR = Operator(
    "PromptFlashAttention",
    shape=attention_shape,
    cost=attention_cost,
    run=run,
    eager=EAGER,
    attention=True,
    defaults={"num_key_value_heads": 0, "input_layout": "BSH", "sparse_mode": FULL, "inner_precise": 1},
    rules=(
        Rule("PFA-01", "the layout is BSH, BSND or BNSD", "(in layout BSH BSND BNSD)", "use BSH", LIBRARY),
        Rule(
            "PFA-02",
            "head_dim is a multiple of 16 and at most 512",
            "(and (mult d 16) (le d 512))",
            "use a model whose heads are a multiple of 16 wide",
            TILING,
            applies="(not (eq layout 'TND'))",
        ),
        Rule(
            "PFA-03",
            "sparse 0: the mask covers at least the query rows and the key rows; leading dimension 1 or batch",
            "(and (ge in.atten_mask.dim-2 q_s) (ge in.atten_mask.dim-1 kv_s))",
            "feed a mask as large as the queries and keys",
            TILING,
            applies="(and in.atten_mask.fed (in attr.sparse_mode 0 1))",
        ),
        Rule(
            "PFA-04",
            "batch up to 65,536, heads up to 256, heads x head_dim below 65,535",
            "(and (le b 65536) (le heads 256) (lt (mul heads d) 65535))",
            "run fewer rows at once",
            TILING,
        ),
        Rule(
            "PFA-05",
            "a dense mask has a byte for every query and key: beyond 2**31 of them neither memory nor "
            "32-bit sizes are safe",
            "(lt (mul in.atten_mask.dim-1 in.atten_mask.dim-2) 2147483648)",
            "use a form without a dense mask",
            TILING,
            applies="in.atten_mask.fed",
            severity="cost",
        ),
        Rule(
            "PFA-08",
            "the lengths of queries and of keys are one for all rows, or at least one a row",
            "(and (or (not in.actual_seq_lengths.fed) (eq in.actual_seq_lengths.dim0 1) "
            "(ge in.actual_seq_lengths.dim0 b)) (or (not in.actual_seq_lengths_kv.fed) "
            "(eq in.actual_seq_lengths_kv.dim0 1) (ge in.actual_seq_lengths_kv.dim0 b)))",
            "feed one length a row",
            transformer("8.5.0", "attention/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp"),
            applies="(or in.actual_seq_lengths.fed in.actual_seq_lengths_kv.fed)",
        ),
        listed("PromptFlashAttention", "query key value 0", rows("T T T T", "bf16 fp16")),
    ),
)
