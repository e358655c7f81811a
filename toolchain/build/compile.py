"""`compile --mode dynamo`: trace the graphs for a target and put them into an artifact, with or without weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...artifacts.dtypes import BY_TORCH, stored_name
from ...artifacts.errors import ArtifactError, ConfigError, TargetError
from ...artifacts.ge.binding import CONSTANT, LENGTHS, PARAMETER, Binding
from ...artifacts.host.vendor import no_lost_interrupt
from ...artifacts.manifest import (
    DTYPES,
    OPERATORS,
    VISUAL_ATTENTION,
    FileEntry,
    GePart,
    Graph,
    Manifest,
    OperatorNote,
    Tensor,
    empty_manifest,
)
from ...artifacts.safetensors import header_bytes
from ...artifacts.schema import parse_json
from ...artifacts.soc import DEFAULT_SOC
from ...artifacts.staging import Staging, amend, stage
from ...runtime.models import config_from_hf, config_of, family_of, to_plain
from ...runtime.models.base import FP32, GraphOptions, GraphSpec
from ...runtime.models.config import ModelConfig
from ..progress import StepProgress, no_steps

if TYPE_CHECKING:
    from ...exporters.torchair.trace import TracedGraph
    from ..check.check import GraphCheck

_DEFAULT_MAX_LENGTH = 8192
FOLDER = "graphs/ge"


def cache_length(max_length: int | None, config: ModelConfig) -> int:
    """Positions of the KV cache: what was asked for, or by default 8192, but no more than the model was made for.

    Raises TargetError.
    """
    most = config.text.max_position_embeddings
    length = min(_DEFAULT_MAX_LENGTH, most) if max_length is None else max_length
    if not 2 <= length <= most:
        raise TargetError(f"--max-length {length}: expected 2 to {most}, the model's max_position_embeddings")
    return length


@dataclass(frozen=True)
class CompileOptions:
    """What the graphs are compiled for. dtype None: that of the artifact's weights, or bf16 where there are none;
    max_length None: see cache_length.
    """

    soc: str = DEFAULT_SOC
    max_length: int | None = None
    batches: tuple[int, ...] = (1,)
    dtype: str | None = None
    dump_pbtxt: bool = False
    operators: str = "fused"
    visual_attention: str = "segments"
    passes: tuple[str, ...] | None = None
    # which graphs: a whole artifact has all
    kinds: tuple[str, ...] = ("visual", "prefill", "decode")
    # releases that must admit the graphs
    cann: tuple[str, ...] = ()

    def graphs(self, config: ModelConfig) -> GraphOptions:
        """The forms and fixed sizes of a model's graphs."""
        return GraphOptions(cache_length(self.max_length, config), self.operators, self.visual_attention, self.batches)

    def check(self, config: ModelConfig) -> None:
        """Raises TargetError for values that no graph can be made for."""
        if not self.batches or any(not 1 <= batch <= 256 for batch in self.batches):
            raise TargetError(f"--batch {','.join(map(str, self.batches))}: expected sizes from 1 to 256")
        if len(set(self.batches)) != len(self.batches):
            raise TargetError(f"--batch {','.join(map(str, self.batches))}: a size is given twice")
        cache_length(self.max_length, config)
        for option, value, known in (
            ("--operators", self.operators, OPERATORS),
            ("--visual-attention", self.visual_attention, VISUAL_ATTENTION),
        ):
            if value not in known:
                raise TargetError(f"{option} {value}: expected one of {', '.join(known)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise TargetError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")
        if self.dtype is not None:
            self.check_heads(config, self.dtype)

    def check_heads(self, config: ModelConfig, dtype: str) -> None:
        """Raises TargetError for heads that no CANN takes in `dtype`."""
        from ..check.target import check_head_dims

        check_head_dims(config, dtype, self.operators, "TND" if self.visual_attention == "tnd" else "BSH")


def compile_artifact(
    artifact: Path, options: CompileOptions, progress: StepProgress = no_steps, *, sync: bool = True
) -> Manifest:
    """Replace the GE graphs of the artifact at `artifact`; its weights and processor files stay as they are."""
    with amend(artifact, sync=sync) as (staging, base):
        manifest = stage_graphs(staging, base, options, progress)
        staging.commit(manifest)
    return manifest


