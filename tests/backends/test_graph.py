"""Reading graph.pb: order, and refusal of what is not a graph."""

from typing import Any

import pytest
import torch

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.runtime.backends.ge.executor import Executor
from qwen2vl_tc.runtime.backends.ge.graph import read_graph
from qwen2vl_tc.runtime.backends.ge.proto import message_class


def serialized(*ops: tuple[str, str, list[str]], change: Any = None) -> bytes:
    """A graph of (name, type, inputs); Data ops are numbered in order."""
    model = message_class("ModelDef")()
    graph = model.graph.add(name="g")
    index = 0
    for name, kind, inputs in ops:
        op = graph.op.add(name=name, type=kind)
        op.input.extend(inputs)
        if kind != "NetOutput":
            op.output_desc.add()
        if kind == "Data":
            op.attr["index"].i = index
            index += 1
    if change:
        change(graph)
    data: bytes = model.SerializeToString()
    return data


def test_nodes_come_in_an_order_in_which_producers_come_first() -> None:
    data = serialized(
        ("out", "NetOutput", ["sum:0"]), ("sum", "Add", ["a:0", "b:0"]), ("a", "Data", []), ("b", "Data", [])
    )
    names = [node.name for node in read_graph(data, "g").nodes]
    assert names.index("sum") > max(names.index("a"), names.index("b"))
    assert names.index("out") > names.index("sum")


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([("a", "Add", ["b:0"]), ("b", "Add", ["a:0"])], "part of a cycle"),
        ([("a", "Add", ["a:0"])], "part of a cycle"),
        ([("a", "Add", ["ghost:0"])], "reads 'ghost', which no node produces"),
        ([("a", "Data", []), ("a", "Data", [])], "two nodes are called 'a'"),
        ([("a", "Data", []), ("b", "Add", ["a:7"])], "reads output 7 of Data a"),
        ([("a", "Data", []), ("b", "Add", ["a"])], "malformed input 'a'"),
    ],
)
def test_malformed_graphs_are_refused_naming_the_node(ops: list[Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_graph(serialized(*ops), "x/graph.pb")


def test_a_constant_whose_bytes_do_not_fill_its_shape_is_refused() -> None:
    def lie(graph: Any) -> None:
        graph.op[0].attr["value"].t.desc.dtype = 1
        graph.op[0].attr["value"].t.desc.shape.dim.extend([1 << 40, 1 << 40])

    with pytest.raises(ArtifactError, match="has 0 bytes, expected"):
        read_graph(serialized(("c", "Const", []), change=lie), "x/graph.pb")


def test_an_unknown_operator_is_refused_when_the_graph_is_loaded() -> None:
    data = serialized(("a", "Data", []), ("b", "Teleport", ["a:0"]), ("out", "NetOutput", ["b:0"]))
    with pytest.raises(ArtifactError, match=r"Teleport b is not an operator of the reference backend; it knows Add,"):
        Executor(read_graph(data, "g"), "g")


def test_an_operator_that_cannot_run_is_named_with_its_graph_and_the_cause_is_kept() -> None:
    data = serialized(
        ("a", "Data", []), ("b", "Data", []), ("sum", "Add", ["a:0", "b:0"]), ("out", "NetOutput", ["sum:0"])
    )
    executor = Executor(read_graph(data, "g"), "g")
    with pytest.raises(
        ArtifactError, match=r"^graph g: Add sum: cannot run on \(\[2\] float32, \[3\] float32\)"
    ) as caught:
        executor.run([torch.ones(2), torch.ones(3)])
    causes = [caught.value.__cause__]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__)
    assert any(isinstance(cause, RuntimeError) for cause in causes)


@pytest.mark.parametrize(
    ("soc", "rounds"), [("Ascend910B2", True), ("Ascend910_9391", True), ("Ascend950PR_9589", False)]
)
def test_a_graph_is_computed_as_its_soc_does(soc: str, rounds: bool) -> None:
    nodes = [("a", "Data", []), ("b", "Data", []), ("g", "Data", []), ("norm", "AddRmsNorm", ["a:0", "b:0", "g:0"])]
    a, b, gamma = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    executor = Executor(read_graph(serialized(*nodes, ("out", "NetOutput", ["norm:0"])), "g"), "g", soc=soc)
    (y,) = executor.run([a, b, gamma[0]])
    total = (a + b).float() if rounds else a.float() + b.float()
    scaled = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)
    scaled = scaled.bfloat16().float() if rounds else scaled
    assert torch.equal(y, (scaled * gamma[0].float()).bfloat16())


def test_a_deep_chain_does_not_exhaust_the_stack() -> None:
    chain = [("n0", "Data", [])] + [(f"n{i}", "Cast", [f"n{i - 1}:0"]) for i in range(1, 20_000)]
    assert len(read_graph(serialized(*reversed(chain)), "g").nodes) == 20_000


def test_inputs_that_are_not_numbered_in_a_row_are_refused() -> None:
    def skip(graph: Any) -> None:
        graph.op[1].attr["index"].i = 5

    data = serialized(("a", "Data", []), ("b", "Data", []), change=skip)
    with pytest.raises(ArtifactError, match="not numbered 0 to 1"):
        _ = read_graph(data, "g").inputs
