"""The generation loop: prefill, then decode one token at a time, over whatever engine is loaded."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..artifacts.errors import RequestError
from .backends.base import Backend, Step
from .prompt import Prompt
from .vision import segment_ends, vision_positions

STOP = "stop"
LENGTH = "length"
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Generation:
    """One answer. finish_reason is "stop" (an end token, not part of token_ids' text) or "length".

    timings_ms: preprocess, visual, prefill, weight_check (waiting for the weights' hashes; about 0 later),
    first_token (their sum), decode (all later tokens), per_token (its mean).
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    timings_ms: dict[str, float]


@dataclass
class Timings:
    """Milliseconds by phase; `mark` adds the time since the last mark."""

    phases: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + (now - self._last) * 1e3
        self._last = now


def tokens_to_make(prompt_tokens: int, max_new_tokens: int | None, default: int | None, max_length: int) -> int:
    """How many tokens may be generated. Raises RequestError when prompt and answer do not fit the KV cache.

    The last token is never written to the cache: n tokens need prompt + n - 1 positions.
    """
    if max_new_tokens is not None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens!r}, expected an integer of at least 1")
        max_new_tokens = int(max_new_tokens)
    room = max_length - prompt_tokens + 1
    if room < 1:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens, the artifact's cache {max_length}; shorten it or compile with "
            f"--max-length {prompt_tokens + (max_new_tokens or 1) - 1}"
        )
    if max_new_tokens is None:
        return min(default or DEFAULT_NEW_TOKENS, room)
    if max_new_tokens > room:
        raise RequestError(
            f"{prompt_tokens} prompt tokens and max_new_tokens {max_new_tokens} need a cache of "
            f"{prompt_tokens + max_new_tokens - 1}, the artifact has {max_length}; ask for at most {room}, or compile "
            f"with --max-length {prompt_tokens + max_new_tokens - 1}"
        )
    return max_new_tokens


def prefill_prompt(backend: Backend, cache: Any, row: int, prompt: Prompt, merge_size: int, timings: Timings) -> Step:
    """Run the visual graph, where there are pictures, and the prompt, into one row of the cache."""
    embeds = None
    if len(prompt.grids):
        embeds = backend.visual(prompt.patches, vision_positions(prompt.grids, merge_size), segment_ends(prompt.grids))
        timings.mark("visual")
    return backend.prefill(cache, row, 0, prompt.token_ids, prompt.positions, embeds, prompt.vision_slots)


def greedy(
    backend: Backend, cache: Any, first: Step, prompt: Prompt, count: int, ends: frozenset[int]
) -> Iterator[int]:
    """Yield up to `count` tokens, the end token included, each the largest logit's index.

    Tokens stay on the device from step to step; the host only reads them.
    """
    length = len(prompt.token_ids)
    at = np.array([length], np.int64)
    step = backend.begin(cache, first, at, at + prompt.delta) if count > 1 else first
    waiting, launched = deque([first]), 1
    while True:
        # without run-ahead a step starts only here, once the token before it is known not to end the answer
        while launched < count and len(waiting) <= backend.run_ahead:
            step = backend.decode(cache, step, [length + launched])
            waiting.append(step)
            launched += 1
        if not waiting:
            return
        token = int(backend.tokens(waiting.popleft())[0])
        yield token
        if token in ends:
            return