def compile_config(
    config_file: Path, out: Path, options: CompileOptions, progress: StepProgress = no_steps, *, sync: bool = True
) -> Manifest:
    """Compile from a config.json alone, before or without any weights.

    Raises ConfigError for an unusable config and ArtifactError if `out` holds another model's artifact.
    """
    try:
        data = config_file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{config_file}: cannot be read: {error.strerror}") from error
    try:
        plain = parse_json(data, str(config_file))
    except ArtifactError as error:
        raise ConfigError(str(error)) from error
    config = config_from_hf(plain)
    with stage(out, sync=sync, resumes=False) as staging:
        base = staging.base or empty_manifest(Path(out).name.removesuffix(".artifact"), to_plain(config))
        if base.model != to_plain(config):
            raise ArtifactError(f"{out}: holds a model of another shape than {config_file}; use another --out")
        manifest = stage_graphs(staging, base, options, progress)
        staging.commit(manifest)
    return manifest


def stage_graphs(
    staging: Staging, manifest: Manifest, options: CompileOptions, progress: StepProgress = no_steps
) -> Manifest:
    """Trace all graphs of the manifest's model into the staged tree; returns the manifest with the new part."""
    config = config_of(manifest)
    options.check(config)
    weights_dtype = manifest.weights.dtype if manifest.weights else None
    dtype = options.dtype or weights_dtype or "bf16"
    if weights_dtype not in (None, dtype):
        raise ArtifactError(
            f"{staging.target}: its weights are {weights_dtype}, the graphs would be {dtype}; compile with --dtype "
            f"{weights_dtype}, or build another artifact with --dtype {dtype}"
        )
    options.check_heads(config, dtype)
    if manifest.weights and manifest.weights.bias_dtype != FP32:
        raise ArtifactError(
            f"{staging.target}: an earlier release converted its weights, whose biases cost the device a Cast each; "
            f"run `qwen2vl-tc convert --src <hf_dir> --out {staging.target}` first"
        )
    graph_options = options.graphs(config)
    specs = [spec for spec in family_of(config).graphs(config, graph_options) if spec.kind in options.kinds]
    total = 2 + len(specs)
    progress("opening the device", 0, total)
    from ...exporters.torchair.device import open_device
    from ..check.check import admitted
    from ..check.target import require_admitted

    device = open_device(options.soc)
    from ...exporters.torchair.trace import trace
    from ..models.build import empty_model, example_arguments

    if not device.emulated:
        _check_room(manifest, options, dtype)
    progress("constants", 1, total)
    constants = _stage_constants(staging, config, options, dtype)
    graphs: list[Graph] = []
    checks: list[GraphCheck] = []
    notes: set[OperatorNote] = set()
    # on the emulated NPU these pages are never touched: a 72B model costs no memory
    model = empty_model(config, graph_options, dtype).to_empty(device="npu").requires_grad_(False)
    for spec in specs:
        progress(spec.name, 2 + len(graphs), total)
        with no_lost_interrupt():
            traced = trace(spec, getattr(model, spec.method), example_arguments(spec, config, dtype, "npu"))
            _check_binding(traced.binding, config, dtype)
            graph, check = _stage_graph(staging, traced, spec, options, config)
        graphs.append(graph)
        checks.append(check)
        notes.update(traced.notes)
    require_admitted(checks, options.cann)
    progress("done", total, total)
    return manifest.with_graphs(
        GePart(
            soc=device.soc,
            operators=options.operators,
            visual_attention=options.visual_attention,
            dtype=dtype,
            max_length=cache_length(options.max_length, config),
            batches=options.batches,
            passes=_passes(options),
            versions={"torch": device.torch, "torch-npu": device.torch_npu, "cann": device.cann_version or "none"},
            limits=tuple(_limits(dtype)),
            operator_notes=tuple(sorted(notes, key=lambda note: (note.operator, note.inputs, note.attributes))),
            admitted=admitted(checks),
            constants=constants,
            graphs=tuple(graphs),
        )
    )


