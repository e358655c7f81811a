"""How far an observed output is from the expected one, and how far it may be."""

import math
from dataclasses import dataclass

import numpy as np

from ...artifacts.manifest import OwnError
from .known import Known
from .observe import Observed

# An error of rounding is as large on the device as here only in the mean: kernels sum in another order and round at
# other places, which the same again covers. More than that is no rounding: the mildest fault that was seen on a device,
# a fifth of a rotation left out, moves outputs by several times the rounding of bf16.
OF_OWN = 2.0
# fp32 may not round at all here, where the reference itself was the measure. The same sums in another order differ by
# 1e-6 to 1e-5 of an output's deviation, and a wrong operator moves it by 1e-2 and more.
FLOOR = OwnError(1e-4, 1e-3)


@dataclass(frozen=True)
class Distance:
    """The error beside the expected output's standard deviation: its root mean square, and its largest value.

    Infinite where the output is not finite, or has another shape.
    """

    rms: float
    largest: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.rms) and math.isfinite(self.largest)

    def worse(self, other: "Distance") -> "Distance":
        return Distance(max(self.rms, other.rms), max(self.largest, other.largest))

    def within(self, limit: OwnError) -> bool:
        return self.rms <= limit.rms and self.largest <= limit.largest


FARTHEST = Distance(math.inf, math.inf)


def distance(known: Known, observed: Observed) -> Distance:
    """Of one call's output."""
    answer = known.answers[observed.call]
    if not np.isfinite(observed.output).all():
        return FARTHEST
    printed = known.print_of(observed.call, observed.output)
    if printed.shape != answer.values.shape:
        return FARTHEST
    error = (printed.astype(np.float64) - answer.values) / answer.std
    return Distance(float(np.sqrt(np.square(error).mean())), float(np.abs(error).max()))


def limit_of(own: OwnError) -> OwnError:
    """What may be found of a graph, by the reference backend's own error."""
    return OwnError(max(OF_OWN * own.rms, FLOOR.rms), max(OF_OWN * own.largest, FLOOR.largest))
