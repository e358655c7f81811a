"""The table of operators: each says all that is asked of it, and another is one more file."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from qwen2vl_tc.artifacts.cann import RELEASES
from qwen2vl_tc.artifacts.ge.binding import ARGUMENT, Binding, BoundInput, BoundOutput
from qwen2vl_tc.artifacts.ge.graph import GeGraph, read_graph
from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.runtime import ops
from qwen2vl_tc.runtime.backends.ge.executor import Executor
from qwen2vl_tc.runtime.models.base import Argument, GraphSpec
from qwen2vl_tc.runtime.ops import OPERATORS, computed, known
from qwen2vl_tc.runtime.ops.base import DEVICE, LAYOUT, SHAPE, TensorSpec
from qwen2vl_tc.runtime.ops.graphs import count_kinds
from qwen2vl_tc.runtime.ops.rule import BLOCKING
from qwen2vl_tc.toolchain.check.check import violations
from qwen2vl_tc.toolchain.check.facts import graph_facts
from qwen2vl_tc.toolchain.check.rules import GRAPH_RULES, missing_from
from qwen2vl_tc.toolchain.eager import npu_ops
from qwen2vl_tc.toolchain.inspect.cost import Lengths, graph_cost
from qwen2vl_tc.toolchain.inspect.shapes import propagate

LENGTHS = Lengths(patches=4, segments=(4,), tokens=2, image_tokens=1)
SIGMOID = '''
"""Sigmoid: 1 / (1 + exp(-x))."""

from .base import Call, Eager, Operator, moved
from .kernel import Outputs, Tensor, floating
from .rule import LIBRARY, Rule, listed, rows
from .shapes import same


def run(node: Call, x: Tensor) -> Outputs:
    floating(node, x)
    return (x.float().sigmoid().to(x.dtype),)


OPERATOR = Operator(
    "Sigmoid",
    shape=same,
    cost=moved,
    run=run,
    eager=Eager("npu_sigmoid_of_a_test(Tensor input) -> Tensor", ("input",)),
    rules=(
        Rule("SIG-01", "no axis is empty", "(gt in.x.size 0)", "feed values", LIBRARY),
        listed("Sigmoid", "x 0", rows("T T", "bf16 fp16 fp32")),
    ),
)
'''


def test_every_operator_that_a_graph_may_hold_is_complete() -> None:
    for name in computed():
        operator = OPERATORS[name]
        assert operator.kind in (DEVICE, SHAPE, LAYOUT), name
        assert operator.shape is not None and operator.run is not None, name
        assert (operator.cost is not None) == (operator.kind == DEVICE), name
        assert (operator.values is not None) == (operator.kind == SHAPE), name
        assert any(rule.lists for rule in operator.rules), name


def test_every_operator_is_named_as_its_file_and_its_eager_call_as_no_other() -> None:
    for name, operator in OPERATORS.items():
        file = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        assert operator.ge == name
        assert Path(str(ops.__file__)).with_name(f"{file}.py").is_file()
    called = [operator.eager.name for operator in OPERATORS.values() if operator.eager]
    assert len(called) == len(set(called)) == 13


def test_rules_have_ids_of_their_own_and_known_severities_and_releases() -> None:
    rules = [*GRAPH_RULES, *(rule for operator in OPERATORS.values() for rule in operator.rules)]
    assert [id for id, count in Counter(rule.id for rule in rules).items() if count > 1] == []
    for rule in rules:
        assert rule.severity in (*BLOCKING, "undocumented", "cost"), rule.id
        assert set(rule.releases) <= set(RELEASES) and rule.releases, rule.id
        assert all(vars(rule.source).values()), rule.id


def test_a_name_that_is_no_operator_is_a_kernel_of_which_nothing_is_known() -> None:
    for name in ("Conv3D", "Base", "base", "mat_mul", "../os", "os.path", "", "Kernel"):
        assert name not in OPERATORS
        assert known(name).kind == DEVICE and known(name).run is None


def sigmoid_graph() -> GeGraph:
    model = message_class("ModelDef")()
    graph = model.graph.add(name="visual")
    for name, op, edge in (("x", "Data", ""), ("y", "Sigmoid", "x:0"), ("out", "NetOutput", "y:0")):
        node = graph.op.add(name=name, type=op)
        if edge:
            node.input.append(edge)
            node.input_desc.add(name="x")
        else:
            node.attr["index"].i = 0
        node.output_desc.add()
    return read_graph(model.SerializeToString(), "here")


def test_a_file_more_is_an_operator_more_to_all_that_reads_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor, inspect, check and the eager kernels know it, and nothing else was changed."""
    (tmp_path / "sigmoid.py").write_text(SIGMOID)
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.setattr(OPERATORS, "_read", {})
    graph = sigmoid_graph()
    x = torch.tensor([[0.0, 2.0]])
    assert Executor(graph, "here").run([x])[0].equal(x.sigmoid())
    bound = BoundInput(ARGUMENT, "x", None, "bf16", (4, 8), host=False, frozen=False)
    binding = Binding("visual", (bound,), (BoundOutput("embeds", "bf16"),), {}, {})
    inputs = [TensorSpec("bf16", (4, 8))]
    spec = GraphSpec("gate", "visual", "forward", (Argument("x", "bf16", (4, 8)),), (Argument("y", "bf16", (4, 8)),))
    cost = graph_cost(graph, binding, spec, inputs, LENGTHS, None, "here")
    assert (cost.flops, cost.moved_bytes) == (0, 2 * 4 * 8 * 2)
    assert count_kinds(node.op for node in graph.nodes)["device"] == 1
    facts = graph_facts(graph, binding)
    assert list(violations(graph, propagate(graph, inputs, "here"), facts)) == []
    (violated,) = violations(graph, propagate(graph, [TensorSpec("bf16", (0, 8))], "here"), facts)
    assert violated[0].id == "SIG-01"
    assert missing_from("Sigmoid") == ("8.0",)
    operator = OPERATORS["Sigmoid"]
    assert operator.eager is not None
    assert npu_ops.eager_kernel(operator, operator.eager)(x).equal(x.sigmoid())


def test_looking_up_an_operator_imports_its_file_and_no_torch() -> None:
    code = """
import sys
from qwen2vl_tc.runtime.ops import OPERATORS
assert OPERATORS["MatMul"].rules and "qwen2vl_tc.runtime.ops.swi_glu" not in sys.modules
assert len(OPERATORS) > 32
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
