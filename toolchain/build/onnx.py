"""`compile --mode onnx`: an artifact's graphs translated to ONNX models beside its other parts, its weights in them."""

import importlib.metadata
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifacts.disk import require_disk
from ...artifacts.dtypes import BY_ONNX
from ...artifacts.errors import ArtifactError, MissingDependencyError, TargetError
from ...artifacts.ge.binding import binding_from_bytes
from ...artifacts.ge.graph import read_graph
from ...artifacts.host.process import prepare_process
from ...artifacts.integrity import hash_bytes
from ...artifacts.manifest import FileEntry, Manifest, OnnxGraph, OnnxPart, Tensor, empty_manifest
from ...artifacts.staging import Staging, amend, stage
from ...artifacts.store import Artifact, open_artifact
from ...runtime.models import config_of, family_of, graphs_of, spec_of
from ...runtime.models.base import GraphOptions, Role
from ...runtime.models.config import ModelConfig
from ..progress import StepProgress, no_steps
from .compile import CompileOptions, cache_length, stage_graphs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...exporters.onnx.linear import OnnxForm
    from ...exporters.onnx.source import Weights

FOLDER = "graphs/onnx"
# the models, by the graph that each is a translation of
MODELS = {"visual": "visual", "text": "prefill"}
WEIGHTS = ("int8", "int4", "fp32", "fp16")
DEFAULT_WEIGHTS = "int8"
# bytes a value of a matrix, with its share of a scale
_VALUE_BYTES = {"int8": 1 + 4 / 256, "int4": 0.5 + 4 / 128, "fp32": 4.0, "fp16": 2.0}


@dataclass(frozen=True)
class OnnxOptions:
    """What to export. standard_only: no operator outside the ONNX standard. max_length: see cache_length."""

    weights: str = DEFAULT_WEIGHTS
    standard_only: bool = False
    max_length: int | None = None

    def check(self, config: ModelConfig) -> None:
        """Raises TargetError for values that no model can be made for."""
        if self.weights not in WEIGHTS:
            raise TargetError(f"--weights {self.weights}: expected one of {', '.join(WEIGHTS)}")
        cache_length(self.max_length, config)


def export_onnx(
    artifact: Path, options: OnnxOptions, progress: StepProgress = no_steps, *, sync: bool = True
) -> Manifest:
    """Make the ONNX models of the artifact at `artifact` anew; all its other files stay as they are.

    Memory stays small: one tensor at a time.
    Raises ArtifactError without weights or for damaged ones, TargetError for too little disk, MissingDependencyError.
    """
    require_onnx()
    with amend(artifact, sync=sync) as (staging, _), open_artifact(staging.target) as opened:
        manifest = stage_onnx(staging, opened, options, progress)
        staging.commit(manifest)
    return manifest


def require_onnx() -> None:
    """Raises MissingDependencyError where onnx or torch is missing."""
    for package, extra in (("onnx", "onnx"), ("torch", "compile")):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"--mode onnx needs the package {package}; pip install 'qwen2vl-tc[{extra}]'")


def planned_bytes(config: ModelConfig, weights: str, standard_only: bool = False) -> int:
    """What the models take on the disk, from the shape alone, within a few percent."""
    total = 0.0
    for weight in family_of(config).weights(config):
        kind = weights
        if len(weight.shape) == 1:
            kind = "fp32"
        elif weights == "int4" and (weight.name.startswith("visual.") or weight.role in (Role.EMBEDDING, Role.HEAD)):
            kind = "int8"
        size = weight.size * _VALUE_BYTES[kind]
        # standard operators multiply by a quantized table only in another layout than they look it up
        tied = weight.role is Role.EMBEDDING and config.text.tie_word_embeddings
        twice = standard_only and kind == "int8" and tied
        total += 2 * size if twice else size
    return int(total)


def stage_onnx(
    staging: Staging, artifact: Artifact, options: OnnxOptions, progress: StepProgress = no_steps
) -> Manifest:
    """Stage the models made from the weights of `artifact`; returns its manifest with the new part."""
    from ...exporters.onnx.linear import BLOCK_LIMIT, OnnxForm
    from ...exporters.onnx.source import Weights
    from ...exporters.onnx.writer import OPSET

    manifest = artifact.manifest
    config = config_of(manifest)
    options.check(config)
    planned = planned_bytes(config, options.weights, options.standard_only)
    require_disk(staging.path, planned, f"{options.weights} ONNX")
    total = 2 + len(MODELS)
    form = OnnxForm(options.weights, options.standard_only)
    length = cache_length(options.max_length, config)
    made_from = replace(empty_manifest(manifest.name, manifest.model), weights=manifest.weights)
    source = hash_bytes(made_from.to_bytes())
    graphs = []
    with _traced(artifact, length, lambda step: progress(step, 0, total)) as traced:
        # gigabytes are hashed: after what may be refused at once
        progress("checking the weights", 1, total)
        weights = Weights(artifact)
        constants = _constants(config, length)
        for done, name in enumerate(MODELS, start=2):
            progress(name, done, total)
            graphs.append(_stage_model(staging, name, traced, weights, form, constants, source))
    progress("done", total, total)
    part = OnnxPart(
        weights=options.weights,
        block_size=BLOCK_LIMIT[form.bits] if form.bits else None,
        standard_only=options.standard_only,
        opset=OPSET,
        max_length=length,
        versions={"onnx": importlib.metadata.version("onnx")},
        source=source,
        graphs=tuple(graphs),
        verification="none",
        reports=(),
    )
    return replace(manifest, onnx=part)


