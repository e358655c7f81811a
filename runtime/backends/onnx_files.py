"""Which files an ONNX model reads its tensors from, without the package onnx."""

import functools
from typing import Any

from ...artifacts.errors import ArtifactError

# Of onnx.proto: every message on the way to a tensor's external_data, {field number: message}.
_FIELDS = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}


@functools.cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="qwen2vl_tc/onnx.proto", package="qwen2vl_tc_onnx", syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for number, kind in fields.items():
            # repeated: of a field that is given twice, no value may be missed
            message.field.add(name=f"f{number}", number=number, label=3, type=11, type_name=f".{file.package}.{kind}")
        if name == "Entry":
            message.field.add(name="key", number=1, label=3, type=12)
            message.field.add(name="value", number=2, label=3, type=12)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.Model"))


def external_locations(model: bytes, where: str) -> set[str]:
    """Locations of all external tensors of a serialized onnx.ModelProto. Raises ArtifactError naming `where`."""
    from google.protobuf.message import DecodeError

    try:
        waiting = [_model_class().FromString(model)]
    except DecodeError as error:
        raise ArtifactError(f"{where}: not an ONNX model: {error}; compile the artifact again") from error
    found = set()
    while waiting:
        message = waiting.pop()
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                waiting += value
            elif field.name == "key" and b"location" in value:
                found |= {each.decode(errors="replace") for each in message.value}
    return found
