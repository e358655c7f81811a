"""What the self-test expects: of every call's output as much as tells a right one from a wrong one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import ArtifactError
from ...runtime.backends.base import Ints
from .inputs import SelftestInputs
from .observe import Call, Observed

Floats = NDArray[np.float32]
# Columns that are kept of an output, evenly spaced: a tile of a matrix product that is wrong, 128 columns and more at
# vocabulary size, holds one of them.
_COLUMNS = 2048
# The largest logits of every call are kept too: they decide.
_LARGEST = 8
# Sums of a whole row under fixed signs: what is wrong in any column is in each of them.
SUMS = 16


@dataclass(frozen=True, eq=False)
class Answer:
    """What is kept of one call's output: values fp32 [rows, columns + sums], and the standard deviation of all of it.

    The sums are divided by the root of the width, which gives them the size of the values.
    """

    values: Floats
    std: float


@dataclass(frozen=True, eq=False)
class Known:
    """Inputs and answers. columns: which are kept, of embeddings and of logits."""

    inputs: SelftestInputs
    columns: tuple[Ints, Ints]
    answers: Mapping[Call, Answer]

    def print_of(self, call: Call, output: Floats) -> Floats:
        """An output [rows, width] as `answers` holds it."""
        return _print(output, self.columns[call[0] >= 0])


@cache
def _signs(width: int) -> NDArray[np.float64]:
    """[SUMS, width] of 1 and -1: bits of a hash of the column (splitmix64), equal wherever they are made."""
    with np.errstate(over="ignore"):
        x = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    bits = (x[None] >> np.arange(SUMS, dtype=np.uint64)[:, None]) & np.uint64(1)
    return bits.astype(np.float64) * 2 - 1


def _print(output: Floats, columns: Ints) -> Floats:
    width = output.shape[1]
    # without the mean, which can be far larger than what tells two outputs apart, the sums would be about it alone
    centred = output.astype(np.float64) - output.mean(dtype=np.float64)
    sums = centred @ _signs(width).T / np.sqrt(width)
    return np.concatenate([output[:, columns], sums], 1).astype(np.float32)


def known_of(inputs: SelftestInputs, outputs: Mapping[Call, Floats]) -> Known:
    """The answers that these whole outputs are. Raises ArtifactError for one that is not finite."""
    for call, output in outputs.items():
        if not np.isfinite(output).all():
            raise ArtifactError(f"self-test: the expected output of call {call} is not finite; verify the artifact")
    spaced = [np.unique(np.linspace(0, width - 1, min(width, _COLUMNS), dtype=np.int64)) for width in _widths(outputs)]
    largest = [np.argsort(out[0])[-_LARGEST:] for (script, _), out in outputs.items() if script >= 0]
    columns = (spaced[0], np.unique(np.concatenate([spaced[1], *largest])))
    answers = {
        call: Answer(_print(out, columns[call[0] >= 0]), float(out.std(dtype=np.float64)))
        for call, out in outputs.items()
    }
    return Known(inputs, columns, answers)


def _widths(outputs: Mapping[Call, Floats]) -> tuple[int, int]:
    return outputs[-1, 0].shape[1], outputs[0, 0].shape[1]


def whole_outputs(observed: Iterable[Observed]) -> dict[Call, Floats]:
    """The first output of every call."""
    outputs: dict[Call, Floats] = {}
    for each in observed:
        outputs.setdefault(each.call, each.output)
    return outputs
