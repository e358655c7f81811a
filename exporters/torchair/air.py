"""From a traced GE graph to an offline model (.air) that ATC compiles: a change of its protobuf, not a second trace.

What torchair's `dynamo_export` does with the inputs of a graph is done here too: constants become FileConstant, what is
written in place becomes RefData, and run-time arguments stay Data, numbered before RefData. Two things differ:

- torchair looks up the operator to replace by the index of the input, though with dynamic sizes the two do not run
  alike: it overwrites others. Here an input is found by its attribute `index`, and inputs come first in the file.
- torchair writes every constant into a file of its own and names it in `file_path`, which is read from its first byte.
  Here a constant stays where it is, in the artifact's safetensors files, named by the attributes `location`, `offset`
  and `length`. GE itself makes such FileConstants (file_constant_utils.cc in its public source) and prefers them to
  `file_path`, which is left empty: a CANN too old to know `location` then finds no file, not the wrong bytes.

Paths are relative to the folder of the .air: GE opens them from the working directory, so that ATC must run there.
Written after reading GE's source and torchair's; that ATC compiles the result has not been seen on a machine with CANN.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ...artifacts.dtypes import ge_number
from ...artifacts.errors import ArtifactError
from ...artifacts.ge.binding import CACHE, CONSTANT, PARAMETER, Binding, BoundInput
from ...artifacts.ge.ops import FILE_CONSTANT, INPUTS
from ...artifacts.manifest import Tensor

REF_DATA = "RefData"
# ge.proto.AttrDef.ListValue.ListValueType: says of which type a list is, also where it is empty
_LIST_OF_INTS = 2
_MODEL_VERSION = 1
# torchair's Placement: where it looks for an input's memory
_HOST, _DEVICE = 0, 1


@dataclass(frozen=True)
class FileSlice:
    """Where a constant lies: a file's path relative to the artifact, and the bytes in it."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class AirInputs:
    """The inputs that an offline model has left: by index, the run-time arguments, then the parts of the KV cache."""

    arguments: tuple[Tensor, ...]
    caches: tuple[Tensor, ...]


def convert_to_air(model: Any, binding: Binding, slices: Mapping[str, FileSlice], path: str) -> AirInputs:
    """Change `model`, the ge.proto.ModelDef of a traced graph, into the one to be stored at `path` in the artifact.

    slices holds every parameter and constant of the binding, by name. Operators of inputs are renamed to what they are
    bound to: ATC's --input_shape takes these names.
    Raises ArtifactError where graph and binding do not fit.
    """
    graph = model.graph[0]
    by_index = {op.attr["index"].i: op for op in graph.op if op.type in INPUTS}
    if sorted(by_index) != list(range(len(binding.inputs))):
        raise ArtifactError(
            f"graph {binding.graph}: has inputs {sorted(by_index)}, its binding.json lists {len(binding.inputs)}; "
            "compile the artifact again"
        )
    ordered = sorted(enumerate(binding.inputs), key=lambda item: _rank(item[1]))
    _rename(graph, {by_index[i].name: input_name(bound) for i, bound in ordered}, binding.graph)
    folder = PurePosixPath(path).parent
    left: list[BoundInput] = []
    for i, bound in ordered:
        op = by_index[i]
        if bound.kind in (PARAMETER, CONSTANT):
            _to_file_constant(op, bound, slices[bound.name], folder)
            continue
        if bound.kind == CACHE:
            op.type = REF_DATA
        op.attr["index"].i = len(left)
        left.append(bound)
    _move_first(graph, [by_index[i].name for i, _ in ordered])
    graph.attr["_input_placements"].list.i[:] = [_HOST if bound.host else _DEVICE for bound in left]
    model.name, model.version = binding.graph, _MODEL_VERSION
    tensors = [Tensor(input_name(bound), bound.dtype, bound.shape) for bound in left]
    count = sum(bound.kind != CACHE for bound in left)
    return AirInputs(tuple(tensors[:count]), tuple(tensors[count:]))


def input_name(bound: BoundInput) -> str:
    """The name of an input's operator: an argument's or a tensor's own name, `keys_0` for a part of the cache."""
    return bound.name if bound.index is None else f"{bound.name}_{bound.index}"


def _rank(bound: BoundInput) -> int:
    return {CACHE: 1, PARAMETER: 2, CONSTANT: 2}.get(bound.kind, 0)


def _rename(graph: Any, names: Mapping[str, str], where: str) -> None:
    taken = [names.get(op.name, op.name) for op in graph.op]
    if len(set(taken)) != len(taken):
        twice = sorted({name for name in names.values() if taken.count(name) > 1})
        raise ArtifactError(f"graph {where}: {', '.join(twice)} names an input and another operator")
    for op in graph.op:
        op.name = names.get(op.name, op.name)
        for i, edge in enumerate(op.input):
            producer, colon, output = edge.rpartition(":")
            if producer in names:
                op.input[i] = names[producer] + colon + output


def _to_file_constant(op: Any, bound: BoundInput, source: FileSlice, folder: PurePosixPath) -> None:
    """GE's operator has no input; its output keeps the descriptor, from which GE takes the shape of the tensor."""
    op.type = FILE_CONSTANT
    del op.input_desc[:]
    del op.attr["index"]
    for name in ("_input_name_key", "_input_name_value"):
        op.attr[name].list.Clear()
        op.attr[name].list.SetInParent()
    op.attr["shape"].list.i.extend(bound.shape)
    op.attr["shape"].list.val_type = _LIST_OF_INTS
    op.attr["dtype"].dt = ge_number(bound.dtype)
    op.attr["file_path"].s = b""
    op.attr["file_id"].s = b""
    op.attr["location"].s = _relative(source.path, folder).encode()
    op.attr["offset"].i = source.offset
    op.attr["length"].i = source.length


def _relative(path: str, folder: PurePosixPath) -> str:
    return "/".join([*(".." for _ in folder.parts), path])


def _move_first(graph: Any, names: Iterable[str]) -> None:
    ops = {op.name: type(op).FromString(op.SerializeToString()) for op in graph.op}
    first = [ops.pop(name) for name in names]
    del graph.op[:]
    graph.op.extend([*first, *ops.values()])


def atc_command(name: str, inputs: Collection[Tensor], soc: str, output: str) -> str:
    """The command that compiles `name`.air for `soc` into `output`.om, to be run in the folder of the .air.

    inputs are the run-time arguments: ATC wants their shapes where one varies, and -1 is any size. Parts of the cache
    have a fixed size.
    """
    words = ["atc", "--framework=1", f"--model={name}.air", f"--soc_version={soc}", f"--output={output}"]
    if any(-1 in tensor.shape for tensor in inputs):
        shapes = ";".join(f"{tensor.name}:{','.join(map(str, tensor.shape))}" for tensor in inputs)
        words += ["--input_format=ND", f"--input_shape={shapes}"]
    # ATC's own defaults are fp16 arithmetic and fast, less exact operators; torchair asks for what stands here
    words += ["--precision_mode=must_keep_origin_dtype", "--op_select_implmode=high_precision"]
    # otherwise every .om holds its own copy of the weights
    return shlex.join([*words, "--external_weight=1"])
