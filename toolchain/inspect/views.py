"""What `inspect` finds, as data: `dataclasses.asdict` of an Inspection is what `inspect --json` prints."""

from dataclasses import dataclass

from ...artifacts.manifest import OperatorNote, Tensor
from ...artifacts.signing import Signed
from ...runtime.models.config import ModelConfig
from .cost import GraphCost, Lengths
from .roofline import Assumptions

# The published recipe's graphs, as torchair emits them at the 7B shape (bf16, batch 1, 1368 patches, 367 tokens).
RECIPE_7B: dict[str, dict[str, int]] = {
    "visual": {"total": 4072, "device": 1639, "transpose_weight": 130, "per_layer": 51},
    "prefill": {"total": 3930, "device": 789, "transpose_weight": 196, "per_layer": 27},
    "decode": {"total": 1984, "device": 732, "transpose_weight": 196, "per_layer": 25},
}


@dataclass(frozen=True)
class OpCounts:
    """Live operators: those that reach NetOutput or write into an input, and the inputs themselves.

    device: kernels. shape: arithmetic on shapes. layout: Reshape and the like, which move no bytes. data: inputs,
    constants, output. transpose_weight: kernels that transpose a parameter. per_layer: device operators of one layer;
    None where there is one layer only, or where layers differ.
    """

    total: int
    device: int
    shape: int
    layout: int
    data: int
    transpose_weight: int
    per_layer: int | None
    by_type: dict[str, int]


@dataclass(frozen=True)
class GraphView:
    """One compiled graph; parameters and constants are not among its inputs. no_cost: why there is no cost."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: int
    ops: OpCounts
    # what CANN adds to the graph, by type: none of it is among `ops`; None where sizes cannot be followed
    inserted: dict[str, int] | None
    bytes: int
    cost: GraphCost | None
    no_cost: str | None


@dataclass(frozen=True)
class WeightsView:
    """What the weight files hold."""

    dtype: str
    bytes: int
    files: int
    tensors: int
    values: int


@dataclass(frozen=True)
class TargetView:
    """What the graphs were compiled for, with what, and what they need of the device."""

    soc: str
    operators: str
    visual_attention: str
    dtype: str
    max_length: int
    batches: tuple[int, ...]
    passes: tuple[str, ...]
    versions: dict[str, str]
    limits: tuple[str, ...]
    admitted: tuple[str, ...] | None
    operator_notes: tuple[OperatorNote, ...]
    kv_bytes: dict[str, int]
    kv_bytes_per_token: int
    weight_bytes: int
    device_bytes: int
    device_memory_bytes: int | None


@dataclass(frozen=True)
class OnnxView:
    """The ONNX models: bytes by model, and their operators."""

    weights: str
    block_size: int | None
    standard_only: bool
    opset: int
    max_length: int
    versions: dict[str, str]
    verification: str
    bytes: dict[str, int]
    ops: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` says. kv_bytes is by batch size; device_bytes is weights and the largest KV cache.

    onnx_planned_bytes: what an export would take, by kind of weights. selftest: what computed its answers.
    lengths: what the graphs' costs are at. no_estimate: why they have no roofline estimate.
    """

    name: str
    schema: int
    model: ModelConfig
    weights: WeightsView | None
    target: TargetView | None
    graphs: dict[str, GraphView]
    processor: tuple[str, ...]
    bytes: int
    verification: str
    selftest: str | None
    signed: Signed | None
    recipe_at_7b: dict[str, dict[str, int]]
    lengths: Lengths | None
    estimate_assumptions: Assumptions | None
    no_estimate: str | None
    onnx: OnnxView | None
    onnx_planned_bytes: dict[str, int]
