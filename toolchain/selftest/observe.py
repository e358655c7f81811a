"""Runs the self-test's inputs through any engine, call by call, and hands out what came back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import TargetError
from ...runtime.backends.base import Backend, Embeds, Ints, Step
from ...runtime.loader import ONNXRUNTIME
from ...runtime.models import family_of
from ...runtime.models.config import ModelConfig
from .inputs import SCRIPTS, STEPS, VISUAL_CALLS, Script, SelftestInputs

VISUAL, PREFILL, DECODE = "visual", "prefill", "decode"
KINDS = (VISUAL, PREFILL, DECODE)
# (a script's place, or -1 for the vision tower; the call of that script, or the place of the visual call)
Call = tuple[int, int]


class GraphRefusedError(TargetError):
    """An engine cannot run a graph that it was given."""

    def __init__(self, graph: str, message: str) -> None:
        super().__init__(message)
        self.graph = graph


@dataclass(frozen=True, eq=False)
class Observed:
    """What one call gave for one row: output fp32 [rows, width], of logits one row; token: what the graph chose.

    title says which call it was, row which of the batch; None where the graph has no rows.
    """

    graph: str
    call: Call
    title: str
    row: int | None
    output: NDArray[np.float32]
    token: int | None

    @property
    def kind(self) -> str:
        return self.graph.partition("_")[0]


def observe(
    backend: Backend,
    config: ModelConfig,
    inputs: SelftestInputs,
    batches: Sequence[int],
    take_cache: Callable[[int], Any] | None = None,
) -> Iterator[Observed]:
    """Every visual call, and every script in a cache of every batch size, all rows of it in use.

    take_cache gives a KV cache for so many rows; by default it is allocated. Raises GraphRefusedError where the engine
    cannot run a graph.
    """
    embeds: list[Embeds] = []
    of_family = family_of(config).inputs(config)
    for i, each in enumerate(inputs.visual):
        with _named(VISUAL, backend):
            made = backend.embed(of_family, each.patches, each.grids)
            output = made.in_order(_on_host(made.tensor))
        embeds.append(made)
        yield Observed(VISUAL, (-1, i), VISUAL_CALLS[i], None, output, None)
    for batch in sorted(batches):
        cache = None  # freed before the next is taken
        cache = (take_cache or backend.allocate)(batch)
        for group in _groups(batch):
            yield from _run_group(backend, config, inputs, cache, batch, group, embeds)


def _groups(batch: int) -> Iterator[list[int]]:
    """Which scripts run together: every row has one, neighbours have different ones, and each of them runs."""
    rows = [0, *(1 + i % 2 for i in range(max(batch, len(SCRIPTS)) - 1))]
    yield from (rows[start : start + batch] for start in range(0, len(rows), batch))


def _run_group(
    backend: Backend,
    config: ModelConfig,
    inputs: SelftestInputs,
    cache: Any,
    batch: int,
    group: Sequence[int],
    embeds: Sequence[Embeds],
) -> Iterator[Observed]:
    decode = DECODE if backend.name == ONNXRUNTIME else f"{DECODE}_b{backend.cache_rows(batch)}"
    for row, which in enumerate(group):
        script, start = inputs.scripts[which], 0
        for i, (count, pictures) in enumerate(zip(script.turns, script.visual, strict=True)):
            ids = script.token_ids[start : start + count]
            given = None if pictures is None else embeds[pictures]
            slots = np.flatnonzero(ids == config.image_token_id)
            slots = slots if given is None else given.placed(slots)
            with _named(PREFILL, backend):
                places = script.positions[:, start : start + count]
                step = backend.prefill(cache, row, start, ids, places, given, slots)
                rows = _rows(backend, step, 1)
            title = f"{SCRIPTS[which]}, tokens {start} to {start + count}"
            yield from (Observed(PREFILL, (which, i), title, row, *one) for one in rows)
            start += count
    scripts = [inputs.scripts[which] for which in group]
    for number, step in enumerate(_decoded(backend, cache, scripts, decode)):
        with _named(decode, backend):
            rows = _rows(backend, step, len(group))
        for row, (which, one) in enumerate(zip(group, rows, strict=True)):
            call = (which, len(scripts[row].turns) + number)
            yield Observed(decode, call, f"{SCRIPTS[which]}, step {number + 1}", row, *one)


def _decoded(backend: Backend, cache: Any, scripts: Sequence[Script], graph: str) -> Iterator[Step]:
    step: Step | None = None
    for number in range(STEPS):
        at = np.array([script.prompt + number for script in scripts], np.int64)
        fed, places = (_each(scripts, at, take) for take in (lambda s: s.token_ids, lambda s: s.positions[0]))
        with _named(graph, backend):
            begun = backend.begin(cache, fed, at, places)
            if step is not None and step.cache_index is not None:
                # where the graph counts on itself, the runtime takes its count: so does this
                begun = replace(begun, cache_index=step.cache_index, positions=step.positions)
            step = backend.decode(cache, begun, (at + 1).tolist())
        yield step


def _each(scripts: Iterable[Script], at: Ints, take: Callable[[Script], Ints]) -> Ints:
    return np.array([take(script)[i] for script, i in zip(scripts, at.tolist(), strict=True)], np.int64)


def _rows(backend: Backend, step: Step, count: int) -> list[tuple[NDArray[np.float32], int]]:
    logits = np.array(backend.logits(step)[:count], np.float32)
    # a choice among what is no number says nothing more
    tokens = backend.tokens(step) if np.isfinite(logits).all() else [-1] * count
    return [(logits[i : i + 1], int(tokens[i])) for i in range(count)]


def _on_host(tensor: Any) -> NDArray[np.float32]:
    """Embeddings of any engine, fp32 [rows, width]."""
    rows: NDArray[np.float32] = (
        np.asarray(tensor, np.float32) if isinstance(tensor, np.ndarray) else tensor.cpu().float().numpy()
    )
    return rows


@contextmanager
def _named(graph: str, backend: Backend) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that vendor code raises, of a graph that it refuses
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GraphRefusedError(graph, f"{graph} does not run on {backend.device}: {first}") from error
