"""GE operators that torch-npu offers and torchair has no converter for."""

import functools
from typing import Any


@functools.cache
def register_converters() -> None:
    """Make torchair translate npu_add_layer_norm to AddLayerNorm, as CANN's registry declares it:

    REG_OP(AddLayerNorm): x1, x2, gamma, beta, optional bias; outputs y, mean, rstd, x; epsilon, additional_output.
    The device must be open. Tracing records the operator among those to ask CANN for.
    """
    import torch
    import torchair
    from torchair import ge
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
