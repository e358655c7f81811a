"""Linear layers, x [tokens, inputs] to [tokens, outputs], in the forms that the kinds of weights take.

floats  fp32, fp16, and the patch embedding always: Gemm (fp16: of a Cast, folded when a session is made).
blocks  the language model in int8 and int4: MatMulNBits; with --standard-only DequantizeLinear, MatMul, Add.
rows    the vision tower in int8 and int4: MatMulIntegerToFloat of tokens that are quantized one by one; with
        --standard-only MatMulInteger, Cast, Mul.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import WeightError
from ...artifacts.onnx_ops import MICROSOFT
from .graph import Graph
from .quantize import block_size, pack_int4, quantize_blocks, quantize_rows
from .source import Floats, Weights

BLOCK_LIMIT = {8: 256, 4: 128}
# of embedding and output layer also where all others have 4: they decide the token, and are a tenth of the bytes
TABLE_BITS = 8
# MatMulNBits: activations become int8, quantized in blocks as the weights are
_ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Form:
    """weights: int8, int4, fp32 or fp16. standard_only: no operator outside the ONNX standard."""

    weights: str
    standard_only: bool

    @property
    def bits(self) -> int | None:
        """Of the quantized weights of the language model's layers."""
        return {"int8": 8, "int4": 4}.get(self.weights)


