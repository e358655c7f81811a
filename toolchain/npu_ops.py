"""CPU kernels of the NPU operators that the model's modules call: with them, the modules run eagerly anywhere.

Each is the GE operator's own reference (runtime.backends.ge): one definition of what an operator computes. Schemas are
torch_npu's; its own definitions are used where it is imported, and these are taken back before it is.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..artifacts.errors import ArtifactError
from ..artifacts.vendor import before_vendor_import
from ..runtime.backends.ge import attention, operators
from ..runtime.backends.ge.graph import Node

_UNLIMITED = 2147483647

# What torch_npu 2.13.0 registers.
SCHEMAS = (
    "npu_linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)",
    "npu_add_layer_norm(Tensor x1, Tensor x2, Tensor gamma, Tensor beta, float epsilon=1e-05, "
    "bool additional_output=False) -> (Tensor, Tensor, Tensor, Tensor)",
    'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor',
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    "npu_fast_gelu(Tensor input) -> Tensor",
    'npu_gelu(Tensor input, *, str approximate="none") -> Tensor',
    "npu_scatter_nd_update(Tensor input, Tensor indices, Tensor updates) -> Tensor",
    "scatter_update_(Tensor(a!) input, Tensor indices, Tensor updates, int axis) -> Tensor(a!)",
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, "
    "Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, "
    "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, "
    "Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None, "
    "Tensor? value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, "
    "Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, "
    "SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, "
    "Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1., int pre_tokens=2147483647, "
    'int next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, '
    "int inner_precise=0, int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, "
    "int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)",
    "npu_prompt_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? pse_shift=None, int[]? actual_seq_lengths=None, Tensor? deq_scale1=None, "
    "Tensor? quant_scale1=None, Tensor? deq_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, "
    "int num_heads=1, float scale_value=1., int pre_tokens=2147483647, int next_tokens=0, "
    'str input_layout="BSH", int num_key_value_heads=0, int[]? actual_seq_lengths_kv=None, int sparse_mode=0) '
    "-> Tensor",
    "npu_incre_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? pse_shift=None, SymInt[]? actual_seq_lengths=None, "
    "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? block_table=None, "
    "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? kv_padding_size=None, int num_heads=1, float scale_value=1., "
    'str input_layout="BSH", int num_key_value_heads=0, int block_size=0, int inner_precise=1) -> Tensor',
)


class _Call(Node):
    """An operator called by itself, with what its reference reads of a graph's node."""

    def __init__(self, op: str, **attributes: Any) -> None:
        super().__init__(op, op, (), (), 0, None)
        # where the base class keeps what it reads from a graph
        self.__dict__["attributes"] = attributes

    @property
    def where(self) -> str:
        return f"npu::{self.op}"


def _attributes(op: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The operator's attributes with their defaults. `given` holds what the caller said otherwise, and only that.

    Raises ArtifactError for an argument that the reference does not have.
    """
    if unknown := sorted(given.keys() - defaults.keys()):
        raise ArtifactError(f"npu::{op}: {', '.join(unknown)} is not supported on CPU")
    return {**defaults, **given}


def _lengths(values: list[int] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int64)


def npu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return operators.mat_mul(_Call("npu_linear", transpose_x2=True), x, weight, bias)[0]


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> operators.Outputs:
    return operators.rms_norm(_Call("npu_rms_norm", epsilon=epsilon), x, gamma)


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> operators.Outputs:
    return operators.add_rms_norm(_Call("npu_add_rms_norm", epsilon=epsilon), x1, x2, gamma)


def npu_add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float = 1e-5, additional_output: bool = False
) -> operators.Outputs:
    if not additional_output:
        raise ArtifactError("npu::npu_add_layer_norm: only additional_output=True is supported on CPU")
    return operators.add_layer_norm(_Call("npu_add_layer_norm", epsilon=epsilon), x1, x2, gamma, beta)


def npu_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, *given: Any) -> Tensor:
    if given not in ((), ("half",)):
        raise ArtifactError(f"npu::npu_rotary_mul: only rotary_mode half is supported on CPU, got {given[0]}")
    return operators.rotary_mul(_Call("npu_rotary_mul"), x, r1, r2)[0]


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    return operators.swi_glu(_Call("npu_swiglu", dim=dim), x)[0]


def npu_fast_gelu(x: Tensor) -> Tensor:
    return operators.fast_gelu(_Call("npu_fast_gelu"), x)[0]


def npu_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return operators.gelu(_Call("npu_gelu", approximate=approximate), x)[0]


def npu_scatter_nd_update(var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Not in place, unlike GE's operator: the graphs have a TensorMove before it."""
    return operators.scatter_nd_update(_Call("npu_scatter_nd_update"), var.clone(), indices, updates)[0]


def scatter_update_(var: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    return operators.scatter(_Call("scatter_update_", reduce="update", axis=axis), var, indices, updates)[0]


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    **given: Any,
) -> operators.Outputs:
    op = "npu_fused_infer_attention_score"
    defaults = {"num_heads": 1, "num_key_value_heads": 0, "scale": 1.0, "input_layout": "BSH", "sparse_mode": 0}
    inputs = (query, key, value, None, atten_mask, _lengths(actual_seq_lengths), _lengths(actual_seq_lengths_kv))
    return attention.fused_infer_attention_score(_Call(op, **_attributes(op, defaults, given)), *inputs)


def npu_prompt_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, atten_mask: Tensor | None = None, **given: Any
) -> Tensor:
    op = "npu_prompt_flash_attention"
    defaults = {
        "num_heads": 1,
        "num_key_value_heads": 0,
        "scale_value": 1.0,
        "input_layout": "BSH",
        "sparse_mode": 0,
        "pre_tokens": _UNLIMITED,
        "next_tokens": 0,
    }
    call = _Call(op, **_attributes(op, defaults, given))
    return attention.prompt_flash_attention(call, query, key, value, None, atten_mask)[0]


def npu_incre_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, actual_seq_lengths: list[int] | None = None, **given: Any
) -> Tensor:
    op = "npu_incre_flash_attention"
    # inner_precise chooses between speed and precision on the device; the reference is always precise
    defaults = {
        "num_heads": 1,
        "num_key_value_heads": 0,
        "scale_value": 1.0,
        "input_layout": "BSH",
        "inner_precise": 1,
    }
    call = _Call(op, **_attributes(op, defaults, given))
    return attention.incre_flash_attention(call, query, key, value, None, None, _lengths(actual_seq_lengths))[0]


KERNELS: dict[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (
        npu_linear,
        npu_rms_norm,
        npu_add_rms_norm,
        npu_add_layer_norm,
        npu_rotary_mul,
        npu_swiglu,
        npu_fast_gelu,
        npu_gelu,
        npu_scatter_nd_update,
        scatter_update_,
        npu_fused_infer_attention_score,
        npu_prompt_flash_attention,
        npu_incre_flash_attention,
    )
}
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
        for schema in SCHEMAS:
            if not vendor:
                library.define(schema)
            name = schema.partition("(")[0]
            library.impl(name, KERNELS[name], "CPU")
        _library, _beside_vendor = library, vendor
        if not vendor:
            # torch_npu defines the same names, and torch takes a name only once
            before_vendor_import(unregister)


def unregister() -> None:
    """Take the kernels back, and the operators where they are defined here."""
    global _library
    with _lock:
        _library = None
