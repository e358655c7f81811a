"""Reading an offline model (.air) back: its FileConstants are taken from the artifact's files, then it runs on CPU."""

import math
import posixpath
from typing import Any

from torch import Tensor

from ....artifacts.dtypes import BY_GE
from ....artifacts.errors import ArtifactError
from ....artifacts.ge.graph import Node, read_graph
from ....artifacts.ge.ops import FILE_CONSTANT
from ....artifacts.manifest import AirGraph, FileEntry
from ....artifacts.store import Artifact, ge_part
from ...dtypes import torch_dtype
from ..weights import mapped_bytes
from .executor import Executor


def load_air(artifact: Artifact, name: str, check: bool = True) -> Executor:
    """The offline model `name`, ready to run on what manifest.air lists as its inputs, then its caches.

    check: hash the files that its constants are in. Raises ArtifactError if there is no such model, if the GE graph
    was compiled again since, or naming the operator and the file where a constant is not there.
    """
    recorded = _graph(artifact, name)
    where = f"{artifact.path}: {recorded.model.path}"
    graph = read_graph(artifact.read(recorded.model), where)
    files = {entry.path: entry for entry in artifact.manifest.files()}
    constants: dict[str, Tensor] = {}
    checked: set[str] = set()
    for node in graph.nodes:
        if node.op == FILE_CONSTANT:
            entry = _file(node, posixpath.dirname(recorded.model.path), files, where)
            if check and entry.path not in checked:
                artifact.check(entry)
                checked.add(entry.path)
            constants[node.name] = _constant(artifact, node, entry, where)
    return Executor(graph, where, constants, soc=ge_part(artifact.manifest, artifact.path).soc)


def _graph(artifact: Artifact, name: str) -> AirGraph:
    part, ge = artifact.manifest.air, artifact.manifest.ge
    again = f"run `qwen2vl-tc compile {artifact.path} --mode air`"
    recorded = next((graph for graph in part.graphs if graph.name == name), None) if part else None
    if recorded is None:
        raise ArtifactError(f"{artifact.path}: has no offline model {name}; {again}")
    hashes = {graph.name: graph.graph.hash for graph in ge.graphs} if ge else {}
    if hashes.get(name) != recorded.source:
        raise ArtifactError(f"{artifact.path}: {recorded.model.path} was made from another GE graph; {again}")
    return recorded


def _integer(node: Node, name: str, where: str) -> int:
    value = node.attributes.get(name)
    if type(value) is not int or value < 0:
        raise ArtifactError(f"{where}: {node.where}: attribute {name} is {value!r}, expected a number of bytes")
    return value


def _file(node: Node, folder: str, files: dict[str, FileEntry], where: str) -> FileEntry:
    """The artifact's file behind `location`, which counts from the folder of the model."""
    location: Any = node.attributes.get("location")
    if not isinstance(location, str) or not location:
        raise ArtifactError(f"{where}: {node.where} names no file (attribute location)")
    # the manifest decides, not the file system: a path that leaves the artifact is in no manifest
    path = posixpath.normpath(posixpath.join(folder, location))
    if path not in files:
        raise ArtifactError(f"{where}: {node.where} refers to {location}, which is not a file of this artifact")
    return files[path]


def _constant(artifact: Artifact, node: Node, entry: FileEntry, where: str) -> Tensor:
    dtype = BY_GE.get(node.attributes.get("dtype", -1))
    shape = node.attributes.get("shape")
    if dtype is None or not isinstance(shape, list) or any(size < 0 for size in shape):
        raise ArtifactError(f"{where}: {node.where} is a constant of dtype {dtype and dtype.name} and shape {shape}")
    offset, length = _integer(node, "offset", where), _integer(node, "length", where)
    if length != math.prod(shape) * dtype.bytes:
        raise ArtifactError(
            f"{where}: {node.where} of shape {shape} {dtype.name} has {length} bytes, expected "
            f"{math.prod(shape) * dtype.bytes}"
        )
    if offset + length > entry.bytes:
        raise ArtifactError(
            f"{where}: {node.where} ends at byte {offset + length} of {entry.path}, which has {entry.bytes}; "
            f"run `qwen2vl-tc compile {artifact.path} --mode air`"
        )
    data = mapped_bytes(artifact.map(entry, check=False), offset, length)
    return data.view(torch_dtype(dtype.name)).view(shape)
