"""`verify`: each part of an artifact, run on CPU, against transformers on the same weights; the verdicts go into it."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifacts.errors import ArtifactError, ConfigError, TargetError
from ...artifacts.host.process import prepare_process
from ...artifacts.manifest import Manifest
from ...artifacts.schema import dump_json
from ...artifacts.staging import Staging, amend
from ...artifacts.store import Artifact, open_artifact
from ...runtime.loader import open_processor
from ...runtime.models import config_of
from ...runtime.text.prompt import Processor
from ..host.memory import available_bytes
from ..progress import StepProgress, no_steps
from ..weights.source import open_checkpoint
from .cases import Case, make_cases, template_problem
from .report import VerifyReport
from .subjects import PARTS

if TYPE_CHECKING:
    from ..selftest.make import MadeSelftest

DEFAULT_STEPS = 16
PASSED, FAILED = "passed", "failed"


def verify_artifact(
    path: Path,
    against: Path,
    part: str = "ge",
    *,
    steps: int = DEFAULT_STEPS,
    progress: StepProgress = no_steps,
    store: bool = True,
    sync: bool = True,
    trusted_keys: Sequence[str | Path] | None = None,
) -> VerifyReport:
    """Verify a part of the artifact at `path` and, with `store`, put the report and its verdict into it.

    A failed verification is a report with passed False, not an error. Raises what `verify` raises, and ArtifactError if
    the artifact was replaced meanwhile.
    """
    if store:
        with amend(path, sync=sync):
            pass  # minutes of work are not begun when the report could not be kept
    with open_artifact(path, trusted_keys) as artifact:
        report = verify(artifact, against, part, steps=steps, progress=progress)
        selftest = None
        if store:
            report, selftest = with_selftest(artifact, against, part, report, progress)
        verified = artifact.manifest
    if store:
        with amend(path, sync=sync) as (staging, present):
            if present != verified:
                raise ArtifactError(f"{path}: was replaced while it was being verified; verify it again")
            staging.commit(store_report(staging, verified, part, report, selftest))
    return report


def store_report(
    staging: Staging, manifest: Manifest, part: str, report: VerifyReport, selftest: "MadeSelftest | None"
) -> Manifest:
    """Stage the report and the self-test; returns the manifest with both and the verdict, to be committed."""
    entry = staging.add(PARTS[part].report_path, dump_json(report))
    manifest = PARTS[part].with_verdict(manifest, PASSED if report.passed else FAILED, entry)
    return manifest if selftest is None else dataclasses.replace(manifest, selftest=selftest.stage(staging))


def with_selftest(
    artifact: Artifact, against: Path, part: str, report: VerifyReport, progress: StepProgress = no_steps
) -> "tuple[VerifyReport, MadeSelftest | None]":
    """The self-test of GE graphs that passed, answered by transformers; None for ONNX models, where they failed, or
    where the cache is too short for it, which the report then notes. Both models of the verification are gone by now.
    """
    if not report.passed or part != "ge":
        return report, None
    from ..selftest.make import by_transformers

    total = PARTS[part].subject(artifact).calls(len(report.cases))
    progress("answers for the self-test", total, total)
    try:
        return report, by_transformers(artifact, against)
    except TargetError as error:
        return dataclasses.replace(report, notes=(*report.notes, f"no self-test: {error}")), None


def verify(
    artifact: Artifact,
    against: Path,
    part: str = "ge",
    *,
    steps: int = DEFAULT_STEPS,
    progress: StepProgress = no_steps,
) -> VerifyReport:
    """Compare a part of an open artifact with the HF checkpoint in the folder `against`; writes nothing.

    part: "ge", the GE graphs run by the reference backend, or "onnx", the ONNX models run by onnxruntime.
    Four requests (one picture, two, a clip, text only): the inputs that both make of them, the visual output, the
    prefill's logits and those of `steps` decode steps of every compiled batch size, both fed transformers' greedy
    tokens. Positions after the clip are compared with the rule of training, since newer transformers have another.
    Where one output of a GE graph is outside the tolerance, the first such is run again to find the first intermediate
    that departs.

    Raises ArtifactError for an artifact without that part, without weights, or of another model; ConfigError or
    WeightError for a folder that is not a whole checkpoint; TargetError when both models do not fit into memory
    together, before anything is loaded.
    """
    subject = PARTS[part].subject(artifact)
    progress("checking the checkpoint", 0, 1)
    check_same_model(artifact, against)
    cases, fitting, notes = prepare_cases(open_processor(artifact), subject.max_length, steps)
    needed = subject.needed_memory(artifact.manifest, cases, fitting)
    if (note := check_memory(needed, available_bytes())) is not None:
        notes.append(note)
    prepare_process()
    from .run import run

    return run(artifact, subject, against, cases, fitting, needed, tuple(notes), progress)


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
