"""Segments of pictures and clips in runs: each is computed once, in its place, and padding is as little as stated."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_tc.runtime.models.segments import pieces, plan_packed, plan_runs, rows_of

SIZES = st.lists(st.integers(1, 40).map(lambda n: 4 * n), min_size=1, max_size=12)


def ends(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


@given(SIZES, st.booleans(), st.integers(40, 600))
def test_every_segment_is_computed_once_and_lands_in_its_place(lengths: list[int], pads: bool, most: int) -> None:
    total = sum(lengths)
    patches = np.arange(total, dtype=np.int64)[:, None].astype(np.uint8)
    positions = np.stack([np.arange(total), -np.arange(total)])
    placed = np.full(total // 4, -1)
    for run in plan_runs(ends(lengths), most, pads):
        taken, places = rows_of(run, ends(lengths), patches, positions)
        count = len(run.segments)
        assert taken.shape == (count, run.length, 1) and places.shape == (2, count, run.length)
        # what a tower would give: for each merged patch the number of the first patch in it
        made = places[0].reshape(-1, 4)[:, 0] // 4
        for piece in pieces(run, ends(lengths), 2):
            assert (placed[piece.to : piece.to + piece.count] == -1).all()
            placed[piece.to : piece.to + piece.count] = made[piece.begin : piece.begin + piece.count]
        for row, length in enumerate(run.lengths):
            start = ends(lengths)[run.segments[row]] - length
            assert (taken[row, :length, 0] == patches[start : start + length, 0]).all()
            assert (places[:, row, :length] == positions[:, start : start + length]).all()
            assert not taken[row, length:].any() and not places[:, row, length:].any()
    assert placed.tolist() == list(range(total // 4))


@given(SIZES, st.booleans(), st.integers(40, 600))
def test_a_run_is_bounded_and_pads_at_most_one_patch_in_eight(lengths: list[int], pads: bool, most: int) -> None:
    for run in plan_runs(ends(lengths), most, pads):
        patches = len(run.segments) * run.length
        assert patches <= most or len(run.segments) == 1
        assert patches - sum(run.lengths) <= (patches // 8 if pads else 0)


@pytest.mark.parametrize("pads", [True, False])
def test_segments_of_one_length_are_one_run_and_no_copy(pads: bool) -> None:
    (run,) = plan_runs([16, 32, 48], 1 << 16, pads)
    patches = np.zeros((48, 3), np.uint8)
    taken, _ = rows_of(run, [16, 32, 48], patches, np.zeros((2, 48), np.int64))
    assert run.lengths == (16, 16, 16) and np.shares_memory(taken, patches)
    assert [(p.begin, p.count, p.to) for p in pieces(run, [16, 32, 48], 2)] == [(0, 12, 0)]


def test_little_padding_joins_sizes_and_much_does_not() -> None:
    assert [run.segments for run in plan_runs([64, 124], 1 << 16, True)] == [(0, 1)]
    assert [run.segments for run in plan_runs([64, 124], 1 << 16, False)] == [(0,), (1,)]
    assert [run.segments for run in plan_runs([64, 80], 1 << 16, True)] == [(0,), (1,)]


@given(SIZES, st.booleans(), st.integers(40, 600))
def test_segments_of_one_length_are_torn_apart_by_nothing_but_the_bound(
    lengths: list[int], pads: bool, most: int
) -> None:
    runs = plan_runs(ends(lengths), most, pads)
    for length in set(lengths):
        having = [run for run in runs if length in run.lengths]
        assert len(having) == 1 or lengths.count(length) * length > most


def test_what_pads_little_does_not_tear_a_group_apart() -> None:
    assert [run.segments for run in plan_runs([24, 48, 80], 1 << 16, True)] == [(2,), (0, 1)]


@given(SIZES, st.integers(40, 600), st.integers(1, 5))
def test_segments_end_to_end_are_computed_once_in_order(lengths: list[int], most: int, segments: int) -> None:
    runs = plan_packed(ends(lengths), most, segments)
    assert [length for run in runs for length in run.packed] == lengths
    patches = np.arange(sum(lengths), dtype=np.int64)[:, None].astype(np.uint8)
    positions = np.stack([np.arange(sum(lengths))] * 2)
    begin = 0
    for run in runs:
        assert len(run.packed) <= segments and (sum(run.packed) <= most or len(run.packed) == 1)
        taken, places = rows_of(run, ends(lengths), patches, positions)
        assert (places[0, 0] == np.arange(begin, begin + sum(run.packed))).all() and len(taken) == 1
        assert [(p.begin, p.count, p.to) for p in pieces(run, ends(lengths), 2)] == [
            (0, sum(run.packed) // 4, begin // 4)
        ]
        begin += sum(run.packed)


def test_pictures_of_one_size_join_over_others_between_them() -> None:
    assert sorted(run.segments for run in plan_runs([64, 80, 144], 1 << 16, False)) == [(0, 2), (1,)]
