"""RotaryMul, half mode: y = x * r1 + concat(-x2, x1) * r2, where x = concat(x1, x2) on the last axis."""

from .base import Call, Eager, Operator, moved
from .kernel import Outputs, Tensor, attribute, refused, unfed
from .rotary import rotary_shape, rotated
from .rule import Rule, cann_8_1, listed, rows


def run(node: Call, x: Tensor, r1: Tensor, r2: Tensor, *rest: Tensor | None) -> Outputs:
    unfed(node, rest)
    mode = attribute(node, "rotary_mode", "half")
    if mode != "half":
        raise refused(node, f"rotary_mode {mode} is not supported, only half")
    return (rotated(node, x, r1, r2),)


OPERATOR = Operator(
    "RotaryMul",
    shape=rotary_shape,
    cost=moved,
    run=run,
    eager=Eager(
        'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor',
        ("input", "r1", "r2", "rotate"),
        ("rotary_mode",),
    ),
    rules=(
        Rule(
            "ROT-01",
            "the last axis is a multiple of 64 on this chip; otherwise a kernel may leave columns "
            "unturned, without a message",
            "(mult in.x.dim-1 64)",
            "RotaryPositionEmbedding mode 0 (x, cos, sin)",
            cann_8_1("op_proto/inc/nn_other.h"),
            severity="wrong",
        ),
        Rule(
            "ROT-02",
            "the first and the third axis are below 1000",
            "(and (lt in.x.dim0 1000) (lt in.x.dim2 1000))",
            "use RotaryPositionEmbedding mode 0",
            cann_8_1("op_proto/inc/nn_other.h"),
        ),
        Rule(
            "ROT-03",
            "x, r1 and r2 have rank 4 and one last axis",
            "(and (eq in.r1.dim-1 in.x.dim-1) (eq in.r2.dim-1 in.x.dim-1) (eq in.x.rank 4) (eq in.r1.rank 4) "
            "(eq in.r2.rank 4))",
            "give the tables the dtype and rank of x",
            cann_8_1("op_impl/ai_core/tbe/impl/dynamic/rotary_mul.py"),
        ),
        listed("RotaryMul", "x r1 r2 0", rows("T T T T", "bf16 fp16 fp32")),
    ),
)
