"""Reading graph.pb: order, and refusal of what is not a graph."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.synthetic import tiny_config
from PIL import Image

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.ge.binding import Binding, BoundInput
from qwen2vl_tc.artifacts.ge.graph import read_graph
from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.backends.ge.checks import check_graph
from qwen2vl_tc.runtime.backends.ge.executor import Executor
from qwen2vl_tc.runtime.ops import known
from qwen2vl_tc.runtime.ops.graphs import live_ops, op_of, written_by

Build = Callable[..., tuple[Path, Path]]


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


# what stands around the two control edges, of the operator that writes: its variable, its indices, its updates
_ORDERS = {
    "first": ["early:-1", "{}:0", "at:0", "new:0"],
    "in the middle": ["{}:0", "early:-1", "at:0", "new:0"],
    "last": ["{}:0", "at:0", "new:0", "early:-1"],
    "to an input": ["at:-1", "{}:0", "at:0", "new:0"],
    "twice": ["early:-1", "early:-1", "{}:0", "early:-1", "at:0", "new:0"],
    "to what it reads": ["{}:-1", "{}:0", "at:0", "new:0"],
}


def writing(inputs: list[str], table: str = "Data", between: tuple[str, ...] = ()) -> bytes:
    """A graph that writes into `table` through a chain of operators; `early` is only ever a producer in an order."""
    names = ["table", *(f"step{i}" for i in range(len(between)))]
    chain = [(name, kind, [f"{before}:0"]) for name, kind, before in zip(names[1:], between, names, strict=False)]
    return serialized(
        ("write", "ScatterNdUpdate", [edge.format(names[-1]) for edge in inputs]),
        *chain,
        ("table", table, []),
        ("at", "Data", []),
        ("new", "Data", []),
        ("early", "Add", ["new:0", "new:0"]),
        ("out", "NetOutput", ["write:0"]),
    )


@pytest.mark.parametrize("inputs", _ORDERS.values(), ids=_ORDERS)
def test_a_control_edge_is_an_order_and_no_input_wherever_it_stands(inputs: list[str]) -> None:
    graph = read_graph(writing(inputs), "g")
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["write"].inputs == (("table", 0), ("at", 0), ("new", 0))
    assert nodes["write"].after == tuple(e.removesuffix(":-1").format("table") for e in inputs if e.endswith(":-1"))
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    assert all(position[name] < position["write"] for name in nodes["write"].after)
    assert [node.name for node in written_by(graph, "g")] == ["table"]
    table = torch.zeros(4, 2)
    Executor(graph, "g").run([table, torch.tensor([[2]]), torch.ones(1, 2)])
    assert table.sum() == 2


@pytest.mark.parametrize("inputs", _ORDERS.values(), ids=_ORDERS)
def test_a_write_into_a_parameter_is_found_whatever_stands_before_it(inputs: list[str]) -> None:
    where = Binding("prefill", _bound("parameter"), (), {}, {})
    with pytest.raises(ArtifactError, match="writes into parameter table, which is no cache"):
        check_graph(read_graph(writing(inputs), "g"), where, "g")
    check_graph(read_graph(writing(inputs), "g"), Binding("prefill", _bound("cache"), (), {}, {}), "g")


@pytest.mark.parametrize(
    "between",
    [
        *[(kind,) for kind in ("Reshape", "Identity", "Squeeze", "Unsqueeze", "Cast", "SplitV", "TensorMove")],
        ("Reshape", "Identity", "Reshape", "TensorMove", "SplitV"),
        ("ScatterNdUpdate", "Scatter", "Cast"),
    ],
    ids=" ".join,
)
def test_a_write_into_a_parameter_is_found_through_every_chain_of_views(between: tuple[str, ...]) -> None:
    graph = read_graph(writing(_ORDERS["first"], between=between), "g")
    with pytest.raises(ArtifactError, match="writes into parameter table"):
        check_graph(graph, Binding("prefill", _bound("parameter"), (), {}, {}), "g")
    with pytest.raises(ArtifactError, match="writes into the constant 'table'"):
        written_by(read_graph(writing(_ORDERS["first"], "FileConstant", between), "g"), "g")


def _bound(kind: str) -> tuple[BoundInput, ...]:
    cache = kind == "cache"
    first = BoundInput(kind, "keys" if cache else "table", 0 if cache else None, "fp32", (4, 2), False, not cache)
    rest = (BoundInput("argument", name, None, "fp32", (1, 2), False, False) for name in ("at", "new"))
    return (first, *rest)


def test_an_operator_with_control_edges_alone_has_no_inputs() -> None:
    data = serialized(("a", "Data", []), ("b", "Add", ["a:-1", "a:-1"]), ("out", "NetOutput", ["a:-1", "a:0", "b:-1"]))
    graph = read_graph(data, "g")
    nodes = {node.name: node for node in graph.nodes}
    assert (nodes["b"].inputs, nodes["b"].first, nodes["b"].after) == ((), None, ("a", "a"))
    assert graph.output.inputs == (("a", 0),)
    with pytest.raises(ArtifactError, match="Add b: its first input is not fed"):
        Executor(graph, "g").run([torch.ones(1)])


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([("a", "Add", ["b:-1"]), ("b", "Add", ["a:-1"])], "part of a cycle"),
        ([("a", "Add", ["ghost:-1"])], "reads 'ghost', which no node produces"),
        ([("a", "Data", []), ("out", "NetOutput", ["a:0"]), ("b", "Add", ["out:-1"])], "reads the graph's output"),
    ],
)
def test_control_edges_are_checked_like_all_others(ops: list[Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_graph(serialized(*ops), "x/graph.pb")


def test_what_lives_is_decided_by_inputs_and_by_orders() -> None:
    edges = {"write": ["early:-1", "view:0"], "view": ["cache:0"], "early": [], "cache": [], "out": ["cache:0"]}
    kinds = {"write": "Scatter", "view": "Reshape", "early": "Add", "cache": "Data", "out": "NetOutput"}
    assert live_ops(op_of(name, kinds[name], edges[name]) for name in edges) == set(edges)


def test_every_operator_whose_output_may_be_its_input_counts_as_a_view(build: Build) -> None:
    """Seen while a model answers: an operator that is missing there could write through to a parameter."""
    found: set[str] = set()
    ran: set[str] = set()

    def watched(step: Any) -> Any:
        def run(node: Any, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            outputs: tuple[torch.Tensor, ...] = step.function(node, *inputs)
            given = {x.untyped_storage().data_ptr() for x in inputs if x is not None and x.numel()}
            ran.add(node.op)
            if any(out.untyped_storage().data_ptr() in given for out in outputs):
                found.add(node.op)
            return outputs

        return dataclasses.replace(step, function=run)

    for operators in ("fused", "recipe"):
        _, artifact = build(f"not_numbers_{operators}", tiny_config(), batches="1,2", operators=operators)
        model = load(artifact, "reference")
        for executor in model.backend._executors.values():  # type: ignore[attr-defined]
            executor._steps = [watched(step) for step in executor._steps]
        picture = [{"type": "image", "image": Image.new("RGB", (56, 56))}, {"type": "text", "text": "a"}]
        model.generate([{"role": "user", "content": picture}], max_new_tokens=2)
    assert {"Scatter", "Reshape", "FusedInferAttentionScore", "PromptFlashAttention"} <= ran
    assert "Scatter" in found
    assert all(known(op).writes or known(op).view for op in found)
