"""What a verification found, how much error is right for each dtype, and how the terminal shows it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """What a comparison may show; None is not limited.

    max_error: absolute, for a reference whose standard deviation is up to 5; in proportion above that, as logits of
    real models have a deviation of up to 30 and fp32 rounds relative to the size. The others are relative to the
    standard deviation of the reference: relative_max its largest error, relative_rms the root of its mean square.
    """

    max_error: float | None
    relative_max: float | None
    relative_rms: float | None
    cosine: float | None
    reason: str
    # of next-token distributions over the whole report: the mean divergence in nats, the share of equal first choices
    kl: float | None = None
    top1: float | None = None

    def limit(self, std: float) -> float:
        """The largest absolute error allowed beside a reference of this standard deviation."""
        limits = []
        if self.max_error is not None:
            limits.append(self.max_error * max(1.0, std / _STD_OF_MAX_ERROR))
        if self.relative_max is not None:
            limits.append(self.relative_max * std)
        return min(limits, default=math.inf)


_STD_OF_MAX_ERROR = 5.0
TOLERANCES = {
    "fp32": Tolerance(
        max_error=1e-4,
        relative_max=None,
        relative_rms=None,
        cosine=None,
        reason="the same fp32 arithmetic in another order differs by some 1e-5 of logits; a wrong operator by 1e-2",
    ),
    # Measured on random models of 2 to 28 layers, widths 64 to 1536, vision depth 2 to 32: relative RMS 0.006 to 0.019,
    # relative_max up to 0.08; transformers itself computing in bf16 gives 0.006 to 0.020 and 0.09. Two swapped rows
    # give 0.06 to 0.4 at width 64; what is wrong by less than these bounds is left to the intermediates.
    "bf16": Tolerance(
        max_error=None,
        relative_max=0.15,
        relative_rms=0.03,
        cosine=0.999,
        reason="bf16 keeps 8 bits: transformers in bf16 is itself 0.6 to 2 % (RMS) from fp32, growing with depth",
    ),
    # 3 bits more, measured likewise: relative RMS 0.0007 to 0.0025, relative_max up to 0.010
    "fp16": Tolerance(
        max_error=None,
        relative_max=0.02,
        relative_rms=0.004,
        cosine=0.99998,
        reason="fp16 keeps 11 bits: transformers in fp16 is itself 0.07 to 0.3 % (RMS) from fp32, growing with depth",
    ),
}
# The kinds of quantized weights of ONNX models. What binds is the divergence and the first choices: of a model of
# random weights, whose first choices are often close, 0.003 (int8) and 0.13 nats (int4); of the trained demo model
# 0.0004 and 0.005, all first choices equal. A single step's logits may lie close together and then move far beside
# their spread, without another distribution: of the demo model by up to 8 and 47 % (RMS). Those limits are for what is
# grossly wrong.
TOLERANCES |= {
    "int8": Tolerance(
        max_error=None,
        relative_max=0.8,
        relative_rms=0.15,
        cosine=0.99,
        kl=0.02,
        top1=0.9,
        reason="8 bits of weights and of activations move logits by 1 to 8 % (RMS), and hardly their order",
    ),
    "int4": Tolerance(
        max_error=None,
        relative_max=2.0,
        relative_rms=0.75,
        cosine=0.85,
        kl=0.3,
        top1=0.6,
        reason="rounded to 4 bits, weights move logits by 10 to 50 % (RMS); of random weights also first choices",
    ),
}
_INT8_VISUAL = Tolerance(
    max_error=None,
    relative_max=0.5,
    relative_rms=0.05,
    cosine=0.998,
    reason="8 bits of weights and of activations move embeddings by 1 to 3 % (RMS)",
)
# Of the visual output, where the language model's limits are not its own: the vision tower is int8 in both.
_VISUAL_TOLERANCES = {"int8": _INT8_VISUAL, "int4": _INT8_VISUAL}


def output_tolerance(graph: str, dtype: str) -> Tolerance:
    """What an output of this graph may show, by the dtype or kind of weights that computed it."""
    allowed = TOLERANCES[dtype]
    return _VISUAL_TOLERANCES.get(dtype, allowed) if graph == "visual" else allowed


# Outside these bounds transformers computing in the artifact's dtype has the last word, for models whose activations
# round worse than those that were measured: up to this many times its own error passes.
OF_ORIGINAL = 1.5
# Intermediates in half precision: this many times the error of transformers computing in the same dtype departs. Right
# ones showed up to 1.7 times its RMS and 2.3 times its largest error; two swapped rows 12 times and more.
INTERMEDIATE_OF_ORIGINAL = 4.0


@dataclass(frozen=True)
class Comparison:
    """One output of one graph against transformers'. step: the decode step, from 1; None for visual and prefill.

    std is the reference's standard deviation, limit the largest max_error allowed, relative_rms = rms error / std;
    errors are None when the graph's output is not finite. original_rms: relative_rms of transformers itself computing
    in this dtype, where it had to be asked.
    kl: the divergence in nats of our next-token distribution from the reference's; None for visual.
    top1: whether the graph's own next token is transformers'. token_gap: how far that token's logit lies below the
    largest, by the reference. Both are None for visual.
    """

    case: str
    graph: str
    step: int | None
    std: float
    max_error: float | None
    limit: float
    relative_rms: float | None
    cosine: float | None
    original_rms: float | None
    token_gap: float | None
    top1: bool | None
    passed: bool
    kl: float | None = None


@dataclass(frozen=True)
class InputCheck:
    """Whether one kind of input (grids, token ids, M-RoPE positions) equals transformers'; `detail` says how not."""

    case: str
    what: str
    equal: bool
    detail: str


