"""Writing an ONNX model: nodes with readable names, tensors streamed into one file of external data beside it."""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from blake3 import blake3
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ...artifacts.dtypes import BY_ONNX, onnx_number
from ...artifacts.manifest import Tensor
from ...artifacts.naming import naming
from ...artifacts.onnx_ops import INLINE_BYTES, MICROSOFT, OPERATORS

OPSET = 24
_PAGE_BYTES = 4096


class DataFile:
    """The file of a model's tensors: each starts on a page, so that it can be mapped. Hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.name, path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._hash = blake3()
        self.size = 0

    def write(self, arrays: Iterable[NDArray[Any]]) -> tuple[int, int]:
        """One tensor, in pieces; returns its offset and length in bytes."""
        self._append(bytes(-self.size % _PAGE_BYTES))
        offset = self.size
        for array in arrays:
            self._append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return offset, self.size - offset

    def _append(self, data: "bytes | memoryview") -> None:
        self._hash.update(data)
        view = memoryview(data)
        with naming(self._path):
            while view:
                written = os.write(self._fd, view)
                view = view[written:]
                self.size += written

    @property
    def hash(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        os.close(self._fd)


class ModelWriter:
    """An ONNX model under construction. A value has the name of the node that makes it."""

    def __init__(self, name: str, data: DataFile) -> None:
        self.name = name
        self.data = data
        self._nodes: list[onnx.NodeProto] = []
        self._names: set[str] = set()
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def declare(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """What the model takes and returns; -1 is a free size."""
        for values, tensors in ((self._inputs, inputs), (self._outputs, outputs)):
            for tensor in tensors:
                shape = [None if size < 0 else size for size in tensor.shape]
                values.append(helper.make_tensor_value_info(tensor.name, onnx_number(tensor.dtype), shape))

    def node(self, op: str, name: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output. "" as an input leaves an optional one out."""
        return self.nodes(op, name, *inputs, outputs=(name,), domain=domain, **attributes)[0]

    def nodes(
        self, op: str, name: str, *inputs: str, outputs: tuple[str, ...], domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """A node with several outputs. Raises ValueError for one that the runtime would refuse."""
        rule = OPERATORS.get((domain, op))
        if rule is None or len(inputs) not in rule.inputs or not attributes.keys() <= rule.attributes.keys():
            raise ValueError(f"{op} {name}: artifacts.onnx_ops has no such operator")
        self._names.add(name)
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs

    def cast(self, name: str, x: str, dtype: str) -> str:
        """x in another dtype."""
        return self.node("Cast", name, x, to=onnx_number(dtype))

    def reshape(self, name: str, x: str, shape: Sequence[int]) -> str:
        return self.node("Reshape", name, x, self.ints(shape))

    def ints(self, values: Sequence[int]) -> str:
        """A list of integers."""
        return self.constant(f"ints.{'.'.join(map(str, values))}", list(values), np.int64)

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """A small tensor; the same name twice is the same tensor."""
        if name not in self._initializers:
            array = np.asarray(value, dtype)
            if array.nbytes > INLINE_BYTES:
                stored = BY_ONNX[helper.np_dtype_to_tensor_dtype(array.dtype)]
                return self.stored(name, stored.name, array.shape, [array])
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def stored(self, name: str, dtype: str, shape: Sequence[int], data: Iterable[NDArray[Any]]) -> str:
        """A tensor in the data file."""
        offset, length = self.data.write(data)
        tensor = TensorProto(name=name, data_type=onnx_number(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.data.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def fresh(self, name: str) -> str:
        """The name, or one like it where it is taken."""
        return name if not self.has(name) else next(n for i in itertools.count(2) if not self.has(n := f"{name}.{i}"))

    def has(self, name: str) -> bool:
        """Whether a tensor or a node of this name is there."""
        return name in self._initializers or name in self._names

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=opsets, producer_name="qwen2vl-tc")
        # the oldest that has this opset: runtimes refuse a newer one than they know
        model.ir_version = helper.find_min_ir_version_for([opsets[0]])
        helper.set_model_props(model, metadata)
        return model
