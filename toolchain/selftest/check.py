"""`selftest`: the stored calls on the engine that is here, and the first graph that departs."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf
from pathlib import Path

import numpy as np

from ...artifacts.errors import ArtifactError, TargetError
from ...artifacts.manifest import GePart, OwnError, SelftestPart
from ...artifacts.store import Artifact, ge_part, onnx_part, read_manifest
from ...runtime.loader import ONNXRUNTIME
from ...runtime.model import Model
from ...runtime.models import config_of
from ..verify.tolerances import output_tolerance
from .compare import FLOOR, OF_OWN, Distance, distance, limit_of
from .file import from_bytes
from .known import Known
from .observe import KINDS, Call, GraphRefusedError, Observed, observe
from .symptoms import NOT_FINITE, REPEATED, SIGNS, TOKEN, UNWRITTEN, form_instead, known_symptoms, pattern_sign


@dataclass(frozen=True)
class SelftestLimit:
    """What may be found of one kind of graph, and why; the error beside the expected output's deviation."""

    rms: float
    largest: float
    reason: str


@dataclass(frozen=True)
class SelftestOutcome:
    """One output: what it was of, how far it is (None where it is not finite), and the signs that it shows.

    call: see observe.Call.
    """

    graph: str
    title: str
    call: Call
    row: int | None
    rms: float | None
    largest: float | None
    signs: tuple[str, ...]
    passed: bool


@dataclass(frozen=True)
class SelftestDeparture:
    """The first graph that departs: its worst output there, what is known to look like it, what to compile instead.

    refused: the engine's own words, where it did not run the graph at all.
    """

    graph: str
    worst: SelftestOutcome | None
    limit: SelftestLimit
    wrong: int
    outputs: int
    signs: tuple[str, ...]
    known: tuple[str, ...]
    instead: str
    refused: str | None


@dataclass(frozen=True)
class SelftestReport:
    """What a self-test found. source: what computed the expected outputs."""

    passed: bool
    artifact: str
    backend: str
    device: str
    source: str
    dtype: str
    limits: dict[str, SelftestLimit]
    outcomes: tuple[SelftestOutcome, ...]
    departure: SelftestDeparture | None
    not_covered: tuple[str, ...]
    seconds: float


def no_selftest(path: Path) -> ArtifactError:
    """What to run for an artifact that has no self-test."""
    return ArtifactError(
        f"{path}: has no self-test; run `qwen2vl-tc verify {path} --against HF_DIR`, or, where that does not fit into "
        f"memory, `qwen2vl-tc selftest {path} --make`"
    )


def check_artifact(path: Path, backend: str | None, trusted_keys: Sequence[str | Path] | None = None) -> SelftestReport:
    """Load the artifact on an engine, by default the best that is here, and run its self-test.

    Raises ArtifactError for an artifact without one, and whatever `load` raises.
    """
    if read_manifest(path).selftest is None:
        raise no_selftest(path)  # before gigabytes are loaded
    from ...runtime import load

    model = load(path, backend=backend, trusted_keys=trusted_keys)
    try:
        return check_model(model)
    finally:
        # altered weights are said here, and not taken for a device's fault
        model.close()


def check_model(model: Model) -> SelftestReport:
    """Run the self-test of a loaded model. Raises ArtifactError without one, TargetError for a cache too short."""
    begin = time.perf_counter()
    part, known = _stored(model.artifact)
    backend, manifest = model.backend, model.manifest
    if known.inputs.longest() > backend.max_length:
        raise TargetError(
            f"{model.artifact.path}: the self-test takes {known.inputs.longest()} cache positions, backend "
            f"{backend.name} has {backend.max_length}; compile with --max-length {known.inputs.longest()} or more"
        )
    ge = None if backend.name == ONNXRUNTIME else ge_part(manifest, model.artifact.path)
    dtype = onnx_part(manifest, model.artifact.path).weights if ge is None else ge.dtype
    batches = [len(known.inputs.scripts)] if ge is None else list(ge.batches)
    limits = {kind: _limit(kind, dtype, part, ge is None) for kind in KINDS}
    outcomes: list[SelftestOutcome] = []
    earlier: dict[tuple[str, bytes], Call] = {}
    refused: GraphRefusedError | None = None
    try:
        for each in observe(backend, config_of(manifest), known.inputs, batches, model.take_cache):
            outcomes.append(_outcome(each, distance(known, each), limits[each.kind], tuple(_signs(each, earlier))))
    except GraphRefusedError as error:
        refused = error
    # the vision tower feeds the prefill, and that the decode steps: the first of them that is wrong explains the others
    outcomes.sort(key=lambda each: KINDS.index(_kind(each.graph)))
    departure = _departure(outcomes, limits, refused, ge)
    return SelftestReport(
        passed=departure is None,
        artifact=manifest.name,
        backend=backend.name,
        device=backend.device,
        source=part.source,
        dtype=dtype,
        limits=limits,
        outcomes=tuple(outcomes),
        departure=departure,
        not_covered=known.inputs.not_covered(),
        seconds=round(time.perf_counter() - begin, 3),
    )