@dataclass(frozen=True)
class CaseSize:
    """One request that was compared."""

    name: str
    prompt_tokens: int
    patches: int


@dataclass(frozen=True)
class Departure:
    """The first intermediate of the first failing graph that departs from transformers'. Errors as in Comparison.

    landmark is None where every intermediate is as close as it should be and only the output is not.
    """

    case: str
    graph: str
    step: int | None
    landmark: str | None
    max_error: float | None
    limit: float
    relative_rms: float | None
    cosine: float | None = None


@dataclass(frozen=True)
class VerifyReport:
    """The whole result. `against` is the folder's name; `memory_bytes` what was needed for both models.

    intermediates: how many were compared. In fp32 none if the outputs are right; in half precision one request's.
    """

    passed: bool
    artifact: str
    against: str
    dtype: str
    backend: str
    versions: dict[str, str]
    steps: int
    tolerance: Tolerance
    memory_bytes: int
    notes: tuple[str, ...]
    cases: tuple[CaseSize, ...]
    inputs: tuple[InputCheck, ...]
    comparisons: tuple[Comparison, ...]
    intermediates: int
    departure: Departure | None

    @property
    def kl(self) -> float | None:
        """The mean divergence of all next-token distributions, in nats; None if one of them is not finite."""
        found = [each.kl for each in self.comparisons if each.top1 is not None]
        return None if None in found or not found else sum(each for each in found if each is not None) / len(found)

    @property
    def top1(self) -> float:
        """The share of next-token distributions whose first choice is the reference's."""
        found = [each.top1 for each in self.comparisons if each.top1 is not None]
        return sum(found) / len(found) if found else 0.0

    @property
    def divergence_passed(self) -> bool:
        """Whether both are within the tolerance."""
        allowed = self.tolerance
        if allowed.kl is not None and (self.kl is None or self.kl > allowed.kl):
            return False
        return allowed.top1 is None or self.top1 >= allowed.top1

    @property
    def conclusion(self) -> str:
        """One sentence: what was verified, or what failed first and where."""
        if self.passed:
            inner = f" and {self.intermediates} intermediates" if self.intermediates else ""
            return (
                f"verified: {self.artifact} ({self.dtype}) agrees with transformers on {self.against} in "
                f"{len(self.comparisons)} outputs{inner}, "
                f"largest error {_worst_error(self.comparisons)}{self._divergence}"
            )
        wrong = [check for check in self.inputs if not check.equal]
        if wrong:
            return f"FAILED: {wrong[0].case}: {wrong[0].what} differ from transformers': {wrong[0].detail}"
        at = self.departure
        if at is None and self.comparisons and not self.divergence_passed:
            return f"FAILED: next tokens depart from transformers'{self._divergence}"
        if at is None:
            return "FAILED: no output was compared"
        where = f"{at.graph} ({at.case}{'' if at.step is None else f', step {at.step}'})"
        found = f"max error {_number(at.max_error)}, expected at most {_number(at.limit)}"
        if at.landmark is None and at.max_error is not None and at.max_error <= at.limit:
            allowed = output_tolerance(at.graph, self.dtype)
            found = f"relative RMS error {_number(at.relative_rms)}, expected at most {allowed.relative_rms}"
            if allowed.cosine is not None and at.cosine is not None and at.cosine < allowed.cosine:
                found = f"cosine {at.cosine:.5f}, expected at least {allowed.cosine}"
        if at.landmark is None:
            inner = ", its intermediates do not" if self.intermediates else ""
            return f"FAILED: {where}: its output departs{inner} ({found})"
        return f"FAILED: {where}: first departs at {at.landmark} ({found})"

    @property
    def _divergence(self) -> str:
        allowed = self.tolerance
        if allowed.kl is None or allowed.top1 is None:
            return ""
        return (
            f", KL divergence {_number(self.kl)} nats (at most {allowed.kl:g}), the same first choice in "
            f"{self.top1:.0%} (at least {allowed.top1:.0%})"
        )


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


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def _worst_error(found: Iterable[Comparison]) -> str:
    errors = [each.max_error for each in found]
    return _number(None if None in errors else max(e for e in errors if e is not None))


