"""SwiGlu: silu(a) * b, where x = concat(a, b) on axis `dim`."""

from .base import Call, Eager, Operator, Shape, TensorSpec, moved
from .kernel import Outputs, Tensor, attribute, axis, floating, refused
from .rule import Rule, listed, nn, rows
from .shapes import fits


def shape(node: Call, x: TensorSpec) -> tuple[Shape, ...]:
    axis = node.attributes.get("dim", -1) % len(x.shape)
    fits(x.shape[axis] % 2 == 0, f"axis {axis} is odd")
    return ((*x.shape[:axis], x.shape[axis] // 2, *x.shape[axis + 1 :]),)


def run(node: Call, x: Tensor) -> Outputs:
    import torch.nn.functional as F

    floating(node, x)
    dim = axis(node, attribute(node, "dim", -1), x)
    if x.shape[dim] % 2:
        raise refused(node, f"axis {dim} of {list(x.shape)} has no two halves")
    a, b = x.float().chunk(2, dim)
    return ((F.silu(a) * b).to(x.dtype),)


OPERATOR = Operator(
    "SwiGlu",
    shape=shape,
    cost=moved,
    run=run,
    eager=Eager("npu_swiglu(Tensor input, int dim=-1) -> Tensor", ("input",), ("dim",)),
    rules=(
        Rule(
            "SWI-01",
            "the axis that is split is even",
            "(mult in.x.dim-1 2)",
            "split an even axis",
            nn("9.1.0", "activation/swi_glu/op_host/swi_glu_infershape.cpp"),
        ),
        listed("SwiGlu", "x 0", rows("T T", "bf16 fp16 fp32")),
    ),
)
