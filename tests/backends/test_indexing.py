"""Operators that move values, on CPU: what they write where, and that nothing else is written."""

from typing import Any

import pytest
import torch
from helpers.kernels import assert_close, normal, run, wide

from qwen2vl_tc.artifacts.errors import ArtifactError


def test_scatter_writes_each_row_at_its_own_index_in_place() -> None:
    var = torch.zeros(2, 5, 3)
    updates = normal(2, 1, 3)
    (got,) = run("Scatter", var, torch.tensor([4, 1]), updates, axis=1, reduce="update")
    assert got is var
    assert torch.equal(var[0, 4], updates[0, 0])
    assert torch.equal(var[1, 1], updates[1, 0])
    assert var.count_nonzero() == 6


def test_scatter_outside_the_cache_is_refused() -> None:
    with pytest.raises(ArtifactError, match="writes 5 to 6 of axis 1, which has 5"):
        run("Scatter", torch.zeros(1, 5, 3), torch.tensor([5]), torch.zeros(1, 1, 3), axis=1, reduce="update")
    with pytest.raises(ArtifactError, match="reduce=update"):
        run("Scatter", torch.zeros(1, 5, 3), torch.tensor([5]), torch.zeros(1, 1, 3), axis=1, reduce="add")


def test_indexing_and_shape_operators() -> None:
    x = normal(4, 3)
    assert torch.equal(run("GatherV2", x, torch.tensor([[2, 0]]), torch.tensor([0]))[0], x[[2, 0]][None])
    assert torch.equal(run("GatherV2", x, torch.tensor([1]), torch.tensor([1]))[0], x[:, 1:2])
    moved = run("TensorMove", x)[0]
    updated = run("ScatterNdUpdate", moved, torch.tensor([[3], [1]]), normal(2, 3, seed=1))[0]
    assert torch.equal(updated[[3, 1]], normal(2, 3, seed=1))
    assert torch.equal(x, normal(4, 3)), "TensorMove protects what it copies"
    assert [part.shape for part in run("SplitV", x, torch.tensor([1, 3]), torch.tensor(0))] == [(1, 3), (3, 3)]
    assert run("Reshape", x, torch.tensor([0, -1, 1]), axis=0, num_axes=-1)[0].shape == (4, 3, 1)
    assert_close(run("ReduceSum", x, torch.tensor([0]), keep_dims=False)[0], wide(x).sum(0))
    assert run("Cast", x, dst_type=27)[0].dtype == torch.bfloat16
    assert torch.equal(run("Add", x, x)[0], run("Mul", x, torch.tensor(2.0))[0])


def test_arg_max_takes_the_first_of_equal_values() -> None:
    (got,) = run("ArgMaxV2", torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([-1]), dtype=9)
    assert (got.tolist(), got.dtype) == ([1], torch.int64)


@pytest.mark.parametrize(
    ("indices", "updates", "given", "message"),
    [
        ([4, -1], (2, 1, 3), {}, "writes -1 to 0 of axis 1, which has 5"),
        ([0, 4], (2, 2, 3), {}, "writes 4 to 6 of axis 1, which has 5"),
        ([0, 0], (2, 1, 1), {}, r"updates \[2, 1, 1\] do not fit var \[2, 5, 3\]"),
        ([0, 0], (1, 1, 3), {}, r"updates \[1, 1, 3\] do not fit"),
        ([0, 0], (3, 1, 3), {}, r"updates \[3, 1, 3\] do not fit"),
        ([0, 0], (2, 3), {}, r"updates \[2, 3\] do not fit"),
        ([0], (1, 1, 3), {}, "one index a row"),
        ([[0], [0]], (2, 1, 3), {}, "one index a row"),
        ([0.0, 0.0], (2, 1, 3), {}, "got float32 values"),
        ([0, 0], (2, 1, 3), {"axis": 0}, "axis 0 holds the rows"),
        ([0, 0], (2, 1, 3), {"axis": -3}, "axis 0 holds the rows"),
        ([0, 0], (2, 1, 3), {"axis": 3}, "axis 3 of a tensor of 3 dimensions"),
        ([0, 0], (2, 1, 3), {"reduce": "add"}, "only reduce=update"),
    ],
)
def test_a_scatter_that_does_not_fit_is_refused_and_writes_nothing(
    indices: Any, updates: tuple[int, ...], given: dict[str, Any], message: str
) -> None:
    var = torch.zeros(2, 5, 3)
    with pytest.raises(ArtifactError, match=f"Scatter under_test: .*{message}"):
        run("Scatter", var, torch.tensor(indices), torch.ones(updates), **{"axis": 1, "reduce": "update", **given})
    assert not var.any()