def _stored(artifact: Artifact) -> tuple[SelftestPart, Known]:
    part = artifact.manifest.selftest
    if part is None:
        raise no_selftest(artifact.path)
    data = artifact.read(part.file)
    return part, from_bytes(data, config_of(artifact.manifest), f"{artifact.path}: {part.file.path}")


def _kind(graph: str) -> str:
    return graph.partition("_")[0]


def _limit(kind: str, dtype: str, part: SelftestPart, onnx: bool) -> SelftestLimit:
    """dtype: what computes here; the reference's own error is that of the artifact's GE graphs."""
    own: OwnError = getattr(part, kind)
    limit = limit_of(own)
    reason = f"{OF_OWN:g} x the reference backend's own error on the GE graphs, {own.rms:.2g} (RMS), {own.largest:.2g}"
    if limit.rms == FLOOR.rms:
        reason = f"no less than {FLOOR.rms:g}: fp32 sums in another order differ by 1e-6 to 1e-5"
    allowed = output_tolerance(kind, dtype)
    if onnx and (allowed.relative_rms or 0.0) > limit.rms:
        return SelftestLimit(allowed.relative_rms or 0.0, allowed.relative_max or limit.largest, allowed.reason)
    return SelftestLimit(limit.rms, limit.largest, reason)


def _signs(each: Observed, earlier: dict[tuple[str, bytes], Call]) -> Iterator[str]:
    """Signs of one output; `earlier` remembers which call of a graph gave it first."""
    if not np.isfinite(each.output).all():
        yield NOT_FINITE
        return
    if each.output.min() == each.output.max():
        yield UNWRITTEN
    elif earlier.setdefault((each.graph, blake2b(each.output.tobytes()).digest()), each.call) != each.call:
        yield REPEATED
    if each.token is not None:
        row = each.output[0]
        if not 0 <= each.token < len(row) or row[each.token] != row.max():
            yield TOKEN


def _outcome(each: Observed, measured: Distance, limit: SelftestLimit, signs: tuple[str, ...]) -> SelftestOutcome:
    return SelftestOutcome(
        graph=each.graph,
        title=each.title,
        call=each.call,
        row=each.row,
        rms=measured.rms if measured.finite else None,
        largest=measured.largest if measured.finite else None,
        signs=signs,
        passed=measured.within(OwnError(limit.rms, limit.largest)) and TOKEN not in signs,
    )


def _departure(
    outcomes: Sequence[SelftestOutcome],
    limits: dict[str, SelftestLimit],
    refused: GraphRefusedError | None,
    ge: GePart | None,
) -> SelftestDeparture | None:
    first = next((each for each in outcomes if not each.passed), None)
    if first is None and refused is None:
        return None
    graph = first.graph if first is not None else refused.graph if refused is not None else ""
    kind = _kind(graph)
    outputs = [each for each in outcomes if each.graph == graph]
    wrong = [each for each in outputs if not each.passed]
    signs = {sign for each in wrong for sign in each.signs}
    right = [each.call for each in outcomes if each.passed and _kind(each.graph) == kind]
    wrong_rows = {each.row for each in wrong}
    pattern = pattern_sign(kind, [each.call for each in wrong], right, wrong_rows < {each.row for each in outputs})
    if pattern is not None and wrong:
        signs.add(pattern)
    # what is not finite is the worst; then what is the largest part of its limit
    worst = max(wrong, key=lambda each: inf if each.rms is None else each.rms, default=None)
    return SelftestDeparture(
        graph=graph,
        worst=worst,
        limit=limits[kind],
        wrong=len(wrong),
        outputs=len(outputs),
        signs=tuple(meaning for sign, meaning in SIGNS.items() if sign in signs),
        known=tuple(f"{each.looks_like}: {each.advice}" for each in known_symptoms(kind, signs)) if wrong else (),
        instead="compile ARTIFACT --mode onnx" if ge is None else f"compile ARTIFACT {form_instead(kind, ge)}",
        refused=None if refused is None or first is not None else str(refused),
    )