class Linears:
    """Emits layers with their weights into one graph. Parameters are named as in artifacts.parameters."""

    def __init__(self, graph: Graph, weights: Weights, form: Form) -> None:
        self.graph, self.weights, self.form = graph, weights, form

    def vector(self, parameter: str) -> str:
        """A bias, or the weight of a norm: fp32 in every form."""
        return self.graph.constant(parameter, self.weights.whole(parameter))

    def floats(self, x: str, parameter: str, name: str, bias: bool = True) -> str:
        """One Gemm with the weight as the artifact stores it, [outputs, inputs]."""
        weight = self._matrix(f"{parameter}.weight")
        if self.form.weights == "fp16":
            cast = f"{parameter}.weight.fp32"
            weight = cast if self.graph.has(cast) else self.graph.cast(cast, weight, "fp32")
        biases = [self.vector(f"{parameter}.bias")] if bias else []
        return self.graph.node("Gemm", name, x, weight, *biases, transB=1)

    def _matrix(self, parameter: str) -> str:
        dtype = "fp16" if self.form.weights == "fp16" else "fp32"
        if self.graph.has(parameter):
            return parameter
        return self.graph.stored(parameter, dtype, self.weights.shape(parameter), self._cast(parameter, dtype))

    def _cast(self, parameter: str, dtype: str) -> Iterator[NDArray[Any]]:
        for _, rows in self.weights.chunks(parameter):
            if dtype == "fp32":
                yield rows
                continue
            with np.errstate(over="ignore"):
                cast = rows.astype(np.float16)
            if not np.isfinite(cast).all():
                raise WeightError(
                    f"{parameter} holds values that fp16 cannot represent; export with --weights fp32 or int8"
                )
            yield cast

    def blocks(self, x: str, parameter: str, name: str, bias: bool = True, bits: int | None = None) -> str:
        """A product with a weight quantized in blocks of its inputs."""
        bits = bits or self.form.bits
        if bits is None:
            return self.floats(x, parameter, name, bias)
        outputs, inputs = self.weights.shape(f"{parameter}.weight")
        block = block_size(inputs, BLOCK_LIMIT[bits])
        biases = [self.vector(f"{parameter}.bias")] if bias else []
        if self.form.standard_only:
            weight = self._dequantized(f"{parameter}.weight", bits, block)
            if not bias:
                return self.graph.node("MatMul", name, x, weight)
            return self.graph.node("Add", name, self.graph.node("MatMul", f"{name}.matmul", x, weight), *biases)
        quantized, scales = self._blocks(f"{parameter}.weight", bits, block)
        optional = ["", "", *biases] if bias else []
        return self.graph.node(
            "MatMulNBits",
            name,
            x,
            quantized,
            scales,
            *optional,
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=block,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def _blocks(self, parameter: str, bits: int, block: int) -> tuple[str, str]:
        """The weight as MatMulNBits takes it: uint8 [outputs, blocks, block * bits / 8], scales [outputs, blocks]."""
        quantized, scales = f"{parameter}.quantized", f"{parameter}.scales"
        if not self.graph.has(quantized):
            outputs, inputs = self.weights.shape(parameter)
            shape = (outputs, -(-inputs // block), block * bits // 8)
            found: list[Floats] = []
            self.graph.stored(quantized, "uint8", shape, self._quantized(parameter, bits, block, found))
            self.graph.stored(scales, "fp32", shape[:2], found)
        return quantized, scales

    def _quantized(self, parameter: str, bits: int, block: int, scales: list[Floats]) -> Iterator[NDArray[np.uint8]]:
        for _, rows in self.weights.chunks(parameter):
            q, scale = quantize_blocks(rows, bits, block)
            scales.append(scale)
            yield pack_int4(q) if bits == 4 else q

    def _dequantized(self, parameter: str, bits: int, block: int) -> str:
        """The weight [inputs, outputs] behind a DequantizeLinear."""
        name = f"{parameter}.dequantized"
        if self.graph.has(name):
            return name
        outputs, inputs = self.weights.shape(parameter)
        blocks = -(-inputs // block)
        packed = np.empty((inputs, outputs * bits // 8), np.uint8)
        scales = np.empty((blocks, outputs), np.float32)
        for first, rows in self.weights.chunks(parameter):
            q, scale = quantize_blocks(rows, bits, block)
            columns = q[:, :inputs].T
            columns = pack_int4(columns) if bits == 4 else columns
            at = first * bits // 8
            packed[:, at : at + columns.shape[1]] = columns
            scales[:, first : first + len(rows)] = scale.T
        dtype = "uint4" if bits == 4 else "uint8"
        zero = np.full((blocks, outputs * bits // 8), 0x88 if bits == 4 else 0x80, np.uint8)
        graph = self.graph
        return graph.node(
            "DequantizeLinear",
            name,
            graph.stored(f"{parameter}.columns", dtype, (inputs, outputs), [packed]),
            graph.stored(f"{parameter}.columns.scales", "fp32", scales.shape, [scales]),
            graph.stored(f"{parameter}.columns.zero", dtype, (blocks, outputs), [zero]),
            axis=0,
            block_size=block,
        )

    def rows(self, x: str, parameter: str, name: str) -> str:
        """A product of int8 with a scale for every output and, at run time, for every token."""
        if self.form.bits is None:
            return self.floats(x, parameter, name)
        graph = self.graph
        outputs, inputs = self.weights.shape(f"{parameter}.weight")
        weight, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32)
        for first, rows in self.weights.chunks(f"{parameter}.weight"):
            q, scale = quantize_rows(rows)
            weight[:, first : first + len(rows)] = q.T
            scales[first : first + len(rows)] = scale
        quantized = graph.stored(f"{parameter}.weight.quantized", "int8", weight.shape, [weight])
        scaling = graph.constant(f"{parameter}.weight.scales", scales)
        bias = self.vector(f"{parameter}.bias")
        middle, one = graph.constant("middle", 128, np.uint8), graph.constant("one", 1)
        largest = graph.node(
            "ReduceMax",
            f"{name}.largest",
            graph.node("Abs", f"{name}.abs", x),
            graph.constant("last_axis", [-1], np.int64),
        )
        # of a token of zeros: any scale serves, but 0
        largest = graph.node("Max", f"{name}.positive", largest, graph.constant("tiny", 1e-30))
        token_scale = graph.node("Mul", f"{name}.token_scale", largest, graph.constant("127th", 1 / 127))
        scaled = graph.node("Div", f"{name}.scaled", x, token_scale)
        x = graph.node("QuantizeLinear", f"{name}.quantized", scaled, one, middle)
        # where onnxruntime makes weights uint8, 1.28 aborts without it, and 1.32 refuses one that nodes share
        zero = graph.constant(f"{parameter}.weight.zero", 0, np.int8)
        if self.form.standard_only:
            product = graph.node("MatMulInteger", f"{name}.integer", x, quantized, middle, zero)
            product = graph.cast(f"{name}.float", product, "fp32")
            product = graph.node("Mul", f"{name}.by_output", product, scaling)
        else:
            product = graph.node(
                "MatMulIntegerToFloat", f"{name}.integer", x, quantized, one, scaling, middle, zero, domain=MICROSOFT
            )
        return graph.node("Add", name, graph.node("Mul", f"{name}.by_token", product, token_scale), bias)

    def norm(self, x: str, parameter: str, name: str, epsilon: float, bias: bool) -> str:
        """LayerNormalization with a bias, RMSNormalization without, over the last axis."""
        op = "LayerNormalization" if bias else "RMSNormalization"
        return self.graph.node(op, name, x, *self._norm_weights(parameter, bias), axis=-1, epsilon=epsilon)

    def add_norm(self, residual: str, x: str, parameter: str, name: str, epsilon: float, bias: bool) -> tuple[str, str]:
        """As `norm` of the sum; returns (normalised sum, sum). One operator, as on the NPU, but for standard ones."""
        if self.form.standard_only:
            total = self.graph.node("Add", f"{name}.sum", residual, x)
            return self.norm(total, parameter, name, epsilon, bias), total
        op = "SkipLayerNormalization" if bias else "SkipSimplifiedLayerNormalization"
        outputs = (name, "", "", f"{name}.sum")
        self.graph.nodes(
            op,
            name,
            *(residual, x, *self._norm_weights(parameter, bias)),
            outputs=outputs,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        return name, f"{name}.sum"

    def _norm_weights(self, parameter: str, bias: bool) -> list[str]:
        return [self.vector(f"{parameter}.{each}") for each in (("weight", "bias") if bias else ("weight",))]

    def swish(self, x: str, name: str, alpha: float = 1.0) -> str:
        """x * sigmoid(alpha x). onnxruntime has a kernel for QuickGelu; the standard Swish it computes in three."""
        if self.form.standard_only:
            return self.graph.node("Swish", name, x, alpha=alpha)
        return self.graph.node("QuickGelu", name, x, domain=MICROSOFT, alpha=alpha)

    def embedding(self, ids: str, parameter: str, name: str) -> str:
        """Rows of a table [vocabulary, width] by index, to [..., width]."""
        graph = self.graph
        if self.form.bits is None:
            rows = graph.node("Gather", f"{name}.rows", self._matrix(parameter), ids)
            return graph.cast(name, rows, "fp32") if self.form.weights == "fp16" else rows
        block = block_size(self.weights.shape(parameter)[1], BLOCK_LIMIT[TABLE_BITS])
        quantized, scales = self._blocks(parameter, TABLE_BITS, block)
        rows = graph.cast(f"{name}.float", graph.node("Gather", f"{name}.rows", quantized, ids), "fp32")
        centred = graph.node("Sub", f"{name}.centred", rows, graph.constant("128", 128))
        column = graph.constant("column", [-1], np.int64)
        scale = graph.node("Unsqueeze", f"{name}.scale", graph.node("Gather", f"{name}.scales", scales, ids), column)
        return graph.node("Mul", name, centred, scale)
