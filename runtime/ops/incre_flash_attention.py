"""IncreFlashAttention: one query token a row over the cache, in layout BSH.

Inputs query, key, value, and as 5 the lengths of the keys.
"""

from functools import partial

from .attention import LENGTHS, attend_bsh, attention_cost, attention_shape, operands
from .base import Call, Eager, Operator
from .kernel import Outputs, Tensor, attribute, refused
from .rule import Rule, listed, rows, transformer

TILING_CHECKS = transformer("9.1.0", "attention/incre_flash_attention/op_host/incre_flash_attention_tiling_check.cpp")

EAGER = Eager(
    schema=(
        "npu_incre_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
        "Tensor? atten_mask=None, Tensor? pse_shift=None, SymInt[]? actual_seq_lengths=None, "
        "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? block_table=None, "
        "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, "
        "Tensor? quant_scale2=None, Tensor? quant_offset2=None, Tensor? kv_padding_size=None, "
        'int num_heads=1, float scale_value=1., str input_layout="BSH", int num_key_value_heads=0, '
        "int block_size=0, int inner_precise=1) -> Tensor"
    ),
    inputs=("query", "key", "value", None, None, "actual_seq_lengths"),
    attributes=("num_heads", "num_key_value_heads", "scale_value", "input_layout", "inner_precise"),
)


def run(node: Call, *inputs: Tensor | None) -> Outputs:
    layout = attribute(node, "input_layout", "BSH")
    if layout != "BSH":
        raise refused(node, f"layout {layout} is not supported")
    of = operands(node, inputs, layout, {LENGTHS})
    if of.q.shape[1] != 1:
        raise refused(node, f"takes one query token a row, got {of.q.shape[1]}")
    lengths_kv = inputs[LENGTHS] if len(inputs) > LENGTHS else None
    return (attend_bsh(node, of, attribute(node, "scale_value", 1.0), None, lengths_kv),)


OPERATOR = Operator(
    "IncreFlashAttention",
    shape=attention_shape,
    cost=partial(attention_cost, lengths_kv=LENGTHS),
    run=run,
    eager=EAGER,
    attention=True,
    defaults={"num_key_value_heads": 1, "input_layout": "BSH", "inner_precise": 1},
    rules=(
        Rule(
            "IFA-01",
            "one query token a row, at most 64 query heads to a key head, at most 256 rows",
            "(and (eq q_s 1) (le b 256) (or (eq kv_heads 0) (le (div heads kv_heads) 64)))",
            "decode fewer rows at once",
            TILING_CHECKS,
        ),
        Rule(
            "IFA-02",
            "actual_seq_lengths has 1 element or batch",
            "(or (eq in.actual_seq_lengths.dim0 1) (ge in.actual_seq_lengths.dim0 b))",
            "feed one length a row",
            TILING_CHECKS,
            applies="in.actual_seq_lengths.fed",
        ),
        listed("IncreFlashAttention", "query key0 value0 0", rows("T T T T", "bf16 fp16")),
    ),
)
