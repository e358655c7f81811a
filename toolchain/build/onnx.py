"""`compile --mode onnx`: ONNX models beside the other parts of an artifact, made from its weights."""

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifacts.disk import require_disk
from ...artifacts.dtypes import BY_ONNX
from ...artifacts.errors import MissingDependencyError, TargetError
from ...artifacts.integrity import hash_bytes
from ...artifacts.manifest import FileEntry, Manifest, OnnxGraph, OnnxPart, Tensor, empty_manifest
from ...artifacts.staging import Staging, amend
from ...artifacts.store import Artifact, open_artifact
from ...runtime.models import config_of, family_of
from ...runtime.models.config import ModelConfig
from ..progress import StepProgress, no_steps
from .compile import cache_length

if TYPE_CHECKING:
    from ...exporters.onnx.source import Weights

FOLDER = "graphs/onnx"
WEIGHTS = ("int8", "int4", "fp32", "fp16")
DEFAULT_WEIGHTS = "int8"
# bytes a value of a matrix, with its share of a scale
_VALUE_BYTES = {"int8": 1 + 4 / 256, "int4": 0.5 + 4 / 128, "fp32": 4.0, "fp16": 2.0}
_EMBEDDING = "model.embed_tokens.weight"
_TABLES = (_EMBEDDING, "lm_head.weight")


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

    Needs onnx, and no torch. Memory stays small: one tensor at a time.
    Raises ArtifactError without weights or for damaged ones, TargetError for too little disk, MissingDependencyError.
    """
    require_onnx()
    with amend(artifact, sync=sync) as (staging, _):
        with open_artifact(staging.target) as opened:
            manifest = stage_onnx(staging, opened, options, progress)
        staging.commit(manifest)
    return manifest


def require_onnx() -> None:
    """Raises MissingDependencyError where the package onnx is missing."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingDependencyError("--mode onnx needs the package onnx; pip install 'qwen2vl-tc[onnx]'")


def planned_bytes(config: ModelConfig, weights: str, standard_only: bool = False) -> int:
    """What the models take on the disk, from the shape alone, within a few percent."""
    total = 0.0
    for parameter in family_of(config).weights(config):
        kind = weights
        if len(parameter.shape) == 1:
            kind = "fp32"
        elif weights == "int4" and (parameter.name.startswith("visual.") or parameter.name in _TABLES):
            kind = "int8"
        size = parameter.size * _VALUE_BYTES[kind]
        # standard operators multiply by a quantized table only in another layout than they look it up
        twice = standard_only and kind == "int8" and parameter.name == _EMBEDDING and config.text.tie_word_embeddings
        total += 2 * size if twice else size
    return int(total)


def stage_onnx(
    staging: Staging, artifact: Artifact, options: OnnxOptions, progress: StepProgress = no_steps
) -> Manifest:
    """Stage the models made from the weights of `artifact`; returns its manifest with the new part."""
    from ...exporters.onnx.graph import OPSET
    from ...exporters.onnx.linear import BLOCK_LIMIT, Form
    from ...exporters.onnx.source import Weights

    manifest = artifact.manifest
    config = config_of(manifest)
    options.check(config)
    planned = planned_bytes(config, options.weights, options.standard_only)
    require_disk(staging.path, planned, f"{options.weights} ONNX")
    progress("checking the weights", 0, 3)
    weights = Weights(artifact)
    form = Form(options.weights, options.standard_only)
    made_from = replace(empty_manifest(manifest.name, manifest.model), weights=manifest.weights)
    source = hash_bytes(made_from.to_bytes())
    graphs = []
    for done, name in enumerate(("visual", "text"), start=1):
        progress(name, done, 3)
        graphs.append(_stage_model(staging, name, config, weights, form, source))
    progress("done", 3, 3)
    part = OnnxPart(
        weights=options.weights,
        block_size=BLOCK_LIMIT[form.bits] if form.bits else None,
        standard_only=options.standard_only,
        opset=OPSET,
        max_length=cache_length(options.max_length, config),
        versions={"onnx": importlib.metadata.version("onnx")},
        source=source,
        graphs=tuple(graphs),
        verification="none",
        reports=(),
    )
    return replace(manifest, onnx=part)


def _stage_model(
    staging: Staging, name: str, config: ModelConfig, weights: "Weights", form: Any, source: str
) -> OnnxGraph:
    from ...exporters.onnx.graph import DataFile, Graph
    from ...exporters.onnx.linear import Linears
    from ...exporters.onnx.text import add_text
    from ...exporters.onnx.visual import add_visual

    path = f"{FOLDER}/{name}.onnx.data"
    data = DataFile(staging.file(path))
    try:
        graph = Graph(f"qwen2_vl_{name}", data)
        linears = Linears(graph, weights, form)
        if name == "visual":
            add_visual(graph, linears, config.vision)
        else:
            add_text(graph, linears, config.text)
    finally:
        data.close()
    model = graph.model({"manifest_hash": source, "weights": form.weights})
    return OnnxGraph(
        name=name,
        model=staging.add(f"{FOLDER}/{name}.onnx", model.SerializeToString(deterministic=True)),
        data=FileEntry(path, data.size, data.hash),
        inputs=tuple(_tensors(model.graph.input)),
        outputs=tuple(_tensors(model.graph.output)),
        ops=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        kind = value.type.tensor_type
        yield Tensor(value.name, BY_ONNX[kind.elem_type].name, tuple(d.dim_value or -1 for d in kind.shape.dim))
