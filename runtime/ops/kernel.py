"""What kernels on CPU share: how a call is refused, and the checks that keep a wrong result from being silent.

A kernel is called as f(node, *inputs) with None for an unfed input, and returns the tuple of outputs. fp16 and bf16
values are computed in fp32 and rounded once, at the output, unless the operator's file says otherwise: that is what the
device's kernels do. Torch is imported when a kernel runs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ...artifacts.dtypes import BY_GE
from ...artifacts.errors import ArtifactError, ToolchainError
from ..dtypes import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor as Tensor

    from .base import Call as Call
else:
    Call = Tensor = Any

T = TypeVar("T", bool, int, float, str)
Outputs = tuple[Tensor, ...]
Kernel = Callable[..., Outputs]


def refused(node: Call, reason: str) -> ArtifactError:
    """The error of an operator that does not compute this, to be raised by the caller."""
    return ArtifactError(f"{node.where}: {reason}")


def checked(function: Kernel) -> Kernel:
    """The kernel, raising nothing but ArtifactError, which names the node and what it was given.

    A graph may feed an operator anything, attributes included: torch and Python then raise anything.
    """

    def run(node: Call, *inputs: Tensor | None) -> Outputs:
        if not inputs or inputs[0] is None:
            raise refused(node, "its first input is not fed")
        try:
            return function(node, *inputs)
        except ToolchainError:
            raise
        except Exception as error:
            given = ", ".join("-" if x is None else _described(x) for x in inputs)
            reason = str(error).partition("\n")[0] or "no reason given"
            raise refused(
                node, f"cannot run on ({given}) with {node.attributes}: {type(error).__name__}: {reason}"
            ) from error

    return run


def _described(value: Any) -> str:
    return f"{list(value.shape)} {dtype_name(value)}" if hasattr(value, "shape") else type(value).__name__


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def attribute(node: Call, name: str, default: T) -> T:
    """An attribute of the default's type, which graphs may leave out."""
    value = node.attributes.get(name, default)
    # Python's 1 is as good as 1.0, and a bool is none of them
    if type(value) is type(default) or (type(default) is float and type(value) is int):
        typed: T = value
        return typed
    raise refused(node, f"attribute {name} is {value!r:.80}, expected {type(default).__name__}")


def required(node: Call, name: str, example: T) -> T:
    """An attribute of the example's type that has no default."""
    if name not in node.attributes:
        # not refused by itself: `checked` says what it was given beside
        raise LookupError(f"the attribute {name} is missing")
    return attribute(node, name, example)


def attribute_dtype(node: Call, name: str, number: int) -> "torch.dtype":
    """The dtype that an attribute's value, a ge::DataType, stands for."""
    if number not in BY_GE:
        raise refused(node, f"attribute {name}={number} is not a supported dtype")
    return torch_dtype(BY_GE[number].name)


def unfed(node: Call, inputs: tuple[Tensor | None, ...]) -> None:
    """Refuses inputs that the reference does not know: what they would change is not computed here."""
    if any(x is not None for x in inputs):
        raise refused(node, "an input is fed that is not supported")


def floating(node: Call, *tensors: Tensor | None) -> None:
    """Refuses what is computed in fp32 here and by no kernel of the device: integers would come out rounded."""
    import torch

    for tensor in tensors:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise refused(node, f"got {dtype_name(tensor)}, expected fp32, fp16 or bf16")


def same_dtype(node: Call, *tensors: Tensor) -> None:
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise refused(node, f"its inputs are {', '.join(map(dtype_name, tensors))}, expected one dtype")


def ints(node: Call, tensor: Tensor) -> list[int]:
    """The values of an integer tensor, whatever its shape."""
    if dtype_name(tensor) not in ("int64", "int32"):
        raise refused(node, f"got {dtype_name(tensor)} values, expected int64 or int32")
    return [int(value) for value in tensor.reshape(-1).tolist()]


def axis(node: Call, number: int, x: Tensor) -> int:
    """`number`, which may count from the end, as an axis of x."""
    if not -x.dim() <= number < x.dim():
        raise refused(node, f"axis {number} of a tensor of {x.dim()} dimensions")
    return number % x.dim()
