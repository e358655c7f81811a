"""`verify`: an artifact's graphs, run on CPU by the reference backend, against transformers on the same weights."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifacts.errors import ArtifactError, ConfigError, TargetError
from ...artifacts.host.process import prepare_process
from ...artifacts.manifest import Manifest
from ...artifacts.schema import dump_json
from ...artifacts.staging import Staging, stage
from ...artifacts.store import Artifact, ge_part, open_artifact
from ...runtime.loader import open_processor
from ...runtime.models import config_of, family_of
from ...runtime.text.prompt import Processor
from ..selftest.inputs import MOST_TOKENS
from ..weights.source import open_checkpoint
from .cases import Case, make_cases, template_problem
from .report import Progress, VerifyReport, render

if TYPE_CHECKING:
    from ..selftest.make import MadeSelftest

__all__ = ["VerifyReport", "render", "store_report", "verify", "verify_artifact", "with_selftest"]

REPORT_PATH = "reports/verify.json"
DEFAULT_STEPS = 16
PASSED, FAILED = "passed", "failed"
_MEMORY_FILE = Path("/proc/meminfo")


def verify_artifact(
    path: Path,
    against: Path,
    *,
    steps: int = DEFAULT_STEPS,
    progress: Progress | None = None,
    store: bool = True,
    sync: bool = True,
    trusted_keys: Sequence[str | Path] | None = None,
) -> VerifyReport:
    """Verify the artifact at `path` and, with `store`, put the report and its verdict into it.

    A failed verification is a report with passed False, not an error. Raises what `verify` raises, and ArtifactError if
    the artifact was replaced meanwhile.
    """
    if store:
        with stage(path, sync=sync, resumes=False):
            pass  # minutes of work are not begun when the report could not be kept
    with open_artifact(path, trusted_keys) as artifact:
        report = verify(artifact, against, steps=steps, progress=progress)
        selftest = None
        if store:
            report, selftest = with_selftest(artifact, against, report, progress)
        verified = artifact.manifest
    if store:
        with stage(path, sync=sync, resumes=False) as staging:
            if staging.base != verified:
                raise ArtifactError(f"{path}: was replaced while it was being verified; verify it again")
            manifest = store_report(staging, verified, report, selftest)
            staging.keep(entry for entry in manifest.files() if entry in verified.files() and entry.path != REPORT_PATH)
            staging.commit(manifest)
    return report


def store_report(
    staging: Staging, manifest: Manifest, report: VerifyReport, selftest: "MadeSelftest | None"
) -> Manifest:
    """Stage reports/verify.json and the self-test; returns the manifest with both and the verdict, to be committed."""
    entry = staging.add(REPORT_PATH, dump_json(report))
    verdict = PASSED if report.passed else FAILED
    manifest = dataclasses.replace(manifest, reports=(entry,), verification=verdict, selftest=None)
    return manifest if selftest is None else selftest.stage(staging, manifest)


def with_selftest(
    artifact: Artifact, against: Path, report: VerifyReport, progress: Progress | None = None
) -> "tuple[VerifyReport, MadeSelftest | None]":
    """The self-test of an artifact that passed, answered by transformers; None where it failed, or where the cache is
    too short for it, which the report then notes. Both models of the verification are gone by now."""
    if not report.passed:
        return report, None
    from ..selftest.make import by_transformers
    from .run import calls_in_all

    total = calls_in_all(len(report.cases), ge_part(artifact.manifest, artifact.path).batches)
    (progress or (lambda what, done, total: None))("answers for the self-test", total, total)
    try:
        return report, by_transformers(artifact, against)
    except TargetError as error:
        return dataclasses.replace(report, notes=(*report.notes, f"no self-test: {error}")), None


def verify(
    artifact: Artifact, against: Path, *, steps: int = DEFAULT_STEPS, progress: Progress | None = None
) -> VerifyReport:
    """Compare an open artifact with the HF checkpoint in the folder `against`; writes nothing.

    Four requests (one picture, two, a clip, text only): the inputs that both make of them, the visual output, the
    prefill's logits and those of `steps` decode steps of every compiled batch size, both fed transformers' greedy
    tokens. Positions after the clip are compared with the rule of training, since newer transformers have another.
    Where one is outside the tolerance, the first such is run again to find the first intermediate that departs.

    Raises ArtifactError for an artifact without weights or graphs, or of another model; ConfigError or WeightError for
    a folder that is not a whole checkpoint; TargetError when both models do not fit into memory together, before
    anything is loaded.
    """
    manifest = artifact.manifest
    if manifest.weights is None or manifest.ge is None:
        missing, command = ("weights", "convert") if manifest.weights is None else ("GE graphs", "compile")
        raise ArtifactError(
            f"{artifact.path}: has no {missing}, so there is nothing to verify; run `qwen2vl-tc {command}` first"
        )
    report_progress = progress or (lambda what, done, total: None)
    report_progress("checking the checkpoint", 0, 1)
    check_same_model(artifact, against)
    cases, fitting, notes = prepare_cases(open_processor(artifact), manifest.ge.max_length, steps)
    needed = needed_memory(manifest, cases, fitting)
    if (note := check_memory(needed, available_memory())) is not None:
        notes.append(note)

    prepare_process()
    from .run import Run

    return Run(artifact, manifest.ge, against, cases, fitting, report_progress).report(needed, tuple(notes))


def prepare_cases(processor: Processor, max_length: int, steps: int) -> tuple[tuple[Case, ...], int, list[str]]:
    """The requests, how many decode steps fit the KV cache, and what there is to note. Raises TargetError."""
    if steps < 1:
        raise TargetError(f"steps is {steps}, expected at least 1")
    cases = make_cases(processor, max_length)
    longest = max(len(case.prompt.token_ids) for case in cases)
    fitting = min(steps, max_length - longest)
    notes = []
    if fitting < steps:
        notes.append(f"{fitting} decode steps instead of {steps}: the cache has {max_length} positions")
    if problem := template_problem(processor):
        notes.append(f"prompts were made without a chat template: {problem}")
    return cases, fitting, notes


def check_same_model(artifact: Artifact, against: Path) -> None:
    """Raises ConfigError or WeightError for a folder that is no whole checkpoint, ArtifactError for another model's."""
    if not (against / "config.json").is_file():
        raise ConfigError(f"{against}: no config.json there; --against wants the folder of the original checkpoint")
    with open_checkpoint(against) as checkpoint:
        there = checkpoint.config
    differences = list(_differences("", config_of(artifact.manifest), there))
    if differences:
        raise ArtifactError(
            f"{artifact.path}: was not made from {against}, whose config.json differs: {', '.join(differences[:6])}; "
            "verify against the checkpoint that it was converted from"
        )


