"""binding.json: what each input of a GE graph is bound to, what its outputs are, and the options it is loaded with."""

from dataclasses import dataclass

from .errors import ArtifactError
from .schema import dump_json, from_plain, parse_json

PARAMETER = "parameter"
CONSTANT = "constant"
ARGUMENT = "argument"
CACHE = "cache"
LENGTHS = "lengths"
KINDS = (PARAMETER, CONSTANT, ARGUMENT, CACHE, LENGTHS)


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
    """One output; `input` is the index of the input whose memory it is, where it is one."""

    name: str
    dtype: str
    input: int | None


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
        if (bound.kind == CACHE) != (bound.index is not None):
            raise ArtifactError(f"{where}: inputs[{i}] ({bound.name}) must have an index if and only if it is a cache")
        if any(size < -1 for size in bound.shape):
            raise ArtifactError(f"{where}: inputs[{i}] ({bound.name}) has the impossible shape {list(bound.shape)}")
    for i, output in enumerate(binding.outputs):
        if output.input is not None and not 0 <= output.input < len(binding.inputs):
            raise ArtifactError(f"{where}: outputs[{i}] refers to input {output.input} of {len(binding.inputs)}")
    return binding
