"""A family's modules without memory, their constants, and example arguments to trace them with."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.dtypes import torch_dtype
from ...runtime.models import family_of
from ...runtime.models.base import MODEL_DTYPE, Argument, GraphOptions, GraphSpec, visual_sizes
from ...runtime.models.config import ModelConfig

# GE's hints for its first tiling: any distinct numbers above 1 trace the same graph.
_PROMPT = {"tokens": 367, "image_tokens": 342}
_SEGMENTS, _MERGED = 3, 116


def modules_of(config: ModelConfig) -> Any:
    """The module with the torch modules of a config's family."""
    family = family_of(config)
    # beside this one, unless the family says where
    return importlib.import_module(family.modules or f"{__package__}.{family.name}")


def constant_tables(config: ModelConfig, options: GraphOptions, dtype: str) -> dict[str, Tensor]:
    """The tables that the graphs read, by name: numbers in `dtype`, indices and masks as they are."""
    made: dict[str, Tensor] = modules_of(config).tables(config, options)
    # what is floating here is fp32
    return {
        name: (table.to(torch_dtype(dtype)) if table.is_floating_point() else table).contiguous()
        for name, table in made.items()
    }


def empty_model(config: ModelConfig, options: GraphOptions, dtype: str) -> nn.Module:
    """The model without memory: its parameters are on torch's meta device."""
    tables = constant_tables(config, options, dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(dtype))
    try:
        with torch.device("meta"):
            model: nn.Module = modules_of(config).MODULES(config, options, tables).eval()
    finally:
        torch.set_default_dtype(default)
    return model


def example_arguments(spec: GraphSpec, config: ModelConfig, dtype: str, device: str) -> dict[str, Any]:
    """What a graph's method is traced with: tensors whose fixed sizes are marked static, and lists of integers."""
    segments = [_MERGED * config.vision.spatial_merge_size**2] * _SEGMENTS
    sizes = {**visual_sizes(family_of(config), config, segments), **_PROMPT}
    return {each.name: _example(each, sizes, spec.layers, dtype, device) for each in spec.arguments}


def _example(argument: Argument, sizes: Mapping[str, int], layers: int, dtype: str, device: str) -> Any:
    shape = [sizes[size] if isinstance(size, str) else size for size in argument.shape]
    if argument.kind == "lengths":
        return [sizes["tokens"] + 2 * i for i in range(shape[0])]
    made_in = torch_dtype(dtype if argument.dtype == MODEL_DTYPE else argument.dtype)
    tensors = []
    for _ in range(layers if argument.kind == "cache" else 1):
        tensor = torch.empty(shape, dtype=made_in, device=device)
        for axis in range(len(shape)):
            if axis not in argument.free:
                torch._dynamo.mark_static(tensor, axis)
        tensors.append(tensor)
    return tensors if argument.kind == "cache" else tensors[0]
