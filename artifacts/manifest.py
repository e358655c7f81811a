"""manifest.json: what is in an artifact, of which model, for which target, and the hash of every file."""

import re
from dataclasses import dataclass, replace
from typing import Any

from .errors import ArtifactError
from .schema import dump_json, from_plain, parse_json

SCHEMA_VERSION = 3
# The fields that each older schema lacks, by the object that holds them ("" is the manifest); read as null.
_ADDED_SINCE: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"": ("onnx", "selftest"), "weights": ("bias_dtype",), "ge": ("admitted",)},
    2: {"": ("selftest",), "weights": ("bias_dtype",), "ge": ("admitted",)},
}
HASH_NAME = "blake3"
MANIFEST_NAME = "manifest.json"
DTYPES = ("bf16", "fp16", "fp32")
OPERATORS = ("fused", "recipe")
VISUAL_ATTENTION = ("segments", "tnd")
# also of graphs from before schema 3, which are admitted nowhere
_OLD_VISUAL_ATTENTION = (*VISUAL_ATTENTION, "masked")
_RELEASE = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")
SELFTEST_SOURCES = ("transformers", "reference")


@dataclass(frozen=True)
class FileEntry:
    """One file: its path relative to the artifact, with forward slashes, and what its bytes must be."""

    path: str
    bytes: int
    hash: str


@dataclass(frozen=True)
class Folding:
    """What of the image processor's arithmetic the patch embedding carries: y = W (u * rescale - mean) / std + b."""

    rescale_factor: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


@dataclass(frozen=True)
class WeightsPart:
    """What `convert` wrote. bias_dtype: of the biases of linear layers; None is `dtype`, as older schemas have it."""

    dtype: str
    bias_dtype: str | None
    folding: Folding
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output; -1 is a size known only at run time."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """One compiled subgraph. `ops` counts live operators by kind: total, device, shape, layout, data.

    `readable` is the graph as text, where `compile --dump pbtxt` asked for it.
    """

    name: str
    graph: FileEntry
    binding: FileEntry
    readable: FileEntry | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ops: dict[str, int]


@dataclass(frozen=True)
class OperatorNote:
    """An operator that needs more than the oldest supported CANN, or bypasses torchair's compatibility check."""

    operator: str
    # optional inputs and attributes that the registry must know, too
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class GePart:
    """What `compile --mode dynamo` wrote, and the target that the graphs are good for.

    admitted: the CANN releases whose rules every node of every graph obeys; None where an older release of this
    toolchain compiled the graphs, which no NPU is given.
    """

    soc: str
    operators: str
    visual_attention: str
    dtype: str
    max_length: int
    batches: tuple[int, ...]
    passes: tuple[str, ...]
    versions: dict[str, str]
    # what the vendor's documentation does not promise of these graphs, in words
    limits: tuple[str, ...]
    operator_notes: tuple[OperatorNote, ...]
    admitted: tuple[str, ...] | None
    constants: FileEntry
    graphs: tuple[Graph, ...]

    def files(self) -> list[FileEntry]:
        return [self.constants, *(e for g in self.graphs for e in (g.graph, g.binding, g.readable) if e)]


@dataclass(frozen=True)
class AirGraph:
    """One offline model, graphs/air/<name>/<name>.air. `source` is the hash of the GE graph that it was made from.

    The model's inputs are, by index, `inputs` (run-time arguments), then `caches` (parts of the KV cache).
    """

    name: str
    source: str
    model: FileEntry
    inputs: tuple[Tensor, ...]
    caches: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class AirPart:
    """What `compile --mode air` wrote; its constants stay in the files of `weights` and `ge`."""

    graphs: tuple[AirGraph, ...]

    def files(self) -> list[FileEntry]:
        return [graph.model for graph in self.graphs]


@dataclass(frozen=True)
class OnnxGraph:
    """One ONNX model, graphs/onnx/<name>.onnx, and the file of its tensors. `ops` counts its nodes by operator."""

    name: str
    model: FileEntry
    data: FileEntry
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ops: dict[str, int]


