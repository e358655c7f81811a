"""Artifacts with other numbers in them, whose hashes are right."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from qwen2vl_tc.artifacts.integrity import hash_bytes
from qwen2vl_tc.artifacts.manifest import FileEntry, Manifest
from qwen2vl_tc.artifacts.store import read_manifest

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, Manifest], None]
Arrays = dict[str, NDArray[Any]]


def rewritten(artifact: Path, entry: FileEntry, data: bytes) -> FileEntry:
    # a file of its own: what was copied may be a link
    (artifact / entry.path).unlink()
    (artifact / entry.path).write_bytes(data)
    return FileEntry(entry.path, len(data), hash_bytes(data))


def altered(artifact: Path, out: Path, change: Change) -> Path:
    """A copy with other weights or constants, whose hashes are right."""
    shutil.copytree(artifact, out)
    manifest = read_manifest(out)
    assert manifest.weights and manifest.ge
    changed = []

    def alter(entry: FileEntry) -> FileEntry:
        tensors = {name: tensor.clone() for name, tensor in load_file(out / entry.path).items()}
        before = dict(tensors)
        change(tensors, manifest)
        if all(tensor is before[name] for name, tensor in tensors.items()):
            return entry
        changed.append(entry.path)
        save_file(tensors, out.parent / "new.safetensors")
        return rewritten(out, entry, (out.parent / "new.safetensors").read_bytes())

    weights = dataclasses.replace(manifest.weights, files=tuple(map(alter, manifest.weights.files)))
    ge = dataclasses.replace(manifest.ge, constants=alter(manifest.ge.constants))
    assert changed, "nothing was altered"
    (out / "manifest.json").write_bytes(dataclasses.replace(manifest, weights=weights, ge=ge).to_bytes())
    return out


def altered_onnx(artifact: Path, out: Path, name: str, change: Callable[[Arrays], None]) -> Path:
    """A copy whose ONNX model `name` has other tensors: change gets those of its data file, to be written to."""
    import onnx

    shutil.copytree(artifact, out)
    manifest = read_manifest(out)
    assert manifest.onnx
    graphs = {graph.name: graph for graph in manifest.onnx.graphs}
    graph = graphs[name]
    data = bytearray((out / graph.data.path).read_bytes())
    arrays: Arrays = {}
    for tensor in onnx.load(out / graph.model.path, load_external_data=False).graph.initializer:
        if place := {entry.key: entry.value for entry in tensor.external_data}:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            count = int(place["length"]) // dtype.itemsize
            arrays[tensor.name] = np.frombuffer(data, dtype, count, int(place["offset"])).reshape(tensor.dims)
    change(arrays)
    graphs[name] = dataclasses.replace(graph, data=rewritten(out, graph.data, bytes(data)))
    part = dataclasses.replace(manifest.onnx, graphs=tuple(graphs.values()))
    (out / "manifest.json").write_bytes(dataclasses.replace(manifest, onnx=part).to_bytes())
    return out