@pytest.mark.parametrize(
    ("indices", "updates", "message"),
    [
        ([[-1], [0]], (2, 3), "writes row -1 of 4"),
        ([[0], [4]], (2, 3), "writes row 4 of 4"),
        ([[0], [1]], (1, 3), r"updates \[1, 3\] for 2 rows of \[4, 3\]"),
        ([[0], [1]], (2, 1), "for 2 rows"),
        ([[0], [1]], (3,), "for 2 rows"),
        ([[0, 1], [1, 1]], (2,), r"indices have the shape \[2, 2\], expected \[n, 1\]"),
        ([0, 1], (2, 3), "expected"),
        ([[True], [False]], (2, 3), "got bool values"),
    ],
)
def test_a_row_update_that_does_not_fit_is_refused_and_writes_nothing(
    indices: Any, updates: tuple[int, ...], message: str
) -> None:
    var = torch.zeros(4, 3)
    with pytest.raises(ArtifactError, match=f"ScatterNdUpdate under_test: .*{message}"):
        run("ScatterNdUpdate", var, torch.tensor(indices), torch.ones(updates))
    assert not var.any()


def test_updates_of_another_dtype_are_refused() -> None:
    with pytest.raises(ArtifactError, match="float16, float32, expected one dtype"):
        run("ScatterNdUpdate", torch.zeros(4, 3).half(), torch.tensor([[0]]), torch.ones(1, 3))
    with pytest.raises(ArtifactError, match="float16, float32, expected one dtype"):
        given = {"axis": 1, "reduce": "update"}
        run("Scatter", torch.zeros(1, 4, 3).half(), torch.tensor([0]), torch.ones(1, 1, 3), **given)


def test_sums_of_integers_are_exact() -> None:
    x = torch.tensor([[1 << 40, 1], [1, 1]])
    assert run("ReduceSum", x, torch.tensor([0]))[0].tolist() == [(1 << 40) + 1, 2]
    assert run("ReduceSum", x, torch.tensor([1, 0]), keep_dims=True)[0].tolist() == [[(1 << 40) + 3]]


def test_reduce_all_holds_where_everything_does() -> None:
    x = torch.tensor([[True, True, False], [True, True, True]])
    assert run("ReduceAll", x, torch.tensor([1]))[0].tolist() == [False, True]
    assert run("ReduceAll", x, torch.tensor([0, -1], dtype=torch.int32), keep_dims=True)[0].tolist() == [[False]]
    assert run("ReduceAll", x[1:], torch.tensor([0, 1]))[0].item() is True
    with pytest.raises(ArtifactError, match="got int64, expected bool"):
        run("ReduceAll", x.long(), torch.tensor([0]))


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceAll"])
def test_axes_that_do_not_fit_are_refused(op: str) -> None:
    x = torch.ones(2, 3) if op == "ReduceSum" else torch.ones(2, 3).bool()
    for axes, message in (([2], "axis 2 of a tensor of 2"), ([], "names no axis"), ([0, 0], "cannot run on")):
        with pytest.raises(ArtifactError, match=message):
            run(op, x, torch.tensor(axes, dtype=torch.int64))


@pytest.mark.parametrize(
    ("op", "inputs", "message"),
    [
        ("GatherV2", (torch.tensor([4]), torch.tensor([0])), "cannot run on"),
        ("GatherV2", (torch.tensor([-1]), torch.tensor([0])), "cannot run on"),
        ("GatherV2", (torch.tensor([0]), torch.tensor([2])), "axis 2 of a tensor of 2"),
        ("GatherV2", (torch.tensor([0]), torch.tensor([0, 1])), "cannot run on"),
        ("SplitV", (torch.tensor([1, 2]), torch.tensor([0])), "cannot run on"),
        ("SplitV", (torch.tensor([1, 3]), torch.tensor([0, 1])), "cannot run on"),
        ("Reshape", (torch.tensor([5, 3]),), "cannot run on"),
        ("Reshape", (torch.tensor([12.0]),), "got float32 values"),
        ("ArgMaxV2", (torch.tensor([2]),), "axis 2 of a tensor of 2"),
    ],
)
def test_indices_and_sizes_outside_are_refused(op: str, inputs: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"{op} under_test: .*{message}"):
        run(op, normal(4, 3), *inputs)


def test_identity_hands_on_its_input() -> None:
    x = normal(2)
    assert run("Identity", x)[0] is x
