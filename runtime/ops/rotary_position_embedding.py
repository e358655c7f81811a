"""RotaryPositionEmbedding, mode 0 (rotate half): x [B, S, N, D], cos and sin with each size of x or 1, and D.

One row of angles for several positions is refused: the device's tiling gives it no core.
"""

from .base import Call, Operator, moved
from .kernel import Outputs, Tensor, attribute, refused, unfed
from .rotary import rotary_shape, rotated
from .rule import Rule, cann_8_1, listed, rows, since, transformer, until

TILING = transformer("9.1.0", "posembedding/rotary_position_embedding/op_host/rope_rotate_half_tiling.cpp")
DEFINITION = transformer("8.5.0", "posembedding/rotary_position_embedding/op_host/rotary_position_embedding_def.cpp")


def run(node: Call, x: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor | None) -> Outputs:
    unfed(node, rest)
    mode = attribute(node, "mode", 0)
    if mode != 0:
        raise refused(node, f"mode {mode} is not supported, only 0 (rotate half)")
    if x.dim() == 4 and x.shape[1] > 1 and cos.dim() == 4 and cos.shape[:3] == (1, 1, 1):
        raise refused(node, f"tables {list(cos.shape)} for {x.shape[1]} positions leave the output unwritten")
    return (rotated(node, x, cos, sin),)


OPERATOR = Operator(
    "RotaryPositionEmbedding",
    shape=rotary_shape,
    cost=moved,
    run=run,
    defaults={"mode": 0},
    rules=(
        Rule(
            "RPE-01",
            "mode 0, rank 4, an even last axis below 896, and tables of one shape with the same last axis",
            "(and (eq attr.mode 0) (eq in.x.rank 4) (mult in.x.dim-1 2) (lt in.x.dim-1 896) (eq in.cos.rank 4) "
            "(eq in.sin.rank 4) (eq in.cos.dim-1 in.x.dim-1) (eq in.sin.dim-1 in.x.dim-1) "
            "(eq in.cos.dim0 in.sin.dim0) (eq in.cos.dim1 in.sin.dim1) (eq in.cos.dim2 in.sin.dim2))",
            "no operator turns heads of this width",
            TILING,
        ),
        Rule(
            "RPE-02",
            "a table row for all tokens, [1, 1, 1, D] beside more than one token, is taken and run on "
            "no core: the output stays as it was",
            "(not (and (eq in.cos.dim0 1) (eq in.cos.dim1 1) (eq in.cos.dim2 1)))",
            "write out the tables for every token",
            TILING,
            applies="(gt in.x.dim1 1)",
            releases=since("8.1"),
            severity="wrong",
        ),
        Rule(
            "RPE-03",
            "three inputs: the library of this release has no `rotate`",
            "(not (hasdesc rotate))",
            "drop the unfed input",
            DEFINITION,
            releases=until("8.5"),
        ),
        Rule(
            "RPE-04",
            "the first and the third axis are below 1000",
            "(and (lt in.x.dim0 1000) (lt in.x.dim2 1000))",
            "lay the tokens of all rows along the second axis",
            cann_8_1("op_proto/inc/nn_other.h"),
            releases=until("8.3"),
        ),
        Rule(
            "RPE-05",
            "each axis of the tables is that of x, or 1",
            "(and (or (eq in.cos.dim0 1) (eq in.cos.dim0 in.x.dim0)) (or (eq in.cos.dim1 1) "
            "(eq in.cos.dim1 in.x.dim1)) (or (eq in.cos.dim2 1) (eq in.cos.dim2 in.x.dim2)))",
            "give the tables the axes of x, or 1",
            transformer("8.5.0", "posembedding/rotary_position_embedding/op_host/rope_rotate_half_tiling.cpp"),
            releases=since("8.1"),
        ),
        listed("RotaryPositionEmbedding", "x cos sin 0", rows("T T T T", "bf16 fp16 fp32"), DEFINITION),
    ),
)