@dataclass(frozen=True)
class OnnxPart:
    """What `compile --mode onnx` wrote.

    weights: int8, int4, fp32 or fp16. block_size: how many inputs share a scale, at most, in the layers of the language
    model; None where nothing is quantized. Its tables are int8 in blocks of up to 256 whatever the layers have, and the
    vision tower has one scale for each output channel.
    source: the hash of the manifest's model and weights that the export was made from, also in the models' metadata.
    verification: as the manifest's own, of this part alone; figures in reports/verify-onnx.json.
    """

    weights: str
    block_size: int | None
    standard_only: bool
    opset: int
    max_length: int
    versions: dict[str, str]
    source: str
    graphs: tuple[OnnxGraph, ...]
    verification: str
    reports: tuple[FileEntry, ...]

    def files(self) -> list[FileEntry]:
        return [*self.reports, *(e for graph in self.graphs for e in (graph.model, graph.data))]


# A self-test allows twice the reference's own error. Unrelated outputs are 1.4 apart, so with more than this it would
# hardly fail; bf16 alone gives 0.005 to 0.01.
MOST_OWN_RMS = 0.1


@dataclass(frozen=True)
class OwnError:
    """How far the reference backend, in the graphs' dtype, is from the expected outputs, at its worst call.

    Both relative to the outputs' standard deviation: rms of the error's root mean square, largest of its largest value.
    """

    rms: float
    largest: float


@dataclass(frozen=True)
class SelftestPart:
    """Inputs and expected outputs of the graphs with these weights, for the device to prove itself on.

    source: "transformers" or "reference", which of the two computed the outputs, in fp32.
    """

    source: str
    visual: OwnError
    prefill: OwnError
    decode: OwnError
    file: FileEntry

    def files(self) -> list[FileEntry]:
        return [self.file]


@dataclass(frozen=True)
class Manifest:
    """The whole artifact.

    `verification` of the GE graphs is "passed", "failed", "skipped" or "none"; figures in reports/verify.json.
    """

    schema: int
    hash: str
    name: str
    # the config of its family (runtime.models), as plain data; "model_type" names the family
    model: dict[str, Any]
    weights: WeightsPart | None
    ge: GePart | None
    air: AirPart | None
    onnx: OnnxPart | None
    selftest: SelftestPart | None
    processor: tuple[FileEntry, ...]
    reports: tuple[FileEntry, ...]
    verification: str

    def files(self) -> list[FileEntry]:
        """Every file that the manifest vouches for."""
        parts = [part.files() for part in (self.ge, self.air, self.onnx, self.selftest) if part]
        weights = self.weights.files if self.weights else ()
        return [*self.processor, *self.reports, *weights, *(entry for files in parts for entry in files)]

    # A change of a part takes with it what was made from the old one, and the verdicts on it.

    def with_weights(
        self, name: str, model: dict[str, Any], weights: WeightsPart, processor: tuple[FileEntry, ...]
    ) -> "Manifest":
        """Other weights, for the same GE graphs: these refer to weights by name."""
        return replace(empty_manifest(name, model), weights=weights, processor=processor, ge=self.ge)

    def with_graphs(self, part: GePart) -> "Manifest":
        """Other GE graphs; the ONNX models stay, which hold the weights and compute what any of their graphs does."""
        return replace(self, ge=part, air=None, selftest=None, reports=(), verification="none")

    def with_verdict(self, verification: str, report: FileEntry) -> "Manifest":
        """What a verification of the GE graphs found; a self-test is only of graphs that passed the last one."""
        return replace(self, verification=verification, reports=(report,), selftest=None)

    def with_onnx_verdict(self, verification: str, report: FileEntry) -> "Manifest":
        """What a verification of the ONNX models found. Raises ArtifactError where there are none."""
        if self.onnx is None:
            raise ArtifactError(f"{self.name}: has no ONNX models; nothing can be said of them")
        return replace(self, onnx=replace(self.onnx, verification=verification, reports=(report,)))

    def to_bytes(self) -> bytes:
        return dump_json(self)


def empty_manifest(name: str, model: dict[str, Any]) -> Manifest:
    """A manifest with no part built yet."""
    return Manifest(SCHEMA_VERSION, HASH_NAME, name, model, None, None, None, None, None, (), (), "none")


