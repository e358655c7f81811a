"""Linear layers, x [tokens, inputs] to [tokens, outputs], in the forms that the kinds of weights take.

floats  fp32 and fp16: Gemm (fp16: of a Cast, folded when a session is made).
blocks  int8 and int4 where a step reads a weight for one token: MatMulNBits; with --standard-only DequantizeLinear,
        MatMul, Add.
rows    int8 and int4 where thousands of tokens come at once: MatMulIntegerToFloat of tokens that are quantized one by
        one; with --standard-only MatMulInteger, Cast, Mul.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import WeightError
from ...artifacts.onnx_ops import MICROSOFT
from .quantize import block_size, pack_int4, quantize_blocks, quantize_rows
from .source import Floats, Weights
from .writer import ModelWriter

BLOCK_LIMIT = {8: 256, 4: 128}
# of embedding and output layer also where all others have 4: they decide the token, and are a tenth of the bytes
TABLE_BITS = 8
# MatMulNBits: activations become int8, quantized in blocks as the weights are
_ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class OnnxForm:
    """weights: int8, int4, fp32 or fp16. standard_only: no operator outside the ONNX standard."""

    weights: str
    standard_only: bool

    @property
    def bits(self) -> int | None:
        """Of the weights that are quantized in blocks."""
        return {"int8": 8, "int4": 4}.get(self.weights)


class Linears:
    """Emits layers with their weights into one model. weight and bias are the names of parameters; a layer is named
    `name`."""

    def __init__(self, graph: ModelWriter, weights: Weights, form: OnnxForm) -> None:
        self.graph, self.weights, self.form = graph, weights, form

    def vector(self, parameter: str) -> str:
        """A bias, or the weight of a norm: fp32 in every form."""
        return self.graph.constant(parameter, self.weights.whole(parameter))

    def floats(self, x: str, weight: str, bias: str | None, name: str) -> str:
        """One Gemm with the weight as the artifact stores it, [outputs, inputs]."""
        matrix = self._matrix(weight)
        if self.form.weights == "fp16":
            cast = f"{weight}.fp32"
            matrix = cast if self.graph.has(cast) else self.graph.cast(cast, matrix, "fp32")
        return self.graph.node("Gemm", name, x, matrix, *self._biases(bias), transB=1)

    def _biases(self, bias: str | None) -> list[str]:
        return [self.vector(bias)] if bias else []

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

    def blocks(self, x: str, weight: str, bias: str | None, name: str, bits: int) -> str:
        """A product with a weight quantized in blocks of its inputs."""
        outputs, inputs = self.weights.shape(weight)
        block = block_size(inputs, BLOCK_LIMIT[bits])
        biases = self._biases(bias)
        if self.form.standard_only:
            matrix = self._dequantized(weight, bits, block)
            if not biases:
                return self.graph.node("MatMul", name, x, matrix)
            return self.graph.node("Add", name, self.graph.node("MatMul", f"{name}.matmul", x, matrix), *biases)
        quantized, scales = self._blocks(weight, bits, block)
        optional = ["", "", *biases] if biases else []
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

    def rows(self, x: str, weight: str, bias: str | None, name: str) -> str:
        """A product of int8 with a scale for every output and, at run time, for every token."""
        graph = self.graph
        outputs, inputs = self.weights.shape(weight)
        matrix, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32)
        for first, rows in self.weights.chunks(weight):
            q, scale = quantize_rows(rows)
            matrix[:, first : first + len(rows)] = q.T
            scales[first : first + len(rows)] = scale
        quantized = graph.stored(f"{weight}.quantized", "int8", matrix.shape, [matrix])
        scaling = graph.constant(f"{weight}.scales", scales)
        biases = self._biases(bias)
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
        zero = graph.constant(f"{weight}.zero", 0, np.int8)
        if self.form.standard_only:
            product = graph.node("MatMulInteger", f"{name}.integer", x, quantized, middle, zero)
            product = graph.cast(f"{name}.float", product, "fp32")
            product = graph.node("Mul", f"{name}.by_output", product, scaling)
        else:
            product = graph.node(
                "MatMulIntegerToFloat", f"{name}.integer", x, quantized, one, scaling, middle, zero, domain=MICROSOFT
            )
        if not biases:
            return graph.node("Mul", name, product, token_scale)
        return graph.node("Add", name, graph.node("Mul", f"{name}.by_token", product, token_scale), *biases)

    def embedding(self, ids: str, parameter: str, name: str) -> str:
        """Rows of a table [vocabulary, width] by ids [tokens], to [tokens, width]."""
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
        # 0 keeps the tokens, and what is left are the blocks of one
        return graph.reshape(name, graph.node("Mul", f"{name}.blocks", centred, scale), [0, -1])
