"""What the generation loop asks of an engine. Tensors on the engine's device are opaque to the loop."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import RequestError
from ..models.base import Inputs, VisualLimits
from ..models.segments import VisualCall
from ..phases import PhaseTimes

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """What prefill or decode gave, on the device.

    next_token [rows] is the largest logit's index; logits [rows, vocabulary]. cache_index and positions, in the form
    that the engine takes, are the next decode step's inputs; None after prefill, which serves one row. checked_token
    [rows] is next_token where the row's logits are finite and -1 where not; None where an engine does not look.
    """

    next_token: Any
    logits: Any
    cache_index: Any = None
    positions: Any = None
    checked_token: Any = None
    # cache and rotary position of the token that each row is fed next; None where no step follows from this one
    places: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class Embeds:
    """Embeddings of pictures on the device: [count, hidden_size]. order: which placeholder each row is for, counted
    over the pictures; None where they are in order."""

    tensor: Any
    count: int
    order: Ints | None = None

    def placed(self, slots: Ints) -> Ints:
        """The placeholder's place for each row, of places [count] in order."""
        return slots if self.order is None else slots[self.order]

    def in_order(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The embeddings on the host, [count, hidden_size], in the order of the placeholders."""
        if self.order is None:
            return rows
        ordered = np.empty_like(rows)
        ordered[self.order] = rows
        return ordered


class Backend(ABC):
    """An engine with one model loaded. `name` is what --backend takes; `device` says what it runs on."""

    name: str
    device: str
    # decode steps worth having in flight before the host reads the oldest token; 0 where running is synchronous
    run_ahead: int = 0
    # positions of a row's KV cache
    max_length: int
    # rows that one decode step can serve at most
    max_rows: int = 1
    # whether a cache that served one request, whatever numbers that left in it, may serve the next as it is
    reuses_caches: bool = True

    def __init__(self) -> None:
        """Start the clock: a subclass's constructor calls this first."""
        # what making the engine takes
        self.loading = PhaseTimes()

    def close(self) -> None:
        """Let go of the weights and graphs; nothing runs afterwards."""
        # everything that an engine keeps is in its attributes; what it says about itself stays
        for name in [name for name in vars(self) if name.startswith("_")]:
            delattr(self, name)

    @abstractmethod
    def allocate(self, rows: int) -> Any:
        """A KV cache for `rows` rows. Raises RequestError when the artifact has no decode graph for so many."""

    def cache_rows(self, rows: int) -> int:
        """Rows of the cache that `allocate` gives for so many: what it was compiled for may be more."""
        return rows

    # how the visual graph takes patches
    visual_limits: VisualLimits

    def check_room(self, begin: int, end: int, positions: Iterable[int]) -> None:
        """Raises RequestError unless cache positions from `begin` to before `end` exist, and these rotary ones: an
        engine's operators write and read wherever an index points."""
        positions = list(positions)
        least, most = min(positions, default=0), max(positions, default=0)
        if begin < 0 or not begin < end <= self.max_length or least < 0 or most >= self.max_length:
            raise RequestError(
                f"cache positions {begin} to {end} and rotary position {most} are needed, the artifact has "
                f"{self.max_length}" + ("" if begin < 0 else f"; compile with --max-length {max(end, most + 1)}")
            )

    def embed(self, inputs: Inputs, patches: NDArray[np.uint8], grids: Ints) -> Embeds:
        """Embeddings of pictures: patches [n, patch_dim] in merge-window order, grids [pictures, 3]."""
        tensor = self.visual(list(inputs.visual(patches, grids, self.visual_limits)))
        return Embeds(tensor, int(tensor.shape[0]), inputs.order(grids))

    @abstractmethod
    def visual(self, calls: Sequence[VisualCall]) -> Any:
        """Run the visual graph: embeddings [count, hidden_size], where the calls' pieces say."""

    @abstractmethod
    def prefill(
        self, cache: Any, row: int, start: int, token_ids: Ints, positions: Ints, embeds: Embeds | None, index: Ints
    ) -> Step:
        """Run token_ids [n] of one row at cache positions start..., with M-RoPE positions [3, n].

        embeds replace the token embeddings at index [embeds.count], counted from the first of these tokens.
        """

    @abstractmethod
    def begin(self, cache: Any, tokens: Ints | Step, cache_index: Ints, positions: Ints) -> Step:
        """Device inputs of the first decode step, one value a row; the token of a lone row may stay on the device."""

    @abstractmethod
    def decode(self, cache: Any, step: Step, kv_lengths: list[int]) -> Step:
        """One token of every row: `step` is the one before (or begin's), kv_lengths include the new token."""

    @abstractmethod
    def tokens(self, step: Step) -> Ints:
        """next_token on the host: [rows], -1 where the engine knows that its logits hold NaN or infinity. The one wait
        for the device in a greedy step."""

    @abstractmethod
    def logits(self, step: Step) -> NDArray[np.float32]:
        """logits on the host: [rows, vocabulary]."""
