"""The NPU operators that the model's modules call, on CPU: with them, the modules run eagerly anywhere.

Each is the GE operator's own kernel, called as the operator's file says (`runtime.ops`): one definition of what an
operator computes. Schemas are torch_npu's; its own definitions are used where it is imported, and these are taken back
before it is.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts.errors import ArtifactError
from ...artifacts.host.vendor import before_vendor_import
from ...artifacts.soc import DEFAULT_SOC
from ...runtime.ops import OPERATORS
from ...runtime.ops.base import Eager, Operator


@dataclass(frozen=True)
class EagerCall:
    """What a kernel reads of a graph's node, of an operator called by itself."""

    where: str
    attributes: Mapping[str, Any]


# models for different SoCs may run in one process, each in its thread
_soc: ContextVar[str] = ContextVar("soc", default=DEFAULT_SOC)


@contextmanager
def kernels_of(soc: str) -> Iterator[None]:
    """Inside, operators compute what `soc` does, where SoCs differ."""
    before = _soc.set(soc)
    try:
        yield
    finally:
        _soc.reset(before)


def eager_kernel(operator: Operator, eager: Eager) -> Callable[..., Any]:
    """The kernel under the schema of `eager`. Arguments that it does not have raise ArtifactError if they are given:
    the dispatcher hands on only what differs from its default."""
    where = f"npu::{eager.name}"
    schema = torch._C.parse_schema(where + eager.schema.removeprefix(eager.name))
    names = [argument.name for argument in schema.arguments]
    defaults = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
    # GE writes in place; an operator that does not say so leaves its input as it is
    copies = operator.writes and schema.arguments[0].alias_info is None

    def call(*values: Any, **named: Any) -> Any:
        given = {**dict(zip(names, values, strict=False)), **named}
        if unknown := sorted(given.keys() - {*eager.inputs, *eager.attributes, *eager.only}):
            raise ArtifactError(f"{where}: {', '.join(unknown)} is not supported on CPU")
        arguments = {**defaults, **given}
        for name, value in eager.only.items():
            if arguments[name] != value:
                raise ArtifactError(f"{where}: only {name}={value} is supported on CPU")
        inputs = [_tensor(arguments[name]) if name else None for name in eager.inputs]
        if copies and inputs[0] is not None:
            inputs[0] = inputs[0].clone()
        attributes = eager.adapt({name: arguments[name] for name in eager.attributes})
        outputs = operator.kernel(_soc.get())(EagerCall(where, {**attributes, **eager.fixed}), *inputs)
        return outputs if len(schema.returns) > 1 else outputs[0]

    return call


def _tensor(value: "Tensor | list[int] | None") -> Tensor | None:
    return torch.tensor(value, dtype=torch.int64) if isinstance(value, (list, tuple)) else value


# torch forgets what a library defined when the library is gone
_library: torch.library.Library | None = None
_beside_vendor = False
# models run in threads
_lock = threading.Lock()


def register() -> None:
    """Make torch.ops.npu's operators run on CPU tensors. Does nothing where they already do.

    Without torch_npu they are defined here; beside it, its definitions get a kernel for CPU tensors. Both may happen in
    one process: `vendor_import` takes the definitions back, and the next call adds the kernels. A program that imports
    torch_npu by itself must do so first.
    """
    global _library, _beside_vendor
    with _lock:
        vendor = "torch_npu" in sys.modules
        if _library is not None and _beside_vendor == vendor:
            return
        library = torch.library.Library("npu", "FRAGMENT")
        for operator in OPERATORS.values():
            if operator.eager is not None:
                if not vendor:
                    library.define(operator.eager.schema)
                library.impl(operator.eager.name, eager_kernel(operator, operator.eager), "CPU")
        _library, _beside_vendor = library, vendor
        if not vendor:
            # torch_npu defines the same names, and torch takes a name only once
            before_vendor_import(unregister)


def unregister() -> None:
    """Take the kernels back, and the operators where they are defined here."""
    global _library
    with _lock:
        _library = None
