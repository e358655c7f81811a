"""What a model family states, and nothing else does: its config, weights, graphs, and what pictures and ids become.

A family is a module here with one `Family`, and one of the same name in toolchain/models with its torch modules.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from ...artifacts.manifest import GePart
from .config import ModelConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .segments import VisualCall

FP32 = "fp32"
# Longest side of a picture in patches, and rows of the table of their angles. The processor's limits (max_pixels
# 12,845,056, aspect ratio 200) allow 3,620.
MAX_VISION_SIDE = 4096
MODEL_DTYPE = "model"


class Role(Enum):
    """What a tensor is to the operator that reads it."""

    LINEAR = "the matrix of a linear layer"
    BIAS = "the bias of a linear layer"
    NORM = "the scale of a normalisation"
    SHIFT = "the shift of a normalisation"
    EMBEDDING = "the table of token embeddings"
    HEAD = "the output layer, which a tied checkpoint does not store"
    PATCHES = "the patch embedding's Conv3d kernel as a matrix, image normalisation folded in"
    MEAN = "what the folded mean adds, in fp32 always: a large constant"


class Split(Enum):
    """Which axis of a tensor is divided among ranks; of COLUMN, every part by itself."""

    COLUMN = 0
    ROW = 1


class Part(NamedTuple):
    """A tensor of the checkpoint, under the name that published ones have, and its rows in the artifact's tensor:
    where those are more than it has, or the columns are, the rest is zeros."""

    name: str
    shape: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Weight:
    """One tensor of the artifact: its parts' rows, one below the other. reads: what the input of its layer is, in
    words, where that has a name."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    role: Role
    split: Split | None = None
    reads: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def owner(self) -> str:
        """The module that has it."""
        return self.name.rpartition(".")[0]

    def dtype(self, model: str, biases: str | None = FP32) -> str:
        """Its dtype in an artifact of dtype `model`. biases: WeightsPart.bias_dtype; the device's MatMul takes an fp32
        bias beside half-precision weights, and a bias of any other dtype costs a Cast a node. None is the model's
        dtype, as the schemas before 3 have it.
        """
        return FP32 if self.role is Role.MEAN else (biases or model) if self.role is Role.BIAS else model

    def bytes_on(self, ranks: int, item: int) -> int:
        """What one of `ranks` devices holds of it."""
        return item * (self.size if self.split is None else -(-self.size // ranks))


# what a graph does
Kind = Literal["visual", "prefill", "decode"]
# an axis: a number, or the name of a size that is known at run time only
Size = int | str


@dataclass(frozen=True)
class Argument:
    """An input or output of a graph. dtype "model" is the artifact's.

    kind: "lengths" is a list of integers on the host, "cache" one tensor a layer, written in place. indexes: the
    constant whose rows its values choose.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    kind: Literal["tensor", "lengths", "cache"] = "tensor"
    indexes: str = ""

    @property
    def free(self) -> tuple[int, ...]:
        """Its axes that are known at run time only."""
        return tuple(i for i, size in enumerate(self.shape) if isinstance(size, str))

    @property
    def bound(self) -> tuple[int, ...]:
        """Its shape as bindings and manifests have it, -1 for what is known at run time only."""
        return tuple(-1 if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """One graph of an artifact: the method of the modules that is traced, its arguments and outputs in order.

    layers: tensors that each cache argument stands for.
    """

    name: str
    kind: Kind
    method: str
    arguments: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    layers: int = 0

    @property
    def static(self) -> bool:
        """Whether all sizes are fixed: the device then computes the tiling itself, off the host's path."""
        return not any(argument.free for argument in self.arguments)

    @property
    def rows(self) -> int | None:
        """Rows of its cache; None without one."""
        return next((int(each.shape[0]) for each in self.arguments if each.kind == "cache"), None)


@dataclass(frozen=True)
class GraphOptions:
    """The forms of the graphs, and the sizes that are fixed in them.

    operators: "fused" attends with FusedInferAttentionScore, "recipe" with PromptFlashAttention over a dense mask and
    IncreFlashAttention. visual_attention: "segments" attends in BSH with the segments as the batch, "tnd" over segments
    packed end to end, one run for pictures of any sizes; "equal" is "segments" with rows of one length, which have no
    lengths: what ONNX models take; "masked" is of artifacts from before schema 3, on CPU alone,
    and so is by_head False: decode then takes a position a row, not a row of the table a head.
    """

    max_length: int
    operators: str = "fused"
    visual_attention: str = "segments"
    batches: tuple[int, ...] = (1,)
    by_head: bool = True

    @classmethod
    def of(cls, part: GePart) -> "GraphOptions":
        """Those that an artifact's graphs were compiled with."""
        return cls(part.max_length, part.operators, part.visual_attention, part.batches, part.admitted is not None)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture or clip of grid (t, h, w) in patches; seconds: from one step of a clip's grid to the next."""

    kind: str
    grid: tuple[int, int, int]
    seconds: float = 1.0


class VisualLimits(NamedTuple):
    """How an engine's visual graph takes patches. attention: a GraphOptions.visual_attention. most: patches of one
    call, padding included, which a longer picture exceeds; longest: patches of one picture, padding included, where
    that is limited; side: of a picture, in patches; packed: sequences of one call end to end."""

    attention: str
    most: int
    longest: int | None = None
    side: int = MAX_VISION_SIDE
    packed: int = 0


class Inputs(Protocol):
    """What a family makes of pictures and ids."""

    def visual(
        self, patches: "NDArray[np.uint8]", grids: "NDArray[np.int64]", limits: VisualLimits
    ) -> "Iterator[VisualCall]":
        """The calls of the visual graph that embed pictures: patches [n, patch_dim] in merge-window order and grids
        [pictures, 3]. Raises RequestError for a picture that no call takes."""

    def order(self, grids: "NDArray[np.int64]") -> "NDArray[np.int64] | None":
        """Which placeholder each row of the visual graph's output is for, [merged patches]; None: in their order."""

    def positions(
        self, token_ids: "NDArray[np.int64]", pictures: Sequence[Picture], start: int = 0
    ) -> "tuple[NDArray[np.int64], int]":
        """Rotary positions int64 [3, tokens] of a prompt, and delta: the token behind it has position
        tokens + delta. Raises RequestError where placeholders and pictures differ."""


@dataclass(frozen=True)
class Family:
    """A model family. name: config.json's model_type. config: the class that the manifest's `model` is read as.
    modules: the module with its torch modules, by default toolchain/models' of the same name."""

    name: str
    config: type[ModelConfig]
    read_config: Callable[[dict[str, Any]], ModelConfig]
    weights: Callable[[Any], Iterator[Weight]]
    graphs: Callable[[Any, GraphOptions], tuple[GraphSpec, ...]]
    inputs: Callable[[Any], Inputs]
    # free sizes of the visual graph for segments of so many patches, beyond `visual_sizes`
    sizes: Callable[[Any, Sequence[int]], dict[str, int]] = lambda config, segments: {}
    modules: str = ""


def visual_sizes(family: Family, config: ModelConfig, segments: Sequence[int]) -> dict[str, int]:
    """Sizes that graphs leave free, by name, for segments of so many patches each."""
    return {
        "patches": sum(segments),
        "segments": len(segments),
        "longest": max(segments),
        **family.sizes(config, segments),
    }


def linear(
    name: str,
    outputs: int,
    inputs: int,
    *,
    bias: bool = True,
    parts: dict[str, int] | None = None,
    split: Split = Split.COLUMN,
    reads: str = "",
    padded: tuple[int, int] | None = None,
) -> Iterator[Weight]:
    """A linear layer. parts: the checkpoint's modules beside it and their outputs, where it is several in one.
    padded: outputs of each part and inputs in the artifact, with zeros in what is more than the checkpoint has.
    """
    block = name.rpartition(".")[0]
    modules = {f"{block}.{part}": rows for part, rows in parts.items()} if parts else {name: outputs}
    stored = {part: padded[0] if padded else rows for part, rows in modules.items()}
    columns = padded[1] if padded else inputs
    weights = tuple(Part(f"{part}.weight", (rows, inputs), stored[part]) for part, rows in modules.items())
    yield Weight(f"{name}.weight", (sum(stored.values()), columns), weights, Role.LINEAR, split, reads)
    if bias:
        biases = tuple(Part(f"{part}.bias", (rows,), stored[part]) for part, rows in modules.items())
        # of a layer whose inputs are divided, one rank adds it
        own = split if split is Split.COLUMN else None
        yield Weight(f"{name}.bias", (sum(stored.values()),), biases, Role.BIAS, own)


def norm(name: str, width: int, *, shift: bool = False, reads: str = "") -> Iterator[Weight]:
    """A normalisation: LayerNorm has a shift, RMSNorm none."""
    yield _same(f"{name}.weight", (width,), Role.NORM, None, reads)
    if shift:
        yield _same(f"{name}.bias", (width,), Role.SHIFT, None, "")


def table(name: str, rows: int, width: int, role: Role) -> Weight:
    """The token embedding or the output layer."""
    return _same(f"{name}.weight", (rows, width), role, Split.COLUMN, "")


def patch_embedding(name: str, kernel: str, width: int, kernel_shape: tuple[int, int, int, int]) -> Iterator[Weight]:
    """A Conv3d over pixels as a linear layer of uint8 patches: see weights.folding. kernel: the checkpoint's tensor, of
    kernel_shape (channels, frames, rows, columns)."""
    part = (Part(kernel, (width, *kernel_shape), width),)
    yield Weight(f"{name}.weight", (width, math.prod(kernel_shape)), part, Role.PATCHES)
    yield Weight(f"{name}.bias", (width,), part, Role.MEAN)


def _same(name: str, shape: tuple[int, ...], role: Role, split: Split | None, reads: str) -> Weight:
    return Weight(name, shape, (Part(name, shape, shape[0]),), role, split, reads)
