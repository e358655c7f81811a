"""Measuring one of our outputs against transformers', and judging what is outside the bounds."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .report import Comparison, Departure
from .tolerances import OF_ORIGINAL, Tolerance

Floats = NDArray[np.float32]


def compare(
    case: str, graph: str, step: int | None, ours: Floats, original: Floats, tolerance: Tolerance, token: int | None
) -> Comparison:
    """Measure one output, both of one shape; `token` is the next token that the graph chose, None for visual."""
    a, b = ours.astype(np.float64).ravel(), original.astype(np.float64).ravel()
    std = float(b.std())
    limit = tolerance.limit(std)
    top1 = gap = None
    if token is not None:
        top1 = token == int(b.argmax())
        gap = float(b.max() - b[token]) if 0 <= token < len(b) else float(np.ptp(b))
    if not np.isfinite(a).all():
        return Comparison(case, graph, step, std, None, limit, None, None, None, gap, top1, False)
    error = a - b
    max_error, rms = float(np.abs(error).max()), math.sqrt(float(np.square(error).mean()))
    # a constant reference has no deviation to measure by
    relative_rms = rms / std if std else rms
    length = math.sqrt(float(a @ a) * float(b @ b))
    cosine = float(a @ b) / length if length else 1.0
    passed = max_error <= limit
    passed &= tolerance.relative_rms is None or relative_rms <= tolerance.relative_rms
    passed &= tolerance.cosine is None or cosine >= tolerance.cosine
    # within the errors that are allowed, only a token whose logit is as large may be chosen
    passed &= gap is None or gap <= 2 * limit
    kl = None if token is None else _divergence(b, a)
    return Comparison(case, graph, step, std, max_error, limit, relative_rms, cosine, None, gap, top1, passed, kl)


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """KL(p || q) in nats of two distributions given as logits."""
    log_p, log_q = (x - x.max() - math.log(np.exp(x - x.max()).sum()) for x in (p, q))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def second_opinion(ours: Comparison, original: Comparison) -> Comparison:
    """`ours`, failed in half precision, judged by what transformers in the same dtype gives for the same output."""
    a, b = (ours.max_error, ours.relative_rms), (original.max_error, original.relative_rms)
    passed = all(x is not None and y is not None and x <= OF_ORIGINAL * y for x, y in zip(a, b, strict=True))
    # what makes the errors right makes no other token right
    passed &= ours.token_gap is None or ours.token_gap <= 2 * max(ours.limit, ours.max_error or 0.0)
    return replace(ours, original_rms=original.relative_rms, passed=passed)


def output_departs(failed: Comparison) -> Departure:
    """What to say where the intermediates do not explain a failure."""
    gap = failed.token_gap
    if gap is not None and gap > 2 * failed.limit and failed.max_error is not None and failed.max_error <= failed.limit:
        title = "the choice of the next token, whose logit is not the largest"
        return Departure(failed.case, failed.graph, failed.step, title, gap, 2 * failed.limit, failed.relative_rms)
    errors = (failed.max_error, failed.limit, failed.relative_rms, failed.cosine)
    return Departure(failed.case, failed.graph, failed.step, None, *errors)