def render(report: VerifyReport, console: Console) -> None:
    """Print a row for each case and graph, decode steps together at their worst, and the conclusion."""
    table = Table(title=Text(f"{report.artifact} ({report.dtype}) against transformers fp32 on CPU"))
    for column in ("case", "graph", "max error", "allowed", "rel. RMS", "cosine", "top-1", "verdict"):
        table.add_column(column, justify="left" if column in ("case", "graph", "verdict") else "right", no_wrap=True)
    for (case, graph), found in _grouped(report.comparisons).items():
        cosines = [each.cosine for each in found]
        rms = [each.relative_rms for each in found]
        tops = [each.top1 for each in found if each.top1 is not None]
        wrong = sum(not each.passed for each in found)
        steps = f" x {len(found)}" if found[0].step is not None else ""
        verdict = Text("ok", "green")
        if wrong:
            verdict = Text.assemble(("FAILED", "red"), f" ({wrong} of {len(found)})" if steps else "")
        table.add_row(
            Text(case),
            Text(graph + steps),
            _worst_error(found),
            _number(min(each.limit for each in found)),
            _number(None if None in rms else max(r for r in rms if r is not None)),
            "-" if None in cosines else f"{min(c for c in cosines if c is not None):.7f}",
            f"{sum(tops)}/{len(tops)}" if tops else "",
            verdict,
        )
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(f"tolerance: {report.tolerance.reason}"))
    if report.intermediates and report.dtype != "fp32":
        allowed = f"at most {INTERMEDIATE_OF_ORIGINAL:g} times the error of transformers computing in {report.dtype}"
        console.print(f"intermediates: {report.intermediates} compared, {allowed}", highlight=False)
    # one line whatever the terminal's width: it is what people copy into a report
    console.print(Text(report.conclusion, "green" if report.passed else "red"), soft_wrap=True)


def _grouped(found: Iterable[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for each in found:
        groups.setdefault((each.case, each.graph), []).append(each)
    return groups
