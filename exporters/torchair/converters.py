"""GE operators that torch-npu offers and torchair has no converter for."""

import functools
from typing import Any


@functools.cache
def register_converters() -> None:
    """Make torchair translate these, as CANN's registry declares them. The device must be open.

    npu_add_layer_norm to AddLayerNorm: x1, x2, gamma, beta, optional bias; outputs y, mean, rstd, x; epsilon,
    additional_output. Tracing records it among the operators to ask CANN for.
    isfinite to IsFinite (x; y), and all over one dimension to ReduceAll (x, axes; y; keep_dims).
    """
    import torch
    import torchair
    from torchair import ge
    from torchair._ge_concrete_graph import auto_generated_ge_raw_ops as raw
    from torchair._ge_concrete_graph.compat_ir import IrDef, ge_op

    definition = (
        IrDef("AddLayerNorm")
        .input("x1", "")
        .input("x2", "")
        .input("gamma", "")
        .input("beta", "")
        .optional_input("bias", "")
        .attr("epsilon", ge.attr.Float(1e-5))
        .attr("additional_output", ge.attr.Bool(False))
        .output("y", "")
        .output("mean", "")
        .output("rstd", "")
        .output("x", "")
    )

    @torchair.register_fx_node_ge_converter(torch.ops.npu.npu_add_layer_norm.default)
    def add_layer_norm(
        x1: Any,
        x2: Any,
        gamma: Any,
        beta: Any,
        epsilon: float = 1e-5,
        additional_output: bool = False,
        meta_outputs: Any = None,
    ) -> Any:
        return ge_op(
            op_type="AddLayerNorm",
            inputs={"x1": x1, "x2": x2, "gamma": gamma, "beta": beta},
            attrs={"epsilon": ge.attr.Float(epsilon), "additional_output": ge.attr.Bool(additional_output)},
            outputs=["y", "mean", "rstd", "x"],
            ir=definition,
        )

    @torchair.register_fx_node_ge_converter(torch.ops.aten.isfinite.default)
    def is_finite(self: Any, meta_outputs: Any = None) -> Any:
        return raw.IsFinite(self)

    @torchair.register_fx_node_ge_converter(torch.ops.aten.all.dim)
    def all_of_dimension(self: Any, dim: int, keepdim: bool = False, meta_outputs: Any = None) -> Any:
        return raw.ReduceAll(self, ge.Const([dim], dtype=ge.DataType.DT_INT32), keep_dims=keepdim)