def manifest_from_bytes(data: bytes, where: str) -> Manifest:
    """Parse and check manifest.json. Raises ArtifactError; the schema version is checked before any other field."""
    plain: Any = parse_json(data, where)
    if not isinstance(plain, dict) or type(plain.get("schema")) is not int:
        raise ArtifactError(f"{where}: no integer field `schema`; not an artifact of qwen2vl-tc")
    plain = _upgraded(plain, where)
    if plain["schema"] != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where}: schema {plain['schema']}, this version reads {SCHEMA_VERSION}; "
            + ("update qwen2vl-tc" if plain["schema"] > SCHEMA_VERSION else "rebuild with `qwen2vl-tc build`")
        )
    manifest = from_plain(Manifest, plain, where)
    if manifest.hash != HASH_NAME:
        raise ArtifactError(f"{where}: hash {manifest.hash!r}, expected {HASH_NAME!r}")
    paths = [entry.path for entry in manifest.files()]
    if len(set(paths)) != len(paths):
        raise ArtifactError(f"{where}: a file is listed twice")
    problem = (manifest.ge and _impossible(manifest.ge)) or (manifest.selftest and _no_selftest(manifest.selftest))
    if problem:
        raise ArtifactError(f"{where}: {problem}; the artifact is damaged or hostile: rebuild it")
    return manifest


def _upgraded(plain: dict[str, Any], where: str) -> dict[str, Any]:
    """A manifest of an older schema with the fields that it lacks; any other as it is."""
    for path, fields in _ADDED_SINCE.get(plain["schema"], {}).items():
        part = plain.get(path) if path else plain
        if not isinstance(part, dict):
            continue
        if known := sorted(part.keys() & set(fields)):
            raise ArtifactError(f"{where}: field {known[0]} is not of schema {plain['schema']}; build it again")
        part = {**part, **dict.fromkeys(fields)}
        plain = {**plain, path: part} if path else part
    return {**plain, "schema": SCHEMA_VERSION} if plain["schema"] in _ADDED_SINCE else plain


def _impossible(part: GePart) -> str | None:
    """What no `compile` writes."""
    if part.dtype not in DTYPES:
        return f"ge.dtype is {part.dtype!r}, expected one of {', '.join(DTYPES)}"
    if part.operators not in OPERATORS:
        return f"ge.operators is {part.operators[:40]!r}, expected one of {', '.join(OPERATORS)}"
    forms = _OLD_VISUAL_ATTENTION if part.admitted is None else VISUAL_ATTENTION
    if part.visual_attention not in forms:
        return f"ge.visual_attention is {part.visual_attention[:40]!r}, expected one of {', '.join(forms)}"
    if unknown := [release for release in part.admitted or () if not _RELEASE.fullmatch(release)]:
        return f"ge.admitted has {unknown[0][:40]!r}, expected releases of CANN such as 9.0"
    if not 2 <= part.max_length < 1 << 31:
        return f"ge.max_length is {part.max_length}"
    if not part.batches or len(set(part.batches)) != len(part.batches) or not all(1 <= b <= 256 for b in part.batches):
        return f"ge.batches is {list(part.batches)[:16]}, expected different sizes from 1 to 256"
    if part.constants.bytes > 1 << 32:
        return f"ge.constants has {part.constants.bytes} bytes"
    return None


def _no_selftest(part: SelftestPart) -> str | None:
    """What no self-test is."""
    if part.source not in SELFTEST_SOURCES:
        return f"selftest.source is {part.source!r}, expected one of {', '.join(SELFTEST_SOURCES)}"
    if part.file.bytes > 1 << 26:
        return f"selftest.file has {part.file.bytes} bytes"
    for kind in ("visual", "prefill", "decode"):
        own: OwnError = getattr(part, kind)
        if not (0 <= own.rms <= MOST_OWN_RMS and 0 <= own.largest <= 100):
            return f"selftest.{kind} is an error of {own.rms:g} (RMS) and {own.largest:g}, which is no rounding"
    return None
