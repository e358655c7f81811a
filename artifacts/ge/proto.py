"""The fields of ge.proto that a reader needs, declared in a pool of their own.

torchair registers its own ge_ir.proto in protobuf's default pool; a second file with the same message names there is an
error, and the runtime must read graphs on machines that have no torchair. Unknown fields survive parsing untouched.
"""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from ..errors import ArtifactError

_FIELD = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "string": _FIELD.TYPE_STRING,
    "bytes": _FIELD.TYPE_BYTES,
    "int64": _FIELD.TYPE_INT64,
    "int32": _FIELD.TYPE_INT32,
    "uint32": _FIELD.TYPE_UINT32,
    "float": _FIELD.TYPE_FLOAT,
    "bool": _FIELD.TYPE_BOOL,
    # the wheel declares DataType as an enum; on the wire, and here, it is its number
    "enum": _FIELD.TYPE_INT32,
}
# message: (field, number, type, repeated); a type starting with "." is a message, "map" one from string to AttrDef
FIELDS: dict[str, tuple[tuple[str, int, str, bool], ...]] = {
    "ModelDef": (
        ("name", 1, "string", False),
        ("version", 2, "uint32", False),
        ("custom_version", 3, "string", False),
        ("graph", 7, ".GraphDef", True),
    ),
    "GraphDef": (("name", 1, "string", False), ("op", 6, ".OpDef", True), ("attr", 11, "map", True)),
    "OpDef": (
        ("name", 1, "string", False),
        ("type", 2, "string", False),
        ("input", 5, "string", True),
        ("attr", 10, "map", True),
        ("input_desc", 33, ".TensorDescriptor", True),
        ("output_desc", 34, ".TensorDescriptor", True),
    ),
    "TensorDescriptor": (
        ("name", 1, "string", False),
        ("dtype", 2, "enum", False),
        ("shape", 3, ".ShapeDef", False),
        ("layout", 4, "string", False),
    ),
    "ShapeDef": (("dim", 1, "int64", True),),
    "TensorDef": (("desc", 1, ".TensorDescriptor", False), ("data", 2, "bytes", False)),
    "AttrDef": (
        ("list", 1, ".AttrDef.ListValue", False),
        ("s", 2, "bytes", False),
        ("i", 3, "int64", False),
        ("f", 4, "float", False),
        ("b", 5, "bool", False),
        ("t", 12, ".TensorDef", False),
        ("dt", 15, "int64", False),
    ),
    "AttrDef.ListValue": (
        ("s", 2, "bytes", True),
        ("i", 3, "int64", True),
        ("f", 4, "float", True),
        ("val_type", 20, "enum", False),
    ),
}
_PACKAGE = "ge.proto"
# 72B with its 80 layers has 2 MB; empty operators of two bytes grow to 40 times that in memory
_MAX_GRAPH_BYTES = 8 << 20


def _add_field(message: Any, name: str, number: int, kind: str, repeated: bool) -> None:
    field = message.field.add(name=name, number=number)
    field.label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
    if kind == "map":
        entry = message.nested_type.add(name=name.capitalize() + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", 1, "string", False)
        _add_field(entry, "value", 2, ".AttrDef", False)
        kind = f".{message.name}.{entry.name}"
    if kind.startswith("."):
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{_PACKAGE}{kind}"
    else:
        field.type = _KINDS[kind]


@functools.cache
def message_class(name: str) -> Any:
    """The class of one of the messages in FIELDS."""
    file = descriptor_pb2.FileDescriptorProto(name="qwen2vl_tc/ge_ir.proto", package=_PACKAGE, syntax="proto3")
    for full_name, fields in FIELDS.items():
        outer, _, inner = full_name.partition(".")
        message = next((m for m in file.message_type if m.name == outer), None) or file.message_type.add(name=outer)
        if inner:
            message = message.nested_type.add(name=inner)
        if full_name == "AttrDef":
            message.oneof_decl.add(name="value")
        for field in fields:
            _add_field(message, *field)
            if full_name == "AttrDef":
                message.field[-1].oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


def parse_graph(data: bytes, where: str) -> Any:
    """The one GraphDef of a serialized ge.proto.ModelDef. Raises ArtifactError naming `where`."""
    if len(data) > _MAX_GRAPH_BYTES:
        raise ArtifactError(f"{where}: {len(data)} bytes, more than any graph of this toolchain; rebuild the artifact")
    try:
        model = message_class("ModelDef").FromString(data)
    except (DecodeError, ValueError) as error:
        raise ArtifactError(f"{where}: not a GE graph (ge.proto.ModelDef): {error}; rebuild the artifact") from error
    if len(model.graph) != 1:
        raise ArtifactError(f"{where}: holds {len(model.graph)} graphs, expected 1; rebuild the artifact")
    return model.graph[0]