def _check_room(manifest: Manifest, options: CompileOptions, dtype: str) -> None:
    """On a real NPU the empty modules take real memory: refuse before the allocator does."""
    import torch_npu

    from ...runtime.memory import memory_for

    free, _ = torch_npu.npu.mem_get_info()
    # all signatures' example caches live at once: one row of prefill's and every batch of decode's
    rows = 1 + sum(options.batches)
    needed = memory_for(manifest, dtype, cache_length(options.max_length, config_of(manifest)), (rows,)).total
    if needed > free:
        raise TargetError(
            f"{manifest.name}: tracing on this NPU needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; compile "
            "on a machine without an NPU, where the modules cost no memory"
        )


def _limits(dtype: str) -> Iterator[str]:
    """Where the documentation of torch-npu 2.13.0 does not cover what the graphs ask for."""
    if dtype == "fp32":
        yield "fp32: the NPU's attention takes bf16 and fp16; these graphs are for CPU"


def _passes(options: CompileOptions) -> tuple[str, ...]:
    from ...exporters.torchair.passes import PASSES

    names = tuple(PASSES) if options.passes is None else options.passes
    if unknown := [name for name in names if name not in PASSES]:
        raise TargetError(f"--passes {', '.join(unknown)}: unknown; there are {', '.join(PASSES)}")
    return names


def _stage_graph(
    staging: Staging, traced: "TracedGraph", spec: GraphSpec, options: CompileOptions, config: ModelConfig
) -> "tuple[Graph, GraphCheck]":
    from google.protobuf import text_format

    from ...artifacts.ge.graph import read_graph
    from ...exporters.torchair.passes import count_ops, run_passes
    from ..check.check import check_graph

    model, binding = traced.model, traced.binding
    graph = model.graph[0]
    run_passes(graph, _passes(options))
    folder = f"{FOLDER}/{binding.graph}"
    # map fields have no order of their own: without this, equal graphs would differ in bytes
    data = model.SerializeToString(deterministic=True)
    readable = None
    if options.dump_pbtxt:
        readable = staging.add(f"{folder}/graph.pbtxt", text_format.MessageToString(model).encode())
    where = f"{folder}/graph.pb"
    check = check_graph(
        read_graph(data, where), binding, config, spec, cache_length(options.max_length, config), options.soc, where
    )
    staged = Graph(
        name=binding.graph,
        graph=staging.add(where, data),
        binding=staging.add(f"{folder}/binding.json", binding.to_bytes()),
        readable=readable,
        inputs=tuple(
            Tensor(bound.name if bound.index is None else f"{bound.name}[{bound.index}]", bound.dtype, bound.shape)
            for bound in binding.inputs
            if bound.kind not in (PARAMETER, CONSTANT)
        ),
        outputs=tuple(
            Tensor(made.name, made.dtype, output.bound)
            for made, output in zip(binding.outputs, spec.outputs, strict=True)
        ),
        ops=count_ops(graph),
    )
    return staged, check


def _check_binding(binding: Binding, config: ModelConfig, dtype: str) -> None:
    """Every parameter that a graph is bound to must be one that the converter writes, with the same shape and dtype."""
    weights = {weight.name: weight for weight in family_of(config).weights(config)}
    for bound in binding.inputs:
        if bound.kind == PARAMETER:
            wanted = weights.get(bound.name)
            if wanted is None or (wanted.shape, wanted.dtype(dtype)) != (bound.shape, bound.dtype):
                raise TargetError(f"{binding.graph}: parameter {bound.name} {list(bound.shape)} is not in the weights")
        if bound.kind == LENGTHS and not bound.host:
            raise TargetError(f"{binding.graph}: {bound.name} must be a host input")


def _stage_constants(staging: Staging, config: ModelConfig, options: CompileOptions, dtype: str) -> FileEntry:
    import torch

    from ..models.build import constant_tables

    tables = constant_tables(config, options.graphs(config), dtype)
    dtypes = {name: BY_TORCH[str(table.dtype).removeprefix("torch.")].name for name, table in tables.items()}
    header = header_bytes((name, stored_name(dtypes[name]), tuple(t.shape)) for name, t in tables.items())
    body = b"".join(table.view(torch.uint8).numpy().tobytes() for table in tables.values())
    return staging.add(f"{FOLDER}/constants.safetensors", header + body)
