"""What an ONNX model and the manifest must agree on before onnxruntime sees it: operators, tensors, inputs, outputs.

onnxruntime checks its operators' inputs one by one, with code that has had holes; a model is data that anyone may have
written. What is allowed is what the exporter writes for the manifest's model, and no more.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...artifacts.dtypes import BY_ONNX
from ...artifacts.errors import ArtifactError
from ...artifacts.manifest import OnnxGraph, Tensor
from ...artifacts.onnx_ops import FLOAT, INLINE_BYTES, MICROSOFT, OPERATORS, SIZE, STANDARD
from ..models import family_of
from ..models.base import FP32, MAX_VISION_SIDE, MODEL_DTYPE, Argument, GraphOptions, GraphSpec
from ..models.config import ModelConfig
from .onnx_proto import parse_model

# onnx.AttributeProto.AttributeType and onnx.TensorProto.DataLocation
_FLOAT, _INT, _STRING, _EXTERNAL = 1, 2, 3, 1
# Operators that read a tensor of the model at this input: it tells how much they read, and what they ask memory for.
_WEIGHT_INPUT = {"MatMulNBits": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DequantizeLinear": 0}
# Operators that add an axis, or as many as an index has: only as often as the model needs them.
_AT_MOST = {"Unsqueeze": 2, "Concat": 4, "Gather": 8, "ReduceSum": 2, "ScatterND": 1}
# Which positions of the cache a kernel reads and writes: these values, made like this from what the backend feeds.
_LENGTHS: dict[bytes, tuple[str, tuple[bytes, ...]]] = {
    b"last_position": ("Sub", (b"kv_lengths", b"one_int")),
    b"last_position.int32": ("Cast", (b"last_position",)),
    b"longest": ("ReduceMax", (b"kv_lengths",)),
    b"longest.int32": ("Cast", (b"longest",)),
    b"tokens": ("Shape", (b"token_ids",)),
    b"write_at": ("Sub", (b"kv_lengths", b"tokens")),
}
_LENGTH_INPUTS: dict[str, dict[int, Collection[bytes]]] = {
    "GroupQueryAttention": {5: (b"last_position.int32",), 6: (b"longest.int32",)},
    "TensorScatter": {2: (b"write_at",)},
}
# no operator of a layer stands in it more than once or twice, but there are this many of them
_NODES_PER_LAYER = 96


@dataclass(frozen=True)
class _Stored:
    """A tensor of the model."""

    dtype: str
    shape: tuple[int, ...]


def check_model(data: bytes, graph: OnnxGraph, config: ModelConfig, standard_only: bool, where: str) -> None:
    """Raises ArtifactError naming `where` for a serialized model that is not one of `config` as this toolchain writes
    them: with other operators, attributes, tensors, inputs or outputs, or reading another file than `graph.data`."""
    model = parse_model(data, where)
    try:
        _Check(graph, config, standard_only).run(model)
    except _Refused as error:
        raise ArtifactError(f"{where}: {error}; compile the artifact again") from error


class _Refused(Exception):
    """Why a model is refused."""


class _Check:
    def __init__(self, graph: OnnxGraph, config: ModelConfig, standard_only: bool) -> None:
        self.graph, self.config, self.standard_only = graph, config, standard_only
        text, vision = config.text, config.vision
        prefix = "visual." if graph.name == "visual" else ("model.", "lm_head.")
        self.shapes = {p.name: p.shape for p in family_of(config).weights(config) if p.name.startswith(prefix)}
        self.heads = {vision.num_heads} if graph.name == "visual" else {text.num_heads, text.num_kv_heads}
        self.layers = vision.depth if graph.name == "visual" else text.num_layers
        self.widest = max(max(shape) for shape in self.shapes.values())
        self.stored: dict[bytes, _Stored] = {}
        # of a table: what its rows are of, and cos and sin of a head
        self.positions = max(text.max_position_embeddings + 1, MAX_VISION_SIDE)
        self.angles = 2 * max(text.head_dim, vision.head_dim)
        given, self.at_most = [b"kv_lengths"], _AT_MOST
        if graph.name == "visual":
            arguments = _visual_spec(config).arguments
            given = [each.name.encode() for each in arguments if each.kind == "lengths"]
            # an index that is not into a table chooses keys and values
            if any(each.kind == "tensor" and each.dtype == "int64" and not each.indexes for each in arguments):
                self.at_most = {**_AT_MOST, "Gather": _AT_MOST["Gather"] + 2 * self.layers}
        int32 = {name + b".int32": ("Cast", (name,)) for name in given}
        self.lengths = {**_LENGTHS, **int32}
        self.length_inputs: dict[str, dict[int, Collection[bytes]]] = {
            **_LENGTH_INPUTS,
            "Attention": {6: given},
            "MultiHeadAttention": {4: int32},
        }

    def run(self, model: Any) -> None:
        for opset in model.opset_import:
            if opset.domain.decode(errors="replace") not in self._domains():
                raise _Refused(f"uses the operators of {_shown(opset.domain)}, expected {self._domains()}")
        inputs, outputs = expected_tensors(self.graph.name, self.config, self.standard_only)
        for side, expected, listed, found in (
            ("inputs", inputs, self.graph.inputs, model.graph.input),
            ("outputs", outputs, self.graph.outputs, model.graph.output),
        ):
            _same(side, expected, listed, "the manifest")
            _same(side, expected, [_declared(value) for value in found], "the model")
        for tensor in model.graph.initializer:
            self._tensor(tensor)
        self._nodes(model.graph)

    def _domains(self) -> tuple[str, ...]:
        return (STANDARD,) if self.standard_only else (STANDARD, MICROSOFT)

    def _tensor(self, tensor: Any) -> None:
        name = _shown(tensor.name)
        if tensor.name in self.stored or not tensor.name:
            raise _Refused(f"two tensors are called {name}")
        dtype, shape = BY_ONNX.get(tensor.data_type), tuple(tensor.dims)
        if dtype is None or len(shape) > 4 or not all(0 < size <= 1 << 31 for size in shape):
            raise _Refused(f"tensor {name} is of type {tensor.data_type} and shape {list(shape)[:8]}")
        size = -(-math.prod(shape) * dtype.bits // 8)
        if tensor.data_location == _EXTERNAL:
            if tensor.raw_data:
                raise _Refused(f"tensor {name} is in the model and in a file")
            self._place(name, {entry.key: entry.value for entry in tensor.external_data}, size)
        elif tensor.external_data or len(tensor.raw_data) != size or size > INLINE_BYTES:
            raise _Refused(
                f"tensor {name} of shape {list(shape)} {dtype.name} has {len(tensor.raw_data)} bytes in the model"
            )
        found = _Stored(dtype.name, shape)
        parameter, form = _parameter(tensor.name)
        if parameter in self.shapes:
            if not _fits(form, found, self.shapes[parameter]):
                raise _Refused(
                    f"tensor {name} is {dtype.name} {list(shape)}, and that of the model {self.shapes[parameter]}"
                )
        # tables that positions are looked up in
        elif tensor.name.startswith(b"constants.") and dtype.name == "fp32":
            if len(shape) > 3 or math.prod(shape[:-1]) > self.positions or shape[-1] > self.angles:
                raise _Refused(f"the table {name} has the shape {list(shape)}, larger than any of this model")
        # what else there is are small constants, written by the exporter's own hand
        elif (len(shape) > 1 and not tensor.name.startswith(b"rope.")) or size > 4 * self.widest:
            raise _Refused(f"tensor {name} of shape {list(shape)} belongs to no parameter of this model")
        elif name == "'one_int'" and tensor.raw_data != (1).to_bytes(8, "little"):
            raise _Refused("the constant 'one_int' is another number")
        elif dtype.name == "int64" and (abs(np.frombuffer(tensor.raw_data, "<i8")) > self.widest).any():
            raise _Refused(f"the constant {name} is larger than any size of this model")
        self.stored[tensor.name] = found

    def _place(self, name: str, place: dict[bytes, bytes], size: int) -> None:
        expected = self.graph.data.path.rpartition("/")[2]
        if (location := place.pop(b"location", b"")) != expected.encode():
            raise _Refused(f"reads {_shown(location)}, expected only {expected}, which the manifest vouches for")
        offset, length = place.pop(b"offset", b""), place.pop(b"length", b"")
        numbers = all(text.isdigit() and len(text) < 20 for text in (offset, length))
        if place or not numbers or int(length) != size or int(offset) + size > self.graph.data.bytes:
            raise _Refused(
                f"tensor {name} is at {_shown(offset)}, {_shown(length)} bytes, in a file of {self.graph.data.bytes}; "
                f"it has {size}"
            )

    def _nodes(self, graph: Any) -> None:
        known = set(self.stored)
        for value in graph.input:
            _define(known, value.name)
        if len(graph.node) > _NODES_PER_LAYER * (self.layers + 1):
            raise _Refused(f"has {len(graph.node)} operators for {self.layers} layers")
        left = dict(self.at_most)
        for node in graph.node:
            kind = node.op_type.decode(errors="replace")
            domain = node.domain.decode(errors="replace")
            where = f"{kind[:80]} {_shown(node.name)}"
            rule = OPERATORS.get((domain, kind))
            if rule is None or domain not in self._domains():
                raise _Refused(f"{where}: no operator of {domain[:80] or 'the standard'} that this toolchain writes")
            inputs, outputs = node.input, node.output
            if len(inputs) not in rule.inputs or len(outputs) not in rule.outputs:
                raise _Refused(f"{where}: has {len(inputs)} inputs and {len(outputs)} outputs")
            for name in inputs:
                # in the order in which they run: so there is no cycle
                if name not in known and name:
                    raise _Refused(f"{where}: reads {_shown(name)}, which nothing before it makes")
            for name in outputs:
                if name:
                    _define(known, name)
            if outputs[0] in self.lengths and self.lengths[outputs[0]] != (kind, tuple(inputs)):
                raise _Refused(f"{where}: reads {[_shown(name) for name in inputs]}")
            for place, names in self.length_inputs.get(kind, {}).items():
                if len(inputs) > place and inputs[place] not in names:
                    raise _Refused(f"{where}: takes {_shown(inputs[place])} for {', '.join(map(_shown, names))}")
            if kind in left:
                left[kind] -= 1
                if left[kind] < 0:
                    raise _Refused(f"{where}: more than {self.at_most[kind]} of these are in no model")
            attributes = _attributes(node.attribute, rule.attributes, where) if node.attribute else {}
            if not self.heads.issuperset(value for key, value in attributes.items() if key.endswith("num_heads")):
                raise _Refused(f"{where}: has {attributes}, and the model {sorted(self.heads)} heads")
            if kind in _WEIGHT_INPUT or (kind == "Gather" and "axis" not in attributes):
                self._weights(kind, inputs, attributes, where)
        for value in graph.output:
            if value.name not in known:
                raise _Refused(f"nothing makes its output {_shown(value.name)}")

    def _weights(self, kind: str, inputs: Any, attributes: Mapping[str, Any], where: str) -> None:
        """Operators whose kernels are told by attributes, or by one tensor, how long another one is."""
        stored = [self.stored.get(name) for name in inputs]
        weight = stored[_WEIGHT_INPUT.get(kind, 0)]
        if weight is None or len(weight.shape) < 2:
            raise _Refused(f"{where}: its weight is no matrix of the model")
        if kind == "MatMulNBits":
            outputs, blocks, width = weight.shape if len(weight.shape) == 3 else (0, 0, 0)
            k, n, bits, block = (attributes.get(key, 0) for key in ("K", "N", "bits", "block_size"))
            scales, bias = stored[2], stored[5] if len(stored) > 5 else None
            if (
                not (block and n == outputs and blocks == -(-k // block) and width == block * bits // 8)
                or scales != _Stored("fp32", (outputs, blocks))
                or any(inputs[3:5])
                or (len(inputs) > 5 and bias != _Stored("fp32", (outputs,)))
            ):
                raise _Refused(f"{where}: {dict(attributes)} does not fit its weight {list(weight.shape)}")
        elif kind == "MatMulIntegerToFloat" and stored[3] != _Stored("fp32", weight.shape[1:]):
            raise _Refused(f"{where}: its scales do not fit its weight {list(weight.shape)}")


def _define(known: set[bytes], name: bytes) -> None:
    if name in known or not name:
        raise _Refused(f"two values are called {_shown(name)}")
    known.add(name)


def _attributes(found: Iterable[Any], rules: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for attribute in found:
        name = attribute.name.decode(errors="replace")
        rule = rules.get(name)
        is_text = isinstance(rule, tuple) and isinstance(rule[0], str)
        kind, field = (_FLOAT, "f") if rule == FLOAT else (_STRING, "s") if is_text else (_INT, "i")
        value: Any = getattr(attribute, field)
        value = value.decode(errors="replace") if is_text else value
        fits = attribute.type == kind and not any(attribute.HasField(each) for each in {"f", "i", "s"} - {field})
        if rule is None or name in values or not fits:
            raise _Refused(f"{where}: has the attribute {name[:80]!r}, which it may not have like that")
        # an epsilon, the slope of a gate, the root of a head's size
        if not (0 < value <= 16 if rule == FLOAT else 0 < value < 1 << 31 if rule == SIZE else value in rule):
            raise _Refused(f"{where}: attribute {name} is {value}, expected {rule}")
        values[name] = value
    return values


def _parameter(name: bytes) -> tuple[str, str]:
    """A tensor's parameter and the form that it is in: `x.weight.scales` to `x.weight`, `scales`."""
    text = name.decode(errors="replace")
    owner, dot, form = text.partition(".weight.")
    return (f"{owner}.weight", form) if dot else (text, "")