def _differences(where: str, ours: Any, theirs: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(ours):
        for field in dataclasses.fields(ours):
            yield from _differences(
                f"{where}.{field.name}".lstrip("."), getattr(ours, field.name), getattr(theirs, field.name)
            )
    elif ours != theirs:
        yield f"{where} is {theirs} there and {ours} in the artifact"


def needed_memory(manifest: Manifest, cases: Sequence[Case], steps: int) -> int:
    """Bytes that both models take together, before anything is loaded.

    transformers: 4 bytes a parameter. Ours: the mapped weights, the largest of them once more as fp32 (the reference
    backend computes half-precision products in fp32) and once rounded. Both: activations of the longest request,
    all kept while intermediates are compared, and the cache's used positions.
    """
    config = config_of(manifest)
    sizes = [weight.size for weight in family_of(config).weights(config)]
    mapped = sum(entry.bytes for entry in manifest.weights.files) if manifest.weights else 0
    text, vision = config.text, config.vision
    tokens = max(max(len(case.prompt.token_ids) for case in cases) + steps, MOST_TOKENS)
    patches = max(len(case.prompt.patches) for case in cases)
    per_token = text.num_layers * (12 * text.hidden_size + 4 * text.intermediate_size + 4 * text.kv_dim)
    per_patch = vision.depth * (14 * vision.embed_dim + 3 * vision.mlp_dim)
    scores = 3 * max(text.num_heads * tokens**2, vision.num_heads * patches**2)
    rows = max(manifest.ge.batches) if manifest.ge else 1
    logits = (len(cases) * (1 + steps) + 2 * rows) * text.vocab_size
    return 4 * sum(sizes) + mapped + 8 * max(sizes) + 8 * (tokens * per_token + patches * per_patch + scores + logits)


def available_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say (only Linux does)."""
    if sys.platform != "linux" or not _MEMORY_FILE.is_file():
        return None
    for line in _MEMORY_FILE.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def check_memory(needed: int, available: int | None) -> str | None:
    """Raises TargetError, with what is missing, if both models do not fit. Returns a note where that is unknown."""
    if available is None:
        return f"memory was not checked (only Linux says what is free); about {needed / 1e9:.1f} GB are needed"
    if needed > available:
        raise TargetError(
            f"verification needs {needed / 1e9:.1f} GB of memory for both models together, {available / 1e9:.1f} GB "
            "are available; verify on a larger machine (an artifact can be copied), or build with --no-verify"
        )
    return None
