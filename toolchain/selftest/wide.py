"""The reference backend in fp32 throughout, whatever the artifact's dtype: what its weights say without any rounding.

Weights stay mapped as they are stored and are widened where an operator reads them, a block of rows at a time: beside
them stand the activations of one operator, the cache, and the block, however large the model is.
"""

from typing import Any

import torch
from torch import Tensor

from ...artifacts.ge.graph import Node, read_graph
from ...runtime.backends.ge.checks import check_graph
from ...runtime.backends.ge.executor import Executor
from ...runtime.backends.model import KvCache
from ...runtime.backends.reference import ReferenceBackend
from ...runtime.ops import kernel_of
from ...runtime.ops.kernel import Kernel, Outputs
from ...runtime.ops.mat_mul import wide_product

_HALF = (torch.bfloat16, torch.float16)


class WideBackend(ReferenceBackend):
    """GE graphs on CPU, every value between their operators in fp32."""

    def allocate(self, rows: int) -> KvCache:
        # zeros take memory where they are written only: of a long cache the few positions that are used
        size = (self.cache_rows(rows), self.max_length, self._config.text.kv_dim)
        sides = (tuple(torch.zeros(size) for _ in range(self._config.text.num_layers)) for _ in range(2))
        return KvCache(size[0], *sides)

    def load_graph(self, name: str, data: bytes, where: str) -> None:
        graph = read_graph(data, where)
        check_graph(graph, self.binding(name), where)
        self._executors[name] = Executor(graph, where, soc=self._part.soc, lookup=wide_kernel)


def wide_kernel(node: Node, where: str, soc: str) -> Kernel:
    """The operator's own function on widened inputs. Raises what `kernel_of` raises."""
    function = kernel_of(node, where, soc)
    if node.op == "MatMul":
        return _products
    if node.op == "GatherV2":
        # rows of a table that may be gigabytes: what was read is widened, not what was not
        return lambda node, *inputs: tuple(map(_wide, function(node, *inputs)))
    return lambda node, *inputs: tuple(map(_wide, function(node, *map(_wide, inputs))))


def _wide(tensor: Any) -> Any:
    return tensor.float() if isinstance(tensor, Tensor) and tensor.dtype in _HALF else tensor


def _products(node: Node, x1: Tensor, x2: Tensor, bias: Tensor | None = None, *rest: None) -> Outputs:
    """MatMul (see runtime.ops.mat_mul), a block of the weight's rows at a time."""
    x = _wide(x1.t() if node.attributes.get("transpose_x1") else x1)
    weight = x2 if node.attributes.get("transpose_x2") else x2.t()
    out = wide_product(x, weight)
    return (out if bias is None else out.add_(_wide(bias)),)