def _fits(form: str, tensor: _Stored, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape in which exporters/onnx/linear.py writes `form` of a parameter of this shape."""
    found = tensor.shape
    if not form:
        return found == shape and (tensor.dtype == "fp32" or (tensor.dtype == "fp16" and len(shape) == 2))
    if form == "zero":
        return tensor == _Stored("int8", ())
    if len(shape) != 2:
        return False
    outputs, inputs = shape
    most = -(-inputs // 16)
    if form == "quantized":
        blocks = len(found) == 3 and found[0] == outputs and inputs <= found[1] * found[2] * 2 <= 4 * (inputs + 256)
        return found == (inputs, outputs) if tensor.dtype == "int8" else tensor.dtype == "uint8" and blocks
    if form == "scales":
        rows = found == (outputs,) or (len(found) == 2 and found[0] == outputs and found[1] <= most)
        return tensor.dtype == "fp32" and rows
    if form == "columns":
        return tensor.dtype in ("uint8", "uint4") and found == (inputs, outputs)
    dtypes = {"columns.scales": ("fp32",), "columns.zero": ("uint8", "uint4")}.get(form, ())
    return tensor.dtype in dtypes and len(found) == 2 and found[0] <= most and found[1] == outputs


def expected_tensors(name: str, config: ModelConfig, standard_only: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of the visual or the text model, with -1 for sizes known at run time: what the models are
    translated to have.

    visual: those of the family's graph for rows of one length, see GraphOptions; embeds in fp32.
    text: token_ids [B, S]; image_embeds [M, H] replace the embeddings at image_index [M, 1], counted over B x S;
    positions [3, B, S] of M-RoPE; kv_lengths [B], with the new tokens; last [1], the token whose logits are wanted;
    key.N and value.N, a cache each: [B, num_kv_heads, L, D], or [B, L, KV] with standard operators only. Its new
    content, present_key.N and present_value.N, may be bound to the same memory. To next_token [B], logits [B, V].
    """
    if name == "visual":
        spec = _visual_spec(config)
        return [_as_tensor(argument) for argument in spec.arguments], [_as_tensor(output) for output in spec.outputs]
    text = config.text
    shape = (-1, -1, text.kv_dim) if standard_only else (-1, text.num_kv_heads, -1, text.head_dim)
    caches = [f"{side}.{i}" for i in range(text.num_layers) for side in ("key", "value")]
    inputs = [
        Tensor("token_ids", "int64", (-1, -1)),
        Tensor("image_embeds", "fp32", (-1, text.hidden_size)),
        Tensor("image_index", "int64", (-1, 1)),
        Tensor("positions", "int64", (3, -1, -1)),
        Tensor("kv_lengths", "int64", (-1,)),
        Tensor("last", "int64", (1,)),
        *(Tensor(cache, "fp32", shape) for cache in caches),
    ]
    outputs = [Tensor("next_token", "int64", (-1,)), Tensor("logits", "fp32", (-1, text.vocab_size))]
    return inputs, [*outputs, *(Tensor(f"present_{cache}", "fp32", shape) for cache in caches)]


def _visual_spec(config: ModelConfig) -> GraphSpec:
    options = GraphOptions(config.text.max_position_embeddings, visual_attention="equal")
    graphs = family_of(config).graphs(config, options)
    return next(spec for spec in graphs if spec.kind == "visual")


def _as_tensor(argument: Argument) -> Tensor:
    return Tensor(argument.name, FP32 if argument.dtype == MODEL_DTYPE else argument.dtype, argument.bound)


def _declared(value: Any) -> Tensor:
    kind = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    dtype = BY_ONNX.get(kind.elem_type)
    return Tensor(value.name.decode(errors="replace"), dtype.name if dtype else str(kind.elem_type), dims)


def _same(side: str, expected: list[Tensor], found: Iterable[Tensor], owner: str) -> None:
    wanted, given = {t.name: t for t in expected}, {t.name: t for t in found}
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            raise _Refused(f"{side}: {owner} has {_tensor(given.get(name))}, this model {_tensor(wanted.get(name))}")


def _tensor(tensor: Tensor | None) -> str:
    return f"{tensor.name[:80]} {tensor.dtype} {list(tensor.shape)}" if tensor else "nothing"


def _shown(name: bytes) -> str:
    return repr(name[:80].decode(errors="replace"))
