"""What is said of a GE operator: one record each, in a file of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

from ...artifacts.dtypes import BY_GE, DTYPES
from ...artifacts.soc import soc_family
from .kernel import Kernel, checked
from .rule import Rule

# Kinds. device: a kernel, as is whatever is not known. shape: arithmetic on shapes. layout: Reshape and the like, which
# move no bytes. data: inputs, constants and the output.
DEVICE, SHAPE, LAYOUT, DATA = "device", "shape", "layout", "data"
Shape = tuple[int, ...]


class Call(Protocol):
    """What an operator's rules and kernels read of a node."""

    @property
    def where(self) -> str: ...

    @property
    def attributes(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data; `values` are those of a small integer constant, which decide other shapes."""

    dtype: str
    shape: Shape
    values: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].bytes

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Specs = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class FromAttribute:
    """An output's dtype is the ge::DataType of an attribute, which has a default or None."""

    name: str
    default: int | None


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
class Work:
    """One run of an operator, as its cost is counted: inputs, None where one is not fed; `constants` says which of them
    are constants inside the graph."""

    inputs: Sequence[TensorSpec | None]
    constants: Sequence[bool]
    outputs: Specs
    sequences: Sequences

    @property
    def read(self) -> Specs:
        """The inputs that are fed and no constants."""
        pairs = zip(self.inputs, self.constants, strict=True)
        return tuple(spec for spec, constant in pairs if spec is not None and not constant)

    @property
    def written_bytes(self) -> int:
        return sum(spec.bytes for spec in self.outputs)


def moved(node: Call, work: Work) -> OpCost:
    """No FLOPs that count; every input and output once."""
    return OpCost(0, sum(spec.bytes for spec in work.read) + work.written_bytes)


@dataclass(frozen=True)
class Eager:
    """How the model's modules call an operator.

    schema: what torch_npu registers. inputs: its arguments, by name, in the order of GE's inputs; None where GE has one
    that it lacks. attributes: the arguments that are GE attributes of the same name. fixed: attributes that the call
    implies. only: arguments that must have this value. adapt: from the arguments' values to the attributes'.
    """

    schema: str
    inputs: tuple[str | None, ...]
    attributes: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = dict

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


@dataclass(frozen=True)
class Operator:
    """Everything about one GE operator.

    ge: its type in a graph. gives: the dtype of each output, of the last one's and all further: that of an input (its
    position), a fixed one (its name), or an attribute's. shape(node, *specs): the outputs' shapes, from TensorSpecs of
    the inputs, None where one is not fed; raises Misfit where they do not fit. values(node, *specs): those of the
    output, of arithmetic on shapes. cost(node, work): of kind `device`. run(node, *tensors): what it computes on CPU;
    None for an operator that rules and passes know and that no finished graph holds. run_on: what SoCs of a family
    compute instead. eager: None where an aten operator makes it.

    writes: it writes its first input, in place, and so lives even where nothing reads its output. view: its output is,
    or may be, the memory of its first input: on CPU by the reference backend, on the device by GE's choice. copy: a
    copy that a compiler may leave out where it finds no other reader. transposes, attention: it is one of those; of
    attentions, a graph has one a layer.

    defaults: the definition's, of attributes that a node does not write. unwritten: likewise, of attributes that some
    release may lack: a graph says them only where they differ. rules: what CANN's releases ask of it.
    """

    ge: str
    kind: str = DEVICE
    gives: tuple["int | str | FromAttribute", ...] = (0,)
    shape: Callable[..., tuple[Shape, ...]] | None = None
    values: Callable[..., tuple[int, ...]] | None = None
    cost: Callable[[Call, Work], OpCost] | None = None
    run: Kernel | None = None
    run_on: Mapping[str, Kernel] = field(default_factory=dict)
    eager: Eager | None = None
    writes: bool = False
    view: bool = False
    copy: bool = False
    transposes: bool = False
    attention: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unwritten: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    @property
    def hands_on(self) -> bool:
        """Whether a write behind it may reach its first input."""
        return self.writes or self.view or self.copy

    def kernel(self, soc: str) -> Kernel:
        """What `soc` computes; it raises ArtifactError alone. Of an operator that has `run`."""
        if self.run is None:
            raise LookupError(f"{self.ge} is not computed here")
        return checked(self.run_on.get(soc_family(soc), self.run))

    def dtypes(self, count: int, attributes: Mapping[str, Any], inputs: Sequence[str | None]) -> list[str]:
        """The dtypes of `count` outputs, from those of the inputs. Raises LookupError for one that is not known."""
        wanted = [*self.gives, *self.gives[-1:] * count][:count]
        return [self._dtype(each, attributes, inputs) for each in wanted]

    def _dtype(
        self, given: "int | str | FromAttribute", attributes: Mapping[str, Any], inputs: Sequence[str | None]
    ) -> str:
        if isinstance(given, FromAttribute):
            return BY_GE[attributes.get(given.name, given.default)].name
        if isinstance(given, str):
            return given
        if (dtype := inputs[given]) is None:
            raise LookupError(f"input {given} is not fed")
        return dtype

    def outputs(self, node: Call, inputs: Sequence[TensorSpec | None]) -> Specs:
        """The outputs for these inputs, of an operator that has `shape`. Raises what `shape` raises, LookupError
        included."""
        if self.shape is None:
            raise LookupError(f"{self.ge} has no shape rule")
        shapes = self.shape(node, *inputs)
        values = self.values(node, *inputs) if self.values else None
        dtypes = self.dtypes(len(shapes), node.attributes, [spec.dtype if spec else None for spec in inputs])
        return tuple(TensorSpec(dtype, shape, values) for dtype, shape in zip(dtypes, shapes, strict=True))
