"""CPU kernels of the NPU operators that the model's modules call: with them, the modules run eagerly anywhere.

Each is the GE operator's own reference (runtime.backends.ge): one definition of what an operator computes. Schemas are
torch_npu's; its own definitions are used where it is imported, and these are taken back before it is.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...artifacts.errors import ArtifactError
from ...artifacts.ge.graph import Node
from ...artifacts.host.vendor import before_vendor_import
from ...artifacts.soc import DEFAULT_SOC
from ...runtime.backends.ge.kernel import Outputs
from ...runtime.backends.ge.operators import operator

_UNLIMITED = 2147483647
# npu_prompt_flash_attention has no inner_precise: these ask for 0, the exact mode, with sparse_mode 0 to 4
_EXACT_SPARSE_MODES = range(10, 15)

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

    def __init__(self, op: str, name: str, attributes: dict[str, Any]) -> None:
        super().__init__(name, op, (), (), 0, None)
        # where the base class keeps what it reads from a graph
        self.__dict__["attributes"] = attributes

    @property
    def where(self) -> str:
        return f"npu::{self.name}"


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


def _run(op: str, name: str, *inputs: Tensor | None, **attributes: Any) -> Outputs:
    call = _Call(op, name, attributes)
    return operator(call, "eager", _soc.get())(call, *inputs)


def _attributes(name: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The operator's attributes with their defaults. `given` holds what the caller said otherwise, and only that.

    Raises ArtifactError for an argument that the reference does not have.
    """
    if unknown := sorted(given.keys() - defaults.keys()):
        raise ArtifactError(f"npu::{name}: {', '.join(unknown)} is not supported on CPU")
    return {**defaults, **given}


def _lengths(values: list[int] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int64)


def npu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _run("MatMul", "npu_linear", x, weight, bias, transpose_x2=True)[0]


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Outputs:
    return _run("RmsNorm", "npu_rms_norm", x, gamma, epsilon=epsilon)


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Outputs:
    return _run("AddRmsNorm", "npu_add_rms_norm", x1, x2, gamma, epsilon=epsilon)


def npu_add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float = 1e-5, additional_output: bool = False
) -> Outputs:
    if not additional_output:
        raise ArtifactError("npu::npu_add_layer_norm: only additional_output=True is supported on CPU")
    return _run("AddLayerNorm", "npu_add_layer_norm", x1, x2, gamma, beta, epsilon=epsilon)


def npu_rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    return _run("RotaryMul", "npu_rotary_mul", x, r1, r2, rotate, rotary_mode=rotary_mode)[0]


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    return _run("SwiGlu", "npu_swiglu", x, dim=dim)[0]


def npu_fast_gelu(x: Tensor) -> Tensor:
    return _run("FastGelu", "npu_fast_gelu", x)[0]


def npu_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return _run("GeluV2", "npu_gelu", x, approximate=approximate)[0]


def npu_scatter_nd_update(var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Not in place, unlike GE's operator: the graphs have a TensorMove before it."""
    return _run("ScatterNdUpdate", "npu_scatter_nd_update", var.clone(), indices, updates)[0]


def scatter_update_(var: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    return _run("Scatter", "scatter_update_", var, indices, updates, reduce="update", axis=axis)[0]


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    **given: Any,
) -> Outputs:
    name = "npu_fused_infer_attention_score"
    # inner_precise chooses between speed and precision on the device; the reference is always precise
    defaults = {
        "num_heads": 1,
        "num_key_value_heads": 0,
        "scale": 1.0,
        "input_layout": "BSH",
        "sparse_mode": 0,
        "pre_tokens": _UNLIMITED,
        "next_tokens": _UNLIMITED,
        "inner_precise": 0,
        "softmax_lse_flag": False,
    }
    inputs = (query, key, value, None, atten_mask, _lengths(actual_seq_lengths), _lengths(actual_seq_lengths_kv))
    return _run("FusedInferAttentionScore", name, *inputs, **_attributes(name, defaults, given))


def npu_prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    **given: Any,
) -> Tensor:
    name = "npu_prompt_flash_attention"
    defaults = {
        "num_heads": 1,
        "num_key_value_heads": 0,
        "scale_value": 1.0,
        "input_layout": "BSH",
        "sparse_mode": 0,
        "pre_tokens": _UNLIMITED,
        "next_tokens": 0,
    }
    attributes = _attributes(name, defaults, given)
    if attributes["sparse_mode"] in _EXACT_SPARSE_MODES:
        attributes["sparse_mode"] -= _EXACT_SPARSE_MODES.start
    inputs = (query, key, value, None, atten_mask, _lengths(actual_seq_lengths), _lengths(actual_seq_lengths_kv))
    return _run("PromptFlashAttention", name, *inputs, **attributes)[0]


def npu_incre_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, actual_seq_lengths: list[int] | None = None, **given: Any
) -> Tensor:
    name = "npu_incre_flash_attention"
    # inner_precise as above
    defaults = {
        "num_heads": 1,
        "num_key_value_heads": 0,
        "scale_value": 1.0,
        "input_layout": "BSH",
        "inner_precise": 1,
    }
    inputs = (query, key, value, None, None, _lengths(actual_seq_lengths))
    return _run("IncreFlashAttention", name, *inputs, **_attributes(name, defaults, given))[0]


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
