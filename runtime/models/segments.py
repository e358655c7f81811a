"""Which segments the vision tower runs together, for every backend.

A segment is one frame group of one picture or clip; attention stays inside it. The tower takes segments as rows of a
batch [F, S, ...], so that no mask is needed: rows of one length are one run and exact. Where the engine takes each
row's true length, rows of other lengths may join, padded to the longest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Padding costs the arithmetic of its patches; a run of its own costs every operator's launch and one more reading of
# the tower's weights (1.3 GB in bf16), which bounds a run of few patches. So a little padding is cheaper: at most one
# patch in eight.
_PADDED_PART = 8


@dataclass(frozen=True)
class Run:
    """Segments of one call, by their numbers in the request, each a row of `length` patches; `lengths` are true.

    packed: in the form that takes segments end to end, their lengths; the run is then one row of neighbours.
    """

    segments: tuple[int, ...]
    lengths: tuple[int, ...]
    length: int
    packed: tuple[int, ...] = ()


def plan_runs(segment_ends: Sequence[int], most_patches: int, pads: bool) -> list[Run]:
    """The runs that together compute all segments; those of one length are never torn apart but by most_patches.

    segment_ends: cumulative patch counts. most_patches: of one run, padding included; a longer segment runs alone.
    pads: whether rows may be shorter than the run is long.
    """
    lengths = np.diff(np.asarray(segment_ends, np.int64), prepend=0).tolist()
    by_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(length, []).append(number)
    runs: list[Run] = []
    group: list[int] = []

    def close() -> None:
        members = tuple(sorted(group))
        runs.append(Run(members, tuple(lengths[i] for i in members), max(lengths[i] for i in members)))
        group.clear()

    # longest first: a row that joins is never longer than the run
    for length, members in sorted(by_length.items(), reverse=True):
        if group:
            area = lengths[group[0]] * (len(group) + len(members))
            padding = area - sum(lengths[i] for i in group) - length * len(members)
            if not pads or padding * _PADDED_PART > area or area > most_patches:
                close()
        rows = len(members) if group else max(1, most_patches // length)
        for first in range(0, len(members), rows):
            if first:
                close()
            group += members[first : first + rows]
    if group:
        close()
    return runs


def plan_packed(segment_ends: Sequence[int], most_patches: int, most_segments: int) -> list[Run]:
    """As plan_runs, of segments end to end: neighbours in order, as many as a call takes."""
    lengths = np.diff(np.asarray(segment_ends, np.int64), prepend=0).tolist()
    runs: list[Run] = []
    first = patches = 0
    for number, length in enumerate([*lengths, most_patches]):
        last = number == len(lengths)
        if number > first and (last or number - first == most_segments or patches + length > most_patches):
            # to the rest of this module one row that is as long as all of them
            runs.append(Run((number - 1,), (patches,), patches, tuple(lengths[first:number])))
            first, patches = number, 0
        patches += length
    return runs


@dataclass(frozen=True)
class Piece:
    """`count` rows of a run's output, from row `begin`, that are rows `to`... of all embeddings."""

    begin: int
    count: int
    to: int


@dataclass(frozen=True, eq=False)
class VisualCall:
    """One call of the visual graph: arguments and lengths by the names of its GraphSpec, and where the rows of its
    output belong among all embeddings."""

    arguments: Mapping[str, NDArray[Any]]
    lengths: Mapping[str, list[int]]
    pieces: tuple[Piece, ...]


def rows_in(calls: Sequence[VisualCall]) -> int:
    """Embeddings that the calls make together."""
    return sum(piece.count for call in calls for piece in call.pieces)


def rows_of(
    run: Run, segment_ends: Sequence[int], patches: NDArray[np.uint8], positions: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """patches [N, patch_dim] and positions [2, N] of a request as a run takes them: [F, S, patch_dim] and [2, F, S].

    Views where the run holds neighbours in order; padding is zeros.
    """
    count = len(run.segments)
    starts = [segment_ends[i] - length for i, length in zip(run.segments, run.lengths, strict=True)]
    end = starts[0] + count * run.length
    if starts == list(range(starts[0], end, run.length)) and set(run.lengths) == {run.length}:
        taken, places = patches[starts[0] : end], positions[:, starts[0] : end]
        return taken.reshape(count, run.length, -1), places.reshape(2, count, run.length)
    taken = np.zeros((count, run.length, patches.shape[1]), np.uint8)
    places = np.zeros((2, count, run.length), np.int64)
    for row, (start, length) in enumerate(zip(starts, run.lengths, strict=True)):
        taken[row, :length] = patches[start : start + length]
        places[:, row, :length] = positions[:, start : start + length]
    return taken, places


def pieces(run: Run, segment_ends: Sequence[int], merge_size: int) -> tuple[Piece, ...]:
    """Where a run's rows of output [F * S / merge_size**2, H] belong among all embeddings."""
    merge = merge_size**2
    return joined(
        (row * run.length // merge, length // merge, (segment_ends[segment] - length) // merge)
        for row, (segment, length) in enumerate(zip(run.segments, run.lengths, strict=True))
    )


def joined(parts: Iterable[tuple[int, int, int]]) -> tuple[Piece, ...]:
    """Pieces of (begin, count, to), of which neighbours are one."""
    made: list[Piece] = []
    for begin, count, to in parts:
        last = made[-1] if made else None
        if last is not None and (begin, to) == (last.begin + last.count, last.to + last.count):
            made[-1] = Piece(last.begin, last.count + count, last.to)
        else:
            made.append(Piece(begin, count, to))
    return tuple(made)
