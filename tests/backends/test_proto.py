"""The fields that the runtime declares are those of the wheel's own ge.proto."""

from typing import Any

import pytest

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.ge.proto import FIELDS, message_class, parse_graph

WIRE_TYPES = {
    "string": 9,
    "bytes": 12,
    "int64": 3,
    "int32": 5,
    "uint32": 13,
    "float": 2,
    "bool": 8,
    "enum": 14,
    "map": 11,
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    from qwen2vl_tc.exporters.torchair.device import open_device

    open_device("Ascend910B2")
    from torchair._ge_concrete_graph import ge_ir_pb2

    return ge_ir_pb2


@pytest.mark.parametrize("name", FIELDS)
def test_declared_fields_have_the_wheels_numbers_and_types(theirs: Any, name: str) -> None:
    outer, _, inner = name.partition(".")
    message = getattr(theirs, outer)
    descriptor = (getattr(message, inner) if inner else message).DESCRIPTOR
    for field, number, kind, repeated in FIELDS[name]:
        found = descriptor.fields_by_name[field]
        assert (found.number, found.is_repeated) == (number, repeated)
        assert found.type == WIRE_TYPES.get(kind, 11)
        if kind.startswith("."):
            assert found.message_type.full_name == f"ge.proto{kind}"


def test_what_torchair_serializes_is_read_back_field_by_field(theirs: Any) -> None:
    model = theirs.ModelDef()
    op = model.graph.add(name="g").op.add(name="n", type="T")
    op.input.append("x:0")
    op.attr["dims"].list.i.extend([1, -1])
    op.attr["eps"].f = 0.5
    op.attr["value"].t.data = b"\1\2"
    op.attr["value"].t.desc.dtype = theirs.DataType.DT_BF16
    op.output_desc.add(dtype=theirs.DataType.DT_FLOAT).shape.dim.extend([3, 4])
    graph = parse_graph(model.SerializeToString(), "test")
    read = graph.op[0]
    assert (graph.name, read.name, read.type, list(read.input)) == ("g", "n", "T", ["x:0"])
    assert list(read.attr["dims"].list.i) == [1, -1]
    assert read.attr["eps"].f == 0.5
    assert (read.attr["value"].t.data, read.attr["value"].t.desc.dtype) == (b"\1\2", 27)
    assert list(read.output_desc[0].shape.dim) == [3, 4]


def test_bytes_that_are_no_graph_are_refused_by_name() -> None:
    with pytest.raises(ArtifactError, match=r"visual/graph\.pb: not a GE graph"):
        parse_graph(b"\xff\xff\xff", "visual/graph.pb")
    with pytest.raises(ArtifactError, match="holds 0 graphs, expected 1"):
        parse_graph(b"", "visual/graph.pb")


def test_two_pools_do_not_collide(theirs: Any) -> None:
    assert message_class("ModelDef") is not theirs.ModelDef