@contextmanager
def _traced(artifact: Artifact, max_length: int, report: Callable[[str], None]) -> Iterator[Artifact]:
    """The artifact itself, where this release traced its graphs in the form that is translated; otherwise one beside
    it with nothing but such graphs, which is gone afterwards."""
    manifest = artifact.manifest
    wanted = GraphOptions(max_length)
    if (ge := manifest.ge) and replace(GraphOptions.of(ge), max_length=max_length, batches=wanted.batches) == wanted:
        yield artifact
        return
    with tempfile.TemporaryDirectory(prefix="qwen2vl-tc-") as folder:
        target = Path(folder) / "traced.artifact"
        options = CompileOptions(dtype="fp32", max_length=max_length, kinds=tuple(MODELS.values()))
        with stage(target, sync=False, resumes=False) as staging:
            empty = empty_manifest(manifest.name, manifest.model)
            staging.commit(stage_graphs(staging, empty, options, lambda step, done, total: report(f"tracing: {step}")))
        with open_artifact(target) as traced:
            yield traced


def _constants(config: ModelConfig, max_length: int) -> "dict[str, NDArray[Any]]":
    """The tables that the graphs read, in fp32 and for this length: an artifact's own are rounded to its dtype."""
    prepare_process()
    from ..models.build import constant_tables

    tables = constant_tables(config, GraphOptions(max_length), "fp32")
    return {name: table.numpy() for name, table in tables.items()}


def _stage_model(
    staging: Staging,
    name: str,
    traced: Artifact,
    weights: "Weights",
    form: "OnnxForm",
    constants: "dict[str, NDArray[Any]]",
    source: str,
) -> OnnxGraph:
    from ...exporters.onnx.linear import Linears
    from ...exporters.onnx.operators import OPERATORS
    from ...exporters.onnx.translation import Translation
    from ...exporters.onnx.writer import DataFile, ModelWriter
    from ...runtime.backends.ge.checks import check_binding, check_graph
    from ...runtime.backends.onnx_check import check_model, expected_tensors
    from ..check.attributes import nonsense

    part = traced.manifest.ge
    entry = next((graph for graph in part.graphs if graph.name == MODELS[name]), None) if part else None
    if part is None or entry is None:
        raise ArtifactError(f"{traced.path}: has no graph {MODELS[name]}; run `qwen2vl-tc compile {traced.path}` first")
    config, where = config_of(traced.manifest), f"{traced.path}: {entry.graph.path}"
    graph = read_graph(traced.read(entry.graph), where)
    binding = binding_from_bytes(traced.read(entry.binding), f"{traced.path}: {entry.binding.path}")
    # as whoever runs them checks them
    check_binding(binding, spec_of(graphs_of(config, part), entry.name, where), part, where)
    check_graph(graph, binding, where)
    for node, _, problem in nonsense(graph.nodes):
        raise ArtifactError(f"{where}: {node}: {problem}; compile the artifact again")
    path = f"{FOLDER}/{name}.onnx.data"
    data = DataFile(staging.file(path))
    try:
        writer = ModelWriter(name, data)
        interface = expected_tensors(name, config, form.standard_only)
        Translation(graph, binding, Linears(writer, weights, form), constants, *interface, OPERATORS).run()
    finally:
        data.close()
    model = writer.model({"manifest_hash": source, "weights": form.weights})
    written = model.SerializeToString(deterministic=True)
    made = OnnxGraph(
        name=name,
        model=staging.add(f"{FOLDER}/{name}.onnx", written),
        data=FileEntry(path, data.size, data.hash),
        inputs=tuple(_tensors(model.graph.input)),
        outputs=tuple(_tensors(model.graph.output)),
        ops=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
    )
    # what the runtime would refuse is not written
    check_model(written, made, config, form.standard_only, f"{FOLDER}/{name}.onnx")
    return made


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        kind = value.type.tensor_type
        yield Tensor(value.name, BY_ONNX[kind.elem_type].name, tuple(d.dim_value or -1 for d in kind.shape.dim))
