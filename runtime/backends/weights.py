"""An artifact's weights and constants as tensors over its mapped files."""

import mmap
import warnings

import numpy as np
import torch
from torch import Tensor

from ...artifacts.dtypes import BY_SAFETENSORS
from ...artifacts.errors import ArtifactError
from ...artifacts.manifest import FileEntry
from ...artifacts.safetensors import read_header
from ...artifacts.store import Artifact
from ..dtypes import torch_dtype
from ..models import config_of, family_of


def mapped_tensors(artifact: Artifact, entry: FileEntry, check: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of its mapping; nothing is copied. Raises ArtifactError."""
    where = f"{artifact.path}: {entry.path}"
    mapping = artifact.map(entry, check=check)
    tensors = {}
    for info in read_header(memoryview(mapping), where):
        dtype = BY_SAFETENSORS[info.dtype]
        if dtype.proto is None:
            raise ArtifactError(f"{where}: tensor {info.name} is {info.dtype}, which no graph takes")
        raw = mapped_bytes(mapping, info.begin, info.end - info.begin)
        tensors[info.name] = raw.view(torch_dtype(dtype.name)).view(info.shape)
    return tensors


def mapped_bytes(mapping: mmap.mmap, offset: int, length: int) -> Tensor:
    """A part of a mapped file as bytes; nothing is copied."""
    # torch has no read-only tensors and warns of the mapping being one; nothing writes to a weight
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.frombuffer(mapping, np.uint8, length, offset))


def load_weights(artifact: Artifact, check: bool) -> dict[str, Tensor]:
    """All parameters by name, checked against the model's shapes. Raises ArtifactError for any that does not fit."""
    part = artifact.manifest.weights
    if part is None:
        raise ArtifactError(
            f"{artifact.path}: has no weights (compiled from a config alone); run `qwen2vl-tc convert --src <hf_dir> "
            f"--out {artifact.path}`"
        )
    tensors: dict[str, Tensor] = {}
    config = config_of(artifact.manifest)
    weights = {weight.name: weight for weight in family_of(config).weights(config)}
    for entry in part.files:
        for name, tensor in mapped_tensors(artifact, entry, check).items():
            if name in tensors:
                raise ArtifactError(f"{artifact.path}: {entry.path}: tensor {name} is also in another file")
            if name not in weights:
                raise ArtifactError(f"{artifact.path}: {entry.path}: tensor {name[:80]} is none of the model's")
            tensors[name] = tensor
    for wanted in weights.values():
        tensor = tensors.get(wanted.name)  # type: ignore[assignment]
        dtype = torch_dtype(wanted.dtype(part.dtype, part.bias_dtype))
        if tensor is None or tuple(tensor.shape) != wanted.shape or tensor.dtype != dtype:
            got = "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
            raise ArtifactError(
                f"{artifact.path}: weight {wanted.name}: got {got}, expected {list(wanted.shape)} {dtype}; "
                "convert it again"
            )
    return tensors
