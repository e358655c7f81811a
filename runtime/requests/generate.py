"""The generation loop: prefill each row, then decode all rows together, over whatever engine is loaded."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...artifacts.errors import ToolchainError
from ..backends.base import Backend, Ints, Step
from ..text.prompt import Processor, Prompt
from .answer import Row, Timings, Token


def prefill_prompt(
    backend: Backend, cache: Any, row: int, prompt: Prompt, processor: Processor, timings: Timings, start: int = 0
) -> Step:
    """Run the visual graph, where there are pictures, and the prompt, into one row of the cache.

    start: how many tokens the row holds already; it must not stand inside a picture.
    """
    left, embeds = prompt.after(start), None
    if left.pictures:
        embeds = backend.embed(processor.inputs, left.patches, left.grids)
        timings.mark("visual")
    slots = embeds.placed(left.vision_slots) if embeds else left.vision_slots
    step = backend.prefill(cache, row, start, left.token_ids, left.positions, embeds, slots)
    timings.mark("prefill")
    return step


def generate_rows(
    backend: Backend, cache: Any, rows: Sequence[Row], processor: Processor, timings: Timings
) -> Iterator[list[Token]]:
    """Answer the rows: yields, step by step, the tokens of the rows that have not ended. Ends when all have."""
    firsts = [
        prefill_prompt(backend, cache, i, row.prompt, processor, timings, row.cached_tokens)
        for i, row in enumerate(rows)
    ]
    if all(row.settings.takes_largest_logit for row in rows):
        return _on_device(backend, cache, rows, firsts)
    return _on_host(backend, cache, rows, firsts)


def run_out(
    steps: Generator[list[Token], None, None], on_token: Callable[[Token], None] | None, first_row: int = 0
) -> None:
    """Run steps to their end, handing every token to the hook, with its row counted from `first_row`."""
    with closing(steps):
        for step in steps:
            for token in step:
                if on_token is not None:
                    on_token(replace(token, row=first_row + token.row))


def texts(steps: Generator[list[Token], None, None]) -> Generator[str, None, None]:
    """The pieces of text of one row's steps; closing this closes them."""
    with closing(steps):
        for step in steps:
            for token in step:
                if token.text:
                    yield token.text


def _take(rows: Sequence[Row], tokens: Iterable[int]) -> list[Token]:
    return [row.take(int(token), i) for i, (row, token) in enumerate(zip(rows, tokens, strict=True)) if row.left]


def _largest(backend: Backend, rows: Sequence[Row], step: Step) -> Ints:
    """The rows' next tokens, as the graph chose them. Raises ToolchainError where that was among no numbers.

    The graph says so itself, by a negative token; where one does not, the logits of a CPU are at hand.
    """
    tokens = backend.tokens(step)[: len(rows)]
    looked = step.checked_token is None and backend.device == "cpu"
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if row.left and (looked or token < 0):
            row.check(backend.logits(step)[i])
        if row.left and token < 0:
            raise ToolchainError(
                f"{row.step}: the graph finds NaN or infinity in its logits, which has none; run `qwen2vl-tc selftest`"
            )
    return tokens


@dataclass(frozen=True)
class _Inputs:
    """What the next decode step takes from the host: tokens, cache index and M-RoPE position [rows].

    A row that has ended writes to the start of its own cache, where attention over it costs least.
    """

    tokens: Ints
    index: Ints
    positions: Ints

    def kv_lengths(self, step: int) -> list[int]:
        """Cache lengths at the so many-th step from here, its own tokens included."""
        return [int(at) + step + 1 for at in self.index]


def _inputs(rows: Sequence[Row], waiting: int = 0) -> _Inputs:
    """waiting: tokens of every row that were made but not taken."""
    live = np.array([row.left > 0 for row in rows])
    made = [len(row.made) + waiting for row in rows]
    index = np.array([len(row.prompt.token_ids) + count - 1 for row, count in zip(rows, made, strict=True)], np.int64)
    deltas = np.array([row.prompt.delta for row in rows], np.int64)
    tokens = np.array([row.made[-1] if row.made else 0 for row in rows], np.int64)
    return _Inputs(tokens, np.where(live, index, 0), np.where(live, index + deltas, 0))


def _on_device(backend: Backend, cache: Any, rows: Sequence[Row], firsts: list[Step]) -> Iterator[list[Token]]:
    """Every token is its logits' largest, as the graphs compute it: it stays on the device from step to step.

    Stretches of steps with the same rows alive need nothing from the host but reading; where a row ends and others go
    on, a new stretch begins.
    """
    waiting: deque[Step] = deque()
    given: Step | None = None
    if len(rows) == 1:
        # a lone row's first token need not come to the host before it is decoded
        given = firsts[0]
        waiting.append(given)
    else:
        yield _take(rows, [int(_largest(backend, [row], first)[0]) for row, first in zip(rows, firsts, strict=True)])
    while alive := sum(row.left > 0 for row in rows):
        steps = min(row.left for row in rows if row.left) - len(waiting)
        inputs = _inputs(rows, len(waiting))
        launched = 0
        step = backend.begin(cache, given or inputs.tokens, inputs.index, inputs.positions) if steps else given
        given = None
        ended = False
        while waiting or (launched < steps and not ended):
            # without run-ahead a step starts only here, once the token before it is known not to end the answer
            while not ended and launched < steps and len(waiting) <= backend.run_ahead:
                step = backend.decode(cache, step, inputs.kv_lengths(launched))  # type: ignore[arg-type]
                waiting.append(step)
                launched += 1
            yield _take(rows, _largest(backend, rows, waiting.popleft()))
            left = sum(row.left > 0 for row in rows)
            if not left:
                return
            ended = left < alive


def _on_host(backend: Backend, cache: Any, rows: Sequence[Row], firsts: list[Step]) -> Iterator[list[Token]]:
    """Tokens are chosen here, from logits that come to the host at every step."""
    logits = [backend.logits(first)[0] for first in firsts]
    while True:
        chosen = [row.choose(each) if row.left else 0 for row, each in zip(rows, logits, strict=True)]
        yield _take(rows, chosen)
        if not any(row.left for row in rows):
            return
        inputs = _inputs(rows)
        step = backend.begin(cache, inputs.tokens, inputs.index, inputs.positions)
        step = backend.decode(cache, step, inputs.kv_lengths(0))
        logits = list(backend.logits(step)[: len(rows)])
