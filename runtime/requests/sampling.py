"""Logits to a token: transformers' logits processors, in its order, and a seeded draw."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import ToolchainError
from .settings import Settings

Logits = NDArray[np.float32]


def process_logits(logits: Logits, settings: Settings, seen: Iterable[int], made: int) -> Logits:
    """The logits [vocabulary] that a token is drawn from or is the largest of; minus infinity for what is ruled out.

    seen: the ids of prompt and answer so far; made: how many of them are the answer's. As transformers 5.23's
    processors RepetitionPenalty, MinNewTokensLength, Temperature, TopK and TopP, in this order, the last three only
    when sampling.
    """
    scores = np.array(logits, dtype=np.float32)
    if settings.repetition_penalty != 1:
        ids = np.fromiter(seen, np.int64)
        penalty = np.float32(settings.repetition_penalty)
        scores[ids] = np.where(scores[ids] < 0, scores[ids] * penalty, scores[ids] / penalty)
    if made < settings.min_new_tokens:
        scores[list(settings.eos_token_ids)] = -np.inf
    if settings.do_sample:
        scores /= np.float32(settings.temperature)
        if 0 < settings.top_k < scores.size:
            # what ties with the last one kept stays, too
            scores[scores < np.partition(scores, -settings.top_k)[-settings.top_k]] = -np.inf
        if settings.top_p < 1:
            scores[_outside_top_p(scores, settings.top_p)] = -np.inf
    return scores


def _outside_top_p(scores: Logits, top_p: float) -> NDArray[np.int64]:
    """Ids of the least likely tokens that together have at most 1 - top_p; the most likely one is never among them."""
    finite = np.flatnonzero(scores > -np.inf)
    ascending = finite[np.argsort(scores[finite], kind="stable")]
    below: NDArray[np.int64] = ascending[np.cumsum(probabilities(scores[ascending])) <= 1 - top_p]
    return below[: ascending.size - 1]


def probabilities(scores: Logits) -> NDArray[np.float64]:
    """Softmax; minus infinity becomes 0."""
    weights = np.exp((scores - scores.max()).astype(np.float64))
    result: NDArray[np.float64] = weights / weights.sum()
    return result


def check_logits(logits: Logits, graph: str) -> None:
    """Raises ToolchainError when the logits [vocabulary] that `graph` gave hold NaN or infinity."""
    for extreme in (logits.max(), logits.min()):  # a NaN is both
        if not np.isfinite(extreme):
            raise ToolchainError(f"{graph}: its logits hold {extreme}; verify the artifact, or build it as bf16")


class Sampler:
    """Chooses one row's tokens; two with the same seed choose alike, whatever else runs beside them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)

    def choose(self, logits: Logits, seen: Iterable[int], made: int) -> int:
        """The next token."""
        scores = process_logits(logits, self._settings, seen, made)
        if not self._settings.do_sample:
            return int(np.argmax(scores))
        kept = np.flatnonzero(scores > -np.inf)
        bounds = np.cumsum(probabilities(scores[kept]))
        drawn = np.searchsorted(bounds, self._random.random() * bounds[-1], side="right")
        return int(kept[min(drawn, kept.size - 1)])
