"""The fields of onnx.proto that models of this toolchain have, read without the package onnx.

A field that is not declared here is refused, wherever it stands: functions, subgraphs, sparse tensors, training
information, and whatever a later version of the format may add.
"""

import functools
from typing import Any

from ...artifacts.errors import ArtifactError

# message: {field number: (name, type)}; "*" marks repeated ones. Strings are bytes here: nothing vouches for them.
_FIELDS: dict[str, dict[int, tuple[str, str]]] = {
    "Model": {
        1: ("ir_version", "int"),
        2: ("producer_name", "bytes"),
        7: ("graph", "Graph"),
        8: ("opset_import", "Opset*"),
        14: ("metadata_props", "Entry*"),
    },
    "Opset": {1: ("domain", "bytes"), 2: ("version", "int")},
    "Graph": {
        1: ("node", "Node*"),
        2: ("name", "bytes"),
        5: ("initializer", "Tensor*"),
        11: ("input", "Value*"),
        12: ("output", "Value*"),
    },
    "Node": {
        1: ("input", "bytes*"),
        2: ("output", "bytes*"),
        3: ("name", "bytes"),
        4: ("op_type", "bytes"),
        5: ("attribute", "Attribute*"),
        7: ("domain", "bytes"),
    },
    "Attribute": {1: ("name", "bytes"), 2: ("f", "float"), 3: ("i", "int"), 4: ("s", "bytes"), 20: ("type", "int")},
    "Tensor": {
        1: ("dims", "int*"),
        2: ("data_type", "int"),
        8: ("name", "bytes"),
        9: ("raw_data", "bytes"),
        13: ("external_data", "Entry*"),
        14: ("data_location", "int"),
    },
    "Entry": {1: ("key", "bytes"), 2: ("value", "bytes")},
    "Value": {1: ("name", "bytes"), 2: ("type", "Type")},
    "Type": {1: ("tensor_type", "TensorType")},
    "TensorType": {1: ("elem_type", "int"), 2: ("shape", "Shape")},
    "Shape": {1: ("dim", "Dimension*")},
    "Dimension": {1: ("dim_value", "int"), 2: ("dim_param", "bytes")},
}
# TYPE_INT64, TYPE_FLOAT and TYPE_BYTES of descriptor.proto; an enum is its number
_KINDS = {"int": 3, "float": 2, "bytes": 12}
# 72B with its 80 layers has 2 MB
_MAX_MODEL_BYTES = 16 << 20


@functools.cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    # proto2, as onnx.proto: a field knows whether it is there
    file = descriptor_pb2.FileDescriptorProto(name="qwen2vl_tc/onnx.proto", package="qwen2vl_tc_onnx", syntax="proto2")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in fields.items():
            label, kind = (3, kind[:-1]) if kind.endswith("*") else (1, kind)
            if kind in _KINDS:
                message.field.add(name=field, number=number, label=label, type=_KINDS[kind])
            else:
                message.field.add(name=field, number=number, label=label, type=11, type_name=f".{file.package}.{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.Model"))


def parse_model(data: bytes, where: str) -> Any:
    """The onnx.ModelProto in `data`. Raises ArtifactError naming `where`, also for any field that is not expected."""
    from google.protobuf.message import DecodeError

    if len(data) > _MAX_MODEL_BYTES:
        raise ArtifactError(f"{where}: {len(data)} bytes, more than any model of this toolchain; compile it again")
    try:
        model = _model_class().FromString(data)
    except DecodeError as error:
        raise ArtifactError(f"{where}: not an ONNX model: {error}; compile the artifact again") from error
    model.DiscardUnknownFields()
    # also where one field is given twice, and one reader takes another than the next
    if model.ByteSize() != len(data):
        raise ArtifactError(
            f"{where}: has {len(data) - model.ByteSize()} bytes of fields that no model of this toolchain has, such as "
            "functions, subgraphs and sparse tensors; compile the artifact again"
        )
    return model
