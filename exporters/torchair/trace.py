"""Trace one method of a module into a GE graph with torchair, without running it and without torchair's own cache.

torchair's cache_compile would write pickled bytecode under a key that ignores weights and shapes. Here the finished
graph is taken at the point where torchair would hand it to the device, as protobuf bytes plus plain data.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...artifacts.dtypes import BY_GE
from ...artifacts.errors import TargetError
from ...artifacts.ge.binding import (
    ARGUMENT,
    CACHE,
    CONSTANT,
    LENGTHS,
    PARAMETER,
    Binding,
    BoundInput,
    BoundOutput,
    unknown_options,
)
from ...artifacts.ge.ops import INPUTS
from ...artifacts.manifest import OperatorNote
from ...runtime.models.base import GraphSpec
from .converters import register_converters
from .dtypes import dtype_name

CONSTANTS_PREFIX = "constants."
_MODULE_STEP = re.compile(r"\._modules\['([^']+)'\]|\._parameters\['([^']+)'\]|\.([A-Za-z_]\w*)")
_ARGUMENT = re.compile(r"L\['([^']+)'\](?:\[(\d+)\])?")

_ASK_CANN = "torchair asks CANN whether its registry has this operator; ask on the device"


@dataclass(frozen=True)
class TracedGraph:
    """A GE graph as torchair emits it: `model` is a ge.proto.ModelDef; `notes` lists operators that need a check."""

    model: Any
    binding: Binding
    notes: tuple[OperatorNote, ...]


class _Captured(Exception):
    """Ends the traced call once its graph is taken."""


def _parameter_name(source: str) -> str | None:
    """`L['self']._modules['a']._parameters['weight']` to `a.weight`; None for anything else."""
    if not source.startswith("L['self']"):
        return None
    rest, steps = source[len("L['self']") :], []
    while rest:
        if not (step := _MODULE_STEP.match(rest)):
            return None
        steps.append(next(group for group in step.groups() if group))
        rest = rest[step.end() :]
    return ".".join(steps)


@contextlib.contextmanager
def _tracing_patches(bypassed: set[OperatorNote]) -> Iterator[None]:
    """Let torchair trace without a device behind it; restores everything on exit.

    Two things go through CANN at trace time: starting the graph engine, which tracing does not need, and asking
    whether this CANN's registry knows an operator. The second is recorded in `bypassed` and answered yes, so that the
    artifact says what must be checked on the device instead.
    """
    import torch
    import torch.fx.experimental._config as fx_config
    import torchair._ge_concrete_graph.compat_ir as compat_ir
    import torchair._ge_concrete_graph.fx2ge_converter as fx2ge

    def record(optype: str, runtime_optional_inputs: Any = (), runtime_optional_attrs: Any = ()) -> str:
        bypassed.add(OperatorNote(optype, tuple(runtime_optional_inputs), tuple(runtime_optional_attrs), _ASK_CANN))
        return ""

    engine, check = fx2ge.initialize_graph_engine, compat_ir.is_cann_compat
    fx2ge.initialize_graph_engine = lambda *args, **kwargs: None
    compat_ir.is_cann_compat = record
    try:
        with (
            # floats as graph inputs (eps, scale) would compile everything twice
            torch._dynamo.config.patch(specialize_float=True),
            # two sizes that happen to be equal in the example must stay independent
            fx_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]  # installed at import
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="When enable frozen_parameter")
            yield
    finally:
        fx2ge.initialize_graph_engine = engine
        compat_ir.is_cann_compat = check


def _compiler_config(tiling_schedule: bool) -> Any:
    import torchair

    config = torchair.CompilerConfig()
    config.experimental_config.frozen_parameter = True
    config.experimental_config.tiling_schedule_optimize = tiling_schedule
    return config


def _sources(gm: Any) -> list[str]:
    """Where each placeholder of dynamo's graph comes from, as a Python expression over the traced call's locals."""
    return [
        node.meta["grapharg"].source.name if node.meta.get("grapharg") is not None else node.name
        for node in gm.graph.nodes
        if node.op == "placeholder"
    ]


def _bind_inputs(concrete: Any, sources: list[str], caches: frozenset[str], local: Mapping[str, str]) -> Any:
    frozen = local["frozenInput"].split(",")
    inputs = []
    for position, info in enumerate(concrete._input_info_list):
        func = info.func
        kind = type(func).__name__
        desc = _data_op(concrete.graph, position).output_desc[0]
        bound = BoundInput(
            kind=ARGUMENT,
            name="",
            index=None,
            dtype=dtype_name(desc.dtype),
            shape=tuple(desc.shape.dim),
            host=info.device_type == "CPU",
            frozen=frozen[position] == "1",
        )
        if kind == "_SymPackInput":
            names = [_ARGUMENT.fullmatch(sources[i]) for i in func.fx_input_idx_list]
            if not all(names) or [m[2] for m in names if m] != [str(i) for i in range(len(names))]:
                raise TargetError(
                    f"input {position}: integers packed from {[sources[i] for i in func.fx_input_idx_list]}"
                )
            inputs.append(replace(bound, kind=LENGTHS, name=names[0][1]))  # type: ignore[index]
        elif kind == "_TensorInput":
            source = sources[func.fx_input_idx]
            if name := _parameter_name(source):
                is_constant = name.startswith(CONSTANTS_PREFIX)
                name = name.removeprefix(CONSTANTS_PREFIX)
                inputs.append(replace(bound, kind=CONSTANT if is_constant else PARAMETER, name=name))
            elif match := _ARGUMENT.fullmatch(source):
                index = int(match[2]) if match[2] else None
                inputs.append(
                    replace(bound, kind=CACHE if match[1] in caches else ARGUMENT, name=match[1], index=index)
                )
            else:
                raise TargetError(f"input {position}: {source} is neither a parameter nor an argument of the method")
        else:
            raise TargetError(f"input {position}: torchair wants it as {kind}; only contiguous tensors are supported")
    return tuple(inputs)


def _data_op(graph: Any, index: int) -> Any:
    return next(op for op in graph.op if op.type in INPUTS and op.attr["index"].i == index)


def _output_dtype_name(dtype: int) -> str:
    """The artifact's name of a dtype in `_output_dtypes`, which torchair numbers by GE's C++ enum."""
    if dtype not in BY_GE:
        raise TargetError(f"GE output dtype {dtype} is not one that the runtime binds")
    return BY_GE[dtype].name


def trace(spec: GraphSpec, method: Callable[..., Any], arguments: Mapping[str, Any]) -> TracedGraph:
    """Trace `method(**arguments)` into the GE graph of a spec.

    arguments: tensors on the (emulated) NPU, lists of them, or lists of ints; sizes are dynamic unless marked static.
    Raises TargetError when torchair cannot express the method as one graph over its parameters and arguments.
    """
    import torch
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported
    from torchair.npu_fx_compiler import _compile_graph_with_aot, _get_merged_decompositions, get_compiler

    register_converters()
    name, outputs = spec.name, [output.name for output in spec.outputs]
    # tiling on the device takes a static graph
    config = _compiler_config(tiling_schedule=spec.static)
    bypassed: set[OperatorNote] = set()
    taken: list[tuple[Any, list[str]]] = []

    def backend(gm: Any, example_inputs: list[Any]) -> Any:
        sources = _sources(gm)
        compiler = get_compiler(config)

        def take(fx_graph: Any, inputs: list[Any]) -> Callable[..., Any]:
            taken.append((compiler(fx_graph, inputs).runner, sources))

            def stop(*args: Any) -> Any:
                raise _Captured

            return stop

        decompositions = _get_merged_decompositions(config, {})
        return _compile_graph_with_aot(gm, take, example_inputs, config, decompositions, is_cache=True)

    torch._dynamo.reset()
    with _tracing_patches(bypassed), torch.no_grad(), contextlib.suppress(_Captured):
        try:
            torch.compile(method, backend=backend, fullgraph=True, dynamic=True)(**arguments)
        except (BackendCompilerFailed, Unsupported) as error:
            raise TargetError(f"torchair cannot trace the {name} graph: {_gist(error)}") from error
        finally:
            torch._dynamo.reset()
    if len(taken) != 1:
        raise TargetError(f"{name}: expected one GE graph, torchair emitted {len(taken)}")
    concrete, sources = taken[0]
    with _tracing_patches(set()):
        local, global_options = concrete._normalize_ge_option()
    caches = frozenset(argument.name for argument in spec.arguments if argument.kind == "cache")
    inputs = _bind_inputs(concrete, sources, caches, local)
    model = _named_model(concrete.graph, name)
    graph = model.graph[0]
    dtypes = list(graph.attr["_output_dtypes"].list.i)
    order = [concrete._fx_outputs_mapping[i] for i in range(len(outputs))]
    if order != list(range(len(outputs))):
        raise TargetError(f"{name}: torchair reordered the outputs: {order}")
    if concrete._graph_output_ref_input or len(dtypes) != len(outputs):
        raise TargetError(f"{name}: torchair returns writes as outputs; only caches written in place are supported")
    bound_outputs = tuple(
        BoundOutput(label, _output_dtype_name(dtype)) for label, dtype in zip(outputs, dtypes, strict=True)
    )
    notes = tuple(sorted(bypassed, key=lambda note: (note.operator, note.inputs, note.attributes)))
    binding = Binding(name, inputs, bound_outputs, dict(local), dict(global_options))
    if unknown := unknown_options(binding):
        raise TargetError(
            f"{name}: this torchair sets the options {', '.join(unknown)}, which the runtime does not know"
        )
    return TracedGraph(model, open_length_lists(model, binding, spec), notes)


def _gist(error: Exception) -> str:
    """The first lines of dynamo's message that say something of the cause, without its advice and traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and " raised:" not in line]
    return " ".join(lines[:2])


def _named_model(graph: Any, name: str) -> Any:
    """A copy of torchair's ModelDef whose graph carries our name instead of a running number."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    model = ModelDef()
    model.ParseFromString(graph.SerializeToString())
    model.graph[0].name = name
    return model


def open_length_lists(model: Any, binding: Binding, spec: GraphSpec) -> Binding:
    """Let a list of integers have any length where the spec leaves it free.

    torchair bakes the list's length into the one host input that carries it, though no operator depends on it; with a
    dimension of -1 it is free.
    """
    inputs = list(binding.inputs)
    free = {argument.name for argument in spec.arguments if argument.kind == "lengths" and argument.free}
    for i, bound in enumerate(inputs):
        if bound.name in free:
            op = _data_op(model.graph[0], i)
            for desc in (*op.input_desc, *op.output_desc):
                desc.shape.dim[:] = [-1]
            inputs[i] = replace(bound, shape=(-1,))
    return replace(binding, inputs=tuple(inputs))
