"""Whatever a graph feeds to an operator, it computes or is an ArtifactError that names it; nothing else comes out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.kernels import node, normal, run

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.runtime.ops import OPERATORS, computed

_X = (2, 4)
_ATTENTION = {"num_heads": 2, "num_key_value_heads": 2, "input_layout": "BSH", "sparse_mode": 0}
_KV = [normal(2, 5, 16), normal(2, 5, 16)]
_LENGTHS = torch.tensor([3, 5])
# a call of every operator that it computes
CALLS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Add": ([normal(*_X), normal(*_X)], {}),
    "AddLayerNorm": ([normal(*_X), normal(*_X), *[normal(4)] * 3], {"epsilon": 1e-6}),
    "AddRmsNorm": ([normal(*_X), normal(*_X), normal(4)], {"epsilon": 1e-6}),
    "Addcmul": ([*[normal(*_X)] * 3, torch.tensor(2.0)], {}),
    "ArgMaxV2": ([normal(*_X), torch.tensor([-1])], {"dtype": 9}),
    "Cast": ([normal(*_X)], {"dst_type": 27}),
    "FastGelu": ([normal(*_X)], {}),
    "FusedInferAttentionScore": (
        [normal(2, 3, 16), *_KV, None, None, torch.tensor([1, 3]), _LENGTHS],
        {**_ATTENTION, "scale": 0.5},
    ),
    "Gather": ([torch.tensor([4, 5, 6]), torch.tensor(1)], {}),
    "GatherV2": ([normal(*_X), torch.tensor([1, 0]), torch.tensor([0])], {"batch_dims": 0}),
    "GeluV2": ([normal(*_X)], {"approximate": "none"}),
    "Identity": ([normal(*_X)], {}),
    "IncreFlashAttention": ([normal(2, 1, 16), *_KV, None, None, _LENGTHS], {**_ATTENTION, "scale_value": 0.5}),
    "IsFinite": ([normal(*_X)], {}),
    "LayerNormV4": ([normal(*_X), torch.tensor([4]), normal(4), normal(4)], {"epsilon": 1e-6}),
    "MatMul": ([normal(2, 4), normal(3, 4), normal(3)], {"transpose_x1": False, "transpose_x2": True}),
    "Mul": ([normal(*_X), normal(*_X)], {}),
    "Pack": ([torch.tensor(3), torch.tensor(4)], {"axis": 0, "N": 2}),
    "PromptFlashAttention": (
        [normal(2, 3, 16), *_KV, None, torch.zeros(2, 1, 3, 5, dtype=torch.bool), torch.tensor([1, 3]), _LENGTHS],
        {**_ATTENTION, "scale_value": 0.5, "pre_tokens": 9, "next_tokens": 9},
    ),
    "ReduceAll": ([torch.ones(*_X).bool(), torch.tensor([0])], {"keep_dims": True}),
    "ReduceSum": ([normal(*_X), torch.tensor([0])], {"keep_dims": True}),
    "Reshape": ([normal(*_X), torch.tensor([8])], {"axis": 0, "num_axes": -1}),
    "RmsNorm": ([normal(*_X), normal(4)], {"epsilon": 1e-6}),
    "RotaryMul": ([normal(1, 3, 2, 4), *[normal(1, 3, 1, 4)] * 2], {"rotary_mode": "half"}),
    "RotaryPositionEmbedding": ([normal(1, 3, 2, 4), *[normal(1, 3, 1, 4)] * 2], {"mode": 0}),
    "Scatter": ([normal(2, 5, 3), _LENGTHS - 1, normal(2, 1, 3)], {"reduce": "update", "axis": 1}),
    "ScatterNdUpdate": ([normal(*_X), torch.tensor([[1]]), normal(1, 4)], {}),
    "SelectV2": ([torch.ones(4).bool(), normal(*_X), normal(*_X)], {}),
    "Shape": ([normal(*_X)], {"dtype": 9}),
    "SplitV": ([normal(*_X), torch.tensor([1, 3]), torch.tensor([1])], {"num_split": 2}),
    "SwiGlu": ([normal(*_X)], {"dim": -1}),
    "TensorMove": ([normal(*_X)], {}),
}
# attributes that these calls need: they have no default, or not this one
_NEEDED = {
    "Cast": {"dst_type"},
    "FusedInferAttentionScore": {"num_heads"},
    "IncreFlashAttention": {"num_heads"},
    "MatMul": {"transpose_x2"},
    "PromptFlashAttention": {"num_heads", "next_tokens"},
    "Scatter": {"reduce", "axis"},
}


def altered(x: Any) -> Iterator[Any]:
    """Other values for an input of an operator."""
    yield None
    for dtype in (torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool):
        yield torch.zeros(2, 4).to(dtype)
    for shape in ((), (0,), (1,), (3,), (0, 4), (2, 0), (7, 9), (2, 2, 2, 2, 2)):
        yield torch.zeros(shape)
        yield torch.zeros(shape, dtype=torch.int64)
    for value in (-1, -(1 << 62), 1 << 40, (1 << 63) - 1):
        yield torch.tensor([value])
        yield torch.tensor(value)
        if x is not None:
            yield torch.full(x.shape, value)
    if x is not None and x.dim():
        yield x[..., :-1]
        yield x[:1]
        yield torch.cat([x, x])
        yield x[None]
        yield x[0]


VALUES: list[Any] = [None, "", "half", -1, 0, 1, 7, 1 << 40, -(1 << 63), 0.5, float("nan"), True, [], [1, 2], object()]


def test_every_operator_of_the_table_is_called_here_as_it_computes() -> None:
    assert CALLS.keys() == set(computed())
    for op, (inputs, given) in CALLS.items():
        assert all(isinstance(x, torch.Tensor) for x in run(op, *copied(inputs), **given))


def copied(inputs: list[Any]) -> list[Any]:
    return [None if x is None else x.clone() for x in inputs]


def outcome(op: str, soc: str, inputs: list[Any], given: dict[str, Any]) -> ArtifactError | None:
    """The error of a call, None if it computes. Anything else that is raised is a failure of the test."""
    call = node(op, **given)
    try:
        outputs = OPERATORS[op].kernel(soc)(call, *copied(inputs))
    except ArtifactError as error:
        assert str(error).startswith(f"{op} under_test: ") and "\n" not in str(error)
        return error
    assert isinstance(outputs, tuple) and all(isinstance(x, torch.Tensor) for x in outputs)
    return None


@pytest.mark.parametrize("soc", ["Ascend910B2", "Ascend950PR_9589"])
@pytest.mark.parametrize("op", computed())
def test_inputs_that_do_not_fit_are_refused_by_name(op: str, soc: str) -> None:
    inputs, given = CALLS[op]
    refused = []
    for i, x in enumerate(inputs):
        for other in altered(x):
            refused.append(outcome(op, soc, [*inputs[:i], other, *inputs[i + 1 :]], given))
    for count in range(len(inputs)):
        refused.append(outcome(op, soc, inputs[:count], given))
    refused.append(outcome(op, soc, [*inputs, *[torch.ones(1)] * 9], given))
    assert any(refused)


@pytest.mark.parametrize("op", computed())
def test_attributes_of_any_value_are_computed_or_refused_by_name(op: str) -> None:
    inputs, given = CALLS[op]
    for name in given:
        for value in VALUES:
            outcome(op, "Ascend910B2", inputs, {**given, name: value})


@pytest.mark.parametrize("op", computed())
def test_attributes_have_the_operators_defaults(op: str) -> None:
    """A graph may leave out what equals its default."""
    inputs, given = CALLS[op]
    for name in given:
        error = outcome(op, "Ascend910B2", inputs, {key: value for key, value in given.items() if key != name})
        assert (error is not None) == (name in _NEEDED.get(op, ())), name


def test_the_cause_of_an_error_is_kept() -> None:
    with pytest.raises(ArtifactError, match=r"Add under_test: cannot run on .* RuntimeError") as caught:
        run("Add", normal(2), normal(3))
    assert isinstance(caught.value.__cause__, RuntimeError)
