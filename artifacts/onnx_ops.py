"""The operators of ONNX models of this toolchain: the exporter writes no other, the runtime runs no other.

onnxruntime knows hundreds, among them ones that run subgraphs in loops or ask for memory by a number in the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .dtypes import onnx_number

STANDARD, MICROSOFT = "", "com.microsoft"
# tensors of up to so many bytes may stand in the model itself
INLINE_BYTES = 1024

# kinds of attributes: an integer that the model's shape gives, a finite float; otherwise the values that are written
SIZE = "size"
FLOAT = "float"
Attribute = str | tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxOp:
    """One operator: how many inputs and outputs it may have, and which values each attribute."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: Mapping[str, Attribute]


def _op(*inputs: int, outputs: tuple[int, ...] = (1,), **attributes: Attribute) -> OnnxOp:
    return OnnxOp(inputs, outputs, attributes)


_BLOCKS = (16, 32, 64, 128, 256)
# only in models of earlier releases, which computed the angles that are looked up now
RELEASED = {(STANDARD, "Cos"), (STANDARD, "Sin")}
OPERATORS: dict[tuple[str, str], OnnxOp] = {
    (STANDARD, "Abs"): _op(1),
    (STANDARD, "Add"): _op(2),
    (STANDARD, "ArgMax"): _op(1, axis=(-1,), keepdims=(0,)),
    (STANDARD, "Attention"): _op(3, 7, q_num_heads=SIZE, kv_num_heads=SIZE, scale=FLOAT, is_causal=(1,)),
    (STANDARD, "Cast"): _op(1, to=(onnx_number("fp32"), onnx_number("int32"), onnx_number("int64"))),
    (STANDARD, "Concat"): _op(2, 3, axis=(-1, 0, 1)),
    (STANDARD, "Cos"): _op(1),
    (STANDARD, "DequantizeLinear"): _op(3, axis=(0,), block_size=_BLOCKS),
    (STANDARD, "Div"): _op(2),
    (STANDARD, "Gather"): _op(2, axis=(0, 1)),
    (STANDARD, "Gelu"): _op(1, approximate=("tanh",)),
    (STANDARD, "Gemm"): _op(2, 3, transB=(1,)),
    (STANDARD, "LayerNormalization"): _op(3, axis=(-1,), epsilon=FLOAT),
    (STANDARD, "MatMul"): _op(2),
    (STANDARD, "MatMulInteger"): _op(4),
    (STANDARD, "Max"): _op(2),
    (STANDARD, "Mul"): _op(2),
    (STANDARD, "QuantizeLinear"): _op(3),
    (STANDARD, "RMSNormalization"): _op(2, axis=(-1,), epsilon=FLOAT),
    (STANDARD, "ReduceMax"): _op(1, 2, keepdims=(0,)),
    (STANDARD, "ReduceSum"): _op(2, keepdims=(0,)),
    (STANDARD, "Reshape"): _op(2),
    (STANDARD, "RotaryEmbedding"): _op(3, num_heads=SIZE),
    (STANDARD, "ScatterND"): _op(3),
    (STANDARD, "Shape"): _op(1, start=(1,), end=(1, 2)),
    (STANDARD, "Sin"): _op(1),
    (STANDARD, "Split"): _op(1, 2, outputs=(2, 3), axis=(-1,), num_outputs=(2, 3)),
    (STANDARD, "Sub"): _op(2),
    (STANDARD, "Swish"): _op(1, alpha=FLOAT),
    (STANDARD, "TensorScatter"): _op(3, axis=(1,)),
    (STANDARD, "Unsqueeze"): _op(2),
    (MICROSOFT, "GroupQueryAttention"): _op(7, outputs=(3,), num_heads=SIZE, kv_num_heads=SIZE, scale=FLOAT),
    (MICROSOFT, "MatMulIntegerToFloat"): _op(6),
    (MICROSOFT, "MatMulNBits"): _op(3, 6, K=SIZE, N=SIZE, bits=(4, 8), block_size=_BLOCKS, accuracy_level=(4,)),
    (MICROSOFT, "MultiHeadAttention"): _op(3, 5, num_heads=SIZE, scale=FLOAT),
    (MICROSOFT, "QuickGelu"): _op(1, alpha=FLOAT),
    (MICROSOFT, "SkipLayerNormalization"): _op(4, outputs=(4,), epsilon=FLOAT),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _op(3, outputs=(4,), epsilon=FLOAT),
}
