"""The toy family's modules: see helpers.toy."""

from typing import ClassVar

from torch import nn

from qwen2vl_tc.toolchain.models import qwen2_vl
from qwen2vl_tc.toolchain.models.decoder import MlpOf, NormOf
from qwen2vl_tc.toolchain.models.layers import LayerNorm, Mlp, gelu

tables = qwen2_vl.tables


def gelu_mlp(width: int, inner: int) -> nn.Module:
    return Mlp(width, inner, gelu)


class Toy(qwen2_vl.Qwen2VL):
    norm_of: ClassVar[NormOf] = LayerNorm
    mlp_of: ClassVar[MlpOf] = gelu_mlp


MODULES = Toy
