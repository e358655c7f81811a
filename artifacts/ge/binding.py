"""binding.json: what each input of a GE graph is bound to, what its outputs are, and the options it is loaded with."""

from dataclasses import dataclass

from ..dtypes import BY_PROTO
from ..errors import ArtifactError
from ..schema import dump_json, from_plain, parse_json

PARAMETER = "parameter"
CONSTANT = "constant"
ARGUMENT = "argument"
CACHE = "cache"
LENGTHS = "lengths"
KINDS = (PARAMETER, CONSTANT, ARGUMENT, CACHE, LENGTHS)
# What torchair 2.13 sets for the graphs compiled here; nothing else is passed on to GE.
LOCAL_OPTIONS = frozenset(
    {
        "clone_input",
        "deadlock_check",
        "disable_mempool_reuse_in_same_fx",
        "enable_output_clone",
        "frozenInput",
        "frozen_parameter",
        "ge.deterministic",
        "ge.deterministicLevel",
        "ge.exec.allTensorNotEmpty",
        "ge.exec.atomicCleanPolicy",
        "ge.exec.outputReuseMemIndexes",
        "ge.featureBaseRefreshable",
        "ge.inputHintShape",
        "ge.jit_compile",
        "ge.tiling_schedule_optimize",
        "ge.topoSortingMode",
        "mode",
        "pattern_fusion_pass",
        "remove_noop_ops",
        "run_eagerly",
        "static_capture_size_limit",
    }
)
GLOBAL_OPTIONS = frozenset(
    {
        "ge.enableSingleStream",
        "ge.exec.enableEngineParallel",
        "ge.exec.staticMemoryPolicy",
        "ge.exportCompileStat",
        "ge.oo.level",
        "ge.opSelectImplmode",
    }
)


@dataclass(frozen=True)
class BoundInput:
    """One `Data` op, in index order.

    kind is one of: parameter (a tensor of weights/, by name), constant (a tensor of constants.safetensors, by name),
    argument (a run-time tensor), cache (layer `index` of the list argument `name`, written in place), lengths (a list
    of integers on the host, packed to int64).
    shape holds -1 for sizes known at run time; frozen inputs keep one device address while the graph lives.
    """

    kind: str
    name: str
    index: int | None
    dtype: str
    shape: tuple[int, ...]
    host: bool
    frozen: bool


@dataclass(frozen=True)
class BoundOutput:
    """One output, in memory of its own."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Binding:
    """How to call one graph. The options are torchair's, passed to GE at load (local) and initialisation (global)."""

    graph: str
    inputs: tuple[BoundInput, ...]
    outputs: tuple[BoundOutput, ...]
    local_options: dict[str, str]
    global_options: dict[str, str]

    def to_bytes(self) -> bytes:
        return dump_json(self)


def binding_from_bytes(data: bytes, where: str) -> Binding:
    """Parse and check binding.json. Raises ArtifactError naming `where`."""
    binding = from_plain(Binding, parse_json(data, where), where)
    for i, bound in enumerate(binding.inputs):
        if bound.kind not in KINDS:
            raise ArtifactError(f"{where}: inputs[{i}].kind is {bound.kind!r}, expected one of {', '.join(KINDS)}")
        if bound.dtype not in {dtype.name for dtype in BY_PROTO.values()}:
            raise ArtifactError(f"{where}: inputs[{i}] ({bound.name}) has the unknown dtype {bound.dtype[:40]!r}")
        if (bound.kind == CACHE) != (bound.index is not None):
            raise ArtifactError(f"{where}: inputs[{i}] ({bound.name}) must have an index if and only if it is a cache")
        if any(size < -1 for size in bound.shape):
            raise ArtifactError(f"{where}: inputs[{i}] ({bound.name}) has the impossible shape {list(bound.shape)}")
    if unknown := unknown_options(binding):
        raise ArtifactError(f"{where}: unknown option {', '.join(unknown)}; compile the artifact again")
    return binding


def unknown_options(binding: Binding) -> list[str]:
    """Options outside the lists: they would reach GE's C++ side, where one may name a file to write or to load."""
    return sorted({*(binding.local_options.keys() - LOCAL_OPTIONS), *(binding.global_options.keys() - GLOBAL_OPTIONS)})
