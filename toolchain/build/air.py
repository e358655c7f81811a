"""`compile --mode air`: offline models for ATC beside the GE graphs of an artifact, over the same files of weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...artifacts.dtypes import stored_name
from ...artifacts.errors import ArtifactError
from ...artifacts.ge.binding import CONSTANT, PARAMETER, Binding, binding_from_bytes
from ...artifacts.manifest import AirGraph, AirPart, FileEntry, GePart, Graph, Manifest, WeightsPart
from ...artifacts.safetensors import TensorInfo, read_header
from ...artifacts.staging import Staging, amend
from ...artifacts.store import Artifact, ge_part, open_artifact
from ...exporters.torchair.air import FileSlice, atc_command, convert_to_air
from ..progress import StepProgress, no_steps

FOLDER = "graphs/air"


def export_air(artifact: Path, progress: StepProgress = no_steps, *, sync: bool = True) -> Manifest:
    """Make the offline models of the artifact at `artifact` anew; all its other files stay as they are.

    Needs neither a device nor torch: the GE graphs that are there are converted. Raises ArtifactError if there are no
    graphs or no weights, and naming the file or the tensor where one is missing, damaged or does not fit.
    """
    with amend(artifact, sync=sync) as (staging, _):
        with open_artifact(staging.target) as opened:
            manifest = stage_air(staging, opened, progress)
        staging.commit(manifest)
    return manifest


def stage_air(staging: Staging, artifact: Artifact, progress: StepProgress = no_steps) -> Manifest:
    """Stage the .air files made from the graphs of `artifact`; returns its manifest with the new part."""
    part, weights = _parts(artifact)
    # the files are hashed here: what ATC reads from them later, nobody checks
    total = len(part.graphs) + 1
    progress("weights", 0, total)
    tensors = {
        info.name: (entry, info) for entry in (*weights.files, part.constants) for info in _tensors(artifact, entry)
    }
    graphs = []
    for done, graph in enumerate(part.graphs, start=1):
        progress(graph.name, done, total)
        graphs.append(_stage_graph(staging, artifact, graph, tensors))
    progress("done", total, total)
    return replace(artifact.manifest, air=AirPart(tuple(graphs)))


def atc_commands(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The folder to be in, relative to the artifact, and ATC's command line, for every offline model.

    All models go to one folder outside the artifact, so that they share the files of --external_weight.
    """
    if manifest.air is None or manifest.ge is None:
        raise ArtifactError(f"{manifest.name}: has no offline models; run `qwen2vl-tc compile <artifact> --mode air`")
    for graph in manifest.air.graphs:
        output = f"../../../../{manifest.name}.om/{graph.name}"
        yield f"{FOLDER}/{graph.name}", atc_command(graph.name, graph.inputs, manifest.ge.soc, output)


def _parts(artifact: Artifact) -> tuple[GePart, WeightsPart]:
    weights = artifact.manifest.weights
    if weights is None:
        raise ArtifactError(
            f"{artifact.path}: has no weights (compiled from a config alone), and offline models refer to them; run "
            f"`qwen2vl-tc convert --src <hf_dir> --out {artifact.path}`, then `qwen2vl-tc compile {artifact.path} "
            "--mode air`"
        )
    return ge_part(artifact.manifest, artifact.path), weights


def _tensors(artifact: Artifact, entry: FileEntry) -> list[TensorInfo]:
    return read_header(memoryview(artifact.map(entry)), f"{artifact.path}: {entry.path}")


def _stage_graph(
    staging: Staging, artifact: Artifact, graph: Graph, tensors: dict[str, tuple[FileEntry, TensorInfo]]
) -> AirGraph:
    # the runtime's proto, not the wheel's: this works where torch-npu is not installed
    from ...artifacts.ge.proto import message_class, parse_graph

    where = f"{artifact.path}: {graph.graph.path}"
    binding = binding_from_bytes(artifact.read(graph.binding), f"{artifact.path}: {graph.binding.path}")
    model = message_class("ModelDef")()
    model.graph.append(parse_graph(artifact.read(graph.graph), where))
    path = f"{FOLDER}/{graph.name}/{graph.name}.air"
    inputs = convert_to_air(model, binding, _slices(artifact, binding, tensors), path)
    # map fields have no order of their own: without this, equal models would differ in bytes
    data = model.SerializeToString(deterministic=True)
    return AirGraph(
        graph.name, graph.graph.hash, staging.add(path, data), inputs.arguments, inputs.caches, graph.outputs
    )


def _slices(
    artifact: Artifact, binding: Binding, tensors: dict[str, tuple[FileEntry, TensorInfo]]
) -> dict[str, FileSlice]:
    slices = {}
    for bound in binding.inputs:
        if bound.kind in (PARAMETER, CONSTANT):
            if bound.name not in tensors:
                raise ArtifactError(
                    f"{artifact.path}: {bound.kind} {bound.name} of graph {binding.graph} is in no file"
                )
            entry, info = tensors[bound.name]
            if (info.dtype, info.shape) != (stored_name(bound.dtype), bound.shape):
                raise ArtifactError(
                    f"{artifact.path}: {entry.path}: {bound.name} is {list(info.shape)} {info.dtype}, graph "
                    f"{binding.graph} was compiled for {list(bound.shape)} {bound.dtype}; compile the artifact again"
                )
            slices[bound.name] = FileSlice(entry.path, info.begin, info.end - info.begin)
    return slices
