"""A roofline estimate of a graph from what its operators compute and move: a bound, not a measurement.

The roofline model (Williams, Waterman, Patterson: "Roofline", CACM 2009): a kernel takes at least the longer of its
arithmetic at peak rate and its bytes at peak bandwidth.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ...runtime.ops.base import OpCost

ASSUMPTION = (
    "an estimate from assumptions, not a measurement: per operator the longer of FLOPs / peak and bytes / bandwidth, "
    "one operator after another; launches apart"
)
COUNTED = (
    "FLOPs: MatMul 2mnk; attention 4 x pairs x heads x head_dim, where pairs are the query and key tokens that are "
    "multiplied: up to the diagonal with a causal mask, within a segment with segment ends, all with a dense mask; "
    "other operators 0. Bytes: every input and output once; of a table the rows that are gathered, of the cache the "
    "rows that are valid or written; constants inside the graph 0."
)


@dataclass(frozen=True)
class Assumptions:
    """Peak rates of one SoC: bytes/s of its HBM, dense FLOP/s in bf16 and fp16, and microseconds to start a kernel."""

    soc: str
    bandwidth_bytes_per_s: float
    peak_flops_per_s: float
    launch_us: float
    note: str = ASSUMPTION


@dataclass(frozen=True)
class Estimate:
    """A bound on one run of a graph in milliseconds; of its device operators, how many are bound by what."""

    kernels_ms: float
    launch_ms: float
    total_ms: float
    bandwidth_bound_ops: int
    compute_bound_ops: int


# Round figures for estimating: no device was measured. Others are not guessed.
_SOCS = {"Ascend910B2": Assumptions("Ascend910B2", 1.6e12, 350e12, 3.0)}
_PEAK_DTYPES = ("bf16", "fp16")


def assumptions_for(soc: str, dtype: str) -> Assumptions | None:
    """What is assumed of graphs of this dtype on this SoC; None where nothing is."""
    return _SOCS.get(soc) if dtype in _PEAK_DTYPES else None


def why_no_assumptions(soc: str, dtype: str) -> str:
    """Where `assumptions_for` gives None: the reason, with the SoC's or the dtype's name."""
    if soc not in _SOCS:
        return f"nothing is assumed about {soc}, only about {', '.join(_SOCS)}"
    return f"no peak rate is assumed for {dtype} on {soc}, only for {' and '.join(_PEAK_DTYPES)}"


def estimate(costs: Iterable[OpCost], assumed: Assumptions) -> Estimate:
    """The bound for device operators that run one after another."""
    seconds, bandwidth_bound, compute_bound = 0.0, 0, 0
    for cost in costs:
        moving, computing = cost.bytes / assumed.bandwidth_bytes_per_s, cost.flops / assumed.peak_flops_per_s
        seconds += max(moving, computing)
        bandwidth_bound += moving >= computing
        compute_bound += moving < computing
    kernels_ms = 1e3 * seconds
    launch_ms = 1e-3 * assumed.launch_us * (bandwidth_bound + compute_bound)
    return Estimate(kernels_ms, launch_ms, kernels_ms + launch_ms, bandwidth_bound, compute_bound)
