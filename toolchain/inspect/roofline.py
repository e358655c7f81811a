"""What one operator computes and moves, and a roofline estimate of a graph from that: a bound, not a measurement.

The roofline model (Williams, Waterman, Patterson: "Roofline", CACM 2009): a kernel takes at least the longer of its
arithmetic at peak rate and its bytes at peak bandwidth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from ...artifacts.ge.graph import Node
from ...artifacts.ge.ops import ATTENTIONS, WRITES
from .shapes import Specs, TensorSpec

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
_RIGHT_DOWN_CAUSAL = 3
# Where the operators' definitions have their lists of lengths; the reference executor reads them in the same places.
_QUERY_LENGTHS = {"FusedInferAttentionScore": 5}
_KV_LENGTHS = {"FusedInferAttentionScore": 6, "IncreFlashAttention": 5}


@dataclass(frozen=True)
class Sequences:
    """Lengths that no shape shows: valid cache rows of every batch row, and the patches of every vision segment."""

    kv_length: int
    segments: tuple[int, ...]


@dataclass(frozen=True)
class OpCost:
    """FLOPs of one operator, and the bytes it reads and writes."""

    flops: int
    bytes: int


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


def _read_length(node: Node, inputs: Sequence[TensorSpec | None], k: TensorSpec, sequences: Sequences) -> int:
    """Cache rows that an attention in the BSH layout reads: the valid ones where it is told, else all."""
    place = _KV_LENGTHS.get(node.op)
    told = place is not None and place < len(inputs) and inputs[place] is not None
    return min(sequences.kv_length, k.shape[1]) if told else k.shape[1]


def _attention_cost(node: Node, inputs: Sequence[TensorSpec | None], outputs: Specs, sequences: Sequences) -> OpCost:
    q, k, v = inputs[:3]
    if q is None or k is None or v is None:
        raise ValueError(f"{node.where} has no query, key or value")
    others = sum(spec.bytes for spec in inputs[3:] if spec) + sum(spec.bytes for spec in outputs)
    if node.attributes["input_layout"] == "TND":
        pairs = sum(length * length for length in sequences.segments)
        return OpCost(4 * pairs * q.shape[1] * q.shape[2], q.bytes + k.bytes + v.bytes + others)
    batch, tokens, width = q.shape
    if node.op in _QUERY_LENGTHS and inputs[_QUERY_LENGTHS[node.op]] is not None:
        # the vision tower's segments, each over itself
        pairs = sum(length * length for length in sequences.segments)
        return OpCost(4 * pairs * width, q.bytes + k.bytes + v.bytes + others)
    length = _read_length(node, inputs, k, sequences)
    pairs = tokens * length
    if node.attributes.get("sparse_mode") == _RIGHT_DOWN_CAUSAL:
        # the last token sees all, every token before it one less
        pairs -= tokens * (tokens - 1) // 2
    cache = (k.bytes + v.bytes) * length // k.shape[1]
    return OpCost(4 * batch * pairs * width, q.bytes + cache + others)


def operator_cost(
    node: Node, inputs: Sequence[TensorSpec | None], outputs: Specs, constants: Sequence[bool], sequences: Sequences
) -> OpCost:
    """Cost of a device operator; `constants` says which inputs are constants inside the graph. See COUNTED."""
    if node.op in ATTENTIONS:
        return _attention_cost(node, inputs, outputs, sequences)
    fed = [spec for spec, constant in zip(inputs, constants, strict=True) if spec is not None and not constant]
    written = sum(spec.bytes for spec in outputs)
    if node.op == "GatherV2":
        return OpCost(0, sum(spec.bytes for spec in fed[1:]) + 2 * written)
    if node.op in WRITES:
        updates = fed[-1].bytes
        return OpCost(0, sum(spec.bytes for spec in fed[1:]) + updates)
    flops = 0
    if node.op == "MatMul" and inputs[0] is not None:
        inner = inputs[0].shape[0 if node.attributes.get("transpose_x1") else 1]
        flops = 2 * prod(outputs[0].shape) * inner
    return OpCost(flops, sum(spec.bytes for spec in fed) + written)


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
