"""The generation loop: prefill each row, then decode all rows together, over whatever engine is loaded."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ...artifacts.errors import ArtifactError, RequestError, ToolchainError
from ..backends.base import Backend, Ints, Step
from ..phases import Phases
from ..pictures.patches import joined_grids, joined_patches
from ..pictures.vision import segment_ends, vision_positions
from ..text.prompt import Processor, Prompt
from ..text.stream import StopStrings
from .sampling import Sampler, check_logits
from .settings import Settings

STOP = "stop"
LENGTH = "length"
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Token:
    """One generated token: the row of the batch it belongs to, and the text that it completes, often empty.

    The texts of a row's tokens, joined, are the answer.
    """

    row: int
    id: int
    text: str


@dataclass(frozen=True)
class Generation:
    """One answer. finish_reason is "stop" (an end token, not part of the text, or a stop string) or "length".

    timings_ms: preprocess, visual, prefill, weight_check (waiting for the weights' hashes; about 0 later),
    first_token (their sum), decode (all later tokens), per_token (its mean); token_ms: from each token to the next.
    Rows of one batch share them. cached_tokens: how many of the prompt's were in the KV cache already.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    timings_ms: dict[str, float]
    token_ms: tuple[float, ...] = ()
    cached_tokens: int = 0


@dataclass
class Timings(Phases):
    """What an answer took: phases, and from each token to the next."""

    token_ms: list[float] = field(default_factory=list)

    def mark_token(self) -> None:
        """A token after the first has come."""
        self.token_ms.append(self._since_last())

    def skip(self) -> None:
        """What passed since the last mark was the caller's."""
        self._since_last()

    def summary(self) -> dict[str, float]:
        """The phases in milliseconds, with the sums that Generation names."""
        before = ("preprocess", "visual", "prefill", "weight_check")
        found = {**self.phases, "first_token": sum(self.phases.get(name, 0.0) for name in before)}
        found["decode"] = sum(self.token_ms)
        if self.token_ms:
            found["per_token"] = found["decode"] / len(self.token_ms)
        return {name: round(value, 3) for name, value in found.items()}


def tokens_to_make(prompt_tokens: int, settings: Settings, max_length: int) -> int:
    """How many tokens may be generated. Raises RequestError when prompt and answer do not fit the KV cache.

    The last token is never written to the cache: n tokens need prompt + n - 1 positions.
    """
    wanted = settings.max_new_tokens
    least = wanted or settings.min_new_tokens or 1
    room = max_length - prompt_tokens + 1
    if room < 1:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens, the artifact's cache {max_length}; shorten it or compile with "
            f"--max-length {prompt_tokens + least - 1}"
        )
    if least > room:
        raise RequestError(
            f"{prompt_tokens} prompt tokens and {'max' if wanted else 'min'}_new_tokens {least} need a cache of "
            f"{prompt_tokens + least - 1}, the artifact has {max_length}; ask for at most {room}, or compile "
            f"with --max-length {prompt_tokens + least - 1}"
        )
    return wanted or min(max(settings.default_new_tokens or DEFAULT_NEW_TOKENS, least), room)


class Row:
    """One request of a batch while it is answered."""

    def __init__(
        self, prompt: Prompt, settings: Settings, processor: Processor, max_length: int, number: int = 0
    ) -> None:
        """number: the request's, as errors say it. Raises RequestError (tokens_to_make)."""
        self.prompt = prompt
        self.number = number
        self.settings = settings
        # the prompt's first tokens that the row's cache holds
        self.cached_tokens = 0
        self.limit = tokens_to_make(len(prompt.token_ids), settings, max_length)
        self._vocab_size = processor.config.text.vocab_size
        self.made: list[int] = []
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        self._seen = set(prompt.token_ids.tolist())
        self._stream = processor.stream()
        self._stops = StopStrings(processor.stream(skip_special_tokens=False), settings.stop) if settings.stop else None

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.settings)

    @property
    def left(self) -> int:
        """Tokens that may still be made."""
        return 0 if self.finish_reason else self.limit - len(self.made)

    @property
    def step(self) -> str:
        """The next token's place, as errors say it."""
        return f"row {self.number}, token {len(self.made)}: {'decode' if self.made else 'prefill'}"

    def check(self, logits: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Raises ToolchainError when the logits of the next token, [vocabulary], hold NaN or infinity."""
        check_logits(logits, self.step)

    def choose(self, logits: np.ndarray[Any, np.dtype[np.float32]]) -> int:
        """The next token, from logits [vocabulary]. Raises what `check` raises."""
        self.check(logits)
        return self._sampler.choose(logits, self._seen, len(self.made))

    def take(self, token: int, row: int) -> Token:
        """Note a token that was made; the row may have ended with it. Raises ArtifactError if it can be none."""
        if not 0 <= token < self._vocab_size:
            raise ArtifactError(f"a graph gave the token {token}, outside the vocabulary of {self._vocab_size}")
        self.made.append(token)
        self._seen.add(token)
        text = self._stream.feed(token)
        if token in self.settings.eos_token_ids or (self._stops is not None and self._stops.ended_by(token)):
            self.finish_reason = STOP
        elif len(self.made) == self.limit:
            self.finish_reason = LENGTH
        if self.finish_reason:
            text += self._stream.flush()
        self.texts.append(text)
        return Token(row, token, text)

    def generation(self, timings: Timings) -> Generation:
        """The finished answer."""
        return Generation(
            text="".join(self.texts),
            token_ids=tuple(self.made),
            prompt_token_ids=tuple(int(i) for i in self.prompt.token_ids),
            finish_reason=self.finish_reason or LENGTH,
            timings_ms=timings.summary(),
            token_ms=tuple(round(value, 3) for value in timings.token_ms),
            cached_tokens=self.cached_tokens,
        )


def prefill_prompt(
    backend: Backend, cache: Any, row: int, prompt: Prompt, merge_size: int, timings: Timings, start: int = 0
) -> Step:
    """Run the visual graph, where there are pictures, and the prompt, into one row of the cache.

    start: how many tokens the row holds already; it must not stand inside a picture.
    """
    pictures = [each for each, (first, _) in zip(prompt.pictures, prompt.spans, strict=True) if first >= start]
    embeds = None
    if pictures:
        grids = joined_grids(pictures)
        embeds = backend.visual(joined_patches(pictures), vision_positions(grids, merge_size), segment_ends(grids))
        timings.mark("visual")
    slots = prompt.vision_slots[prompt.vision_slots >= start] - start
    step = backend.prefill(cache, row, start, prompt.token_ids[start:], prompt.positions[:, start:], embeds, slots)
    timings.mark("prefill")
    return step


def generate_rows(
    backend: Backend, cache: Any, rows: Sequence[Row], merge_size: int, timings: Timings
) -> Iterator[list[Token]]:
    """Answer the rows: yields, step by step, the tokens of the rows that have not ended. Ends when all have."""
    firsts = [
        prefill_prompt(backend, cache, i, row.prompt, merge_size, timings, row.cached_tokens)
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
