"""What a verification found, and the one sentence that says it."""

from collections.abc import Iterable
from dataclasses import dataclass

from .tolerances import Tolerance, output_tolerance


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
        divergences = [each.kl for each in self.comparisons if each.top1 is not None]
        finite = [each for each in divergences if each is not None]
        return sum(finite) / len(finite) if finite and len(finite) == len(divergences) else None

    @property
    def top1(self) -> float:
        """The share of next-token distributions whose first choice is the reference's."""
        equal = [each.top1 for each in self.comparisons if each.top1 is not None]
        return sum(equal) / len(equal) if equal else 0.0

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
                f"largest error {number(worst(c.max_error for c in self.comparisons))}{self._divergence}"
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
        error = f"max error {number(at.max_error)}, expected at most {number(at.limit)}"
        if at.landmark is None and at.max_error is not None and at.max_error <= at.limit:
            allowed = output_tolerance(at.graph, self.dtype)
            error = f"relative RMS error {number(at.relative_rms)}, expected at most {allowed.relative_rms}"
            if allowed.cosine is not None and at.cosine is not None and at.cosine < allowed.cosine:
                error = f"cosine {at.cosine:.5f}, expected at least {allowed.cosine}"
        if at.landmark is None:
            inner = ", its intermediates do not" if self.intermediates else ""
            return f"FAILED: {where}: its output departs{inner} ({error})"
        return f"FAILED: {where}: first departs at {at.landmark} ({error})"

    @property
    def _divergence(self) -> str:
        allowed = self.tolerance
        if allowed.kl is None or allowed.top1 is None:
            return ""
        return (
            f", KL divergence {number(self.kl)} nats (at most {allowed.kl:g}), the same first choice in "
            f"{self.top1:.0%} (at least {allowed.top1:.0%})"
        )


def number(value: float | None) -> str:
    """An error as it is shown."""
    return "not finite" if value is None else f"{value:.2g}"


def worst(errors: Iterable[float | None]) -> float | None:
    """The largest error; None if one is not finite."""
    numbers = list(errors)
    return None if None in numbers else max(each for each in numbers if each is not None)
