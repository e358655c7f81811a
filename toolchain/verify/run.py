"""Running one part of an artifact and transformers on the same requests, and comparing every output."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...artifacts.store import Artifact
from ...runtime.dtypes import torch_dtype
from ..progress import StepProgress
from .cases import Case
from .compare import output_departs
from .locate import check_intermediates, locate
from .reference import PREFILL, VISUAL, HfInputs, open_reference
from .report import CaseSize, InputCheck, VerifyReport
from .sides import Answered, Sides
from .subjects import Subject
from .tolerances import TOLERANCES


def run(
    artifact: Artifact,
    subject: Subject,
    against: Path,
    cases: Sequence[Case],
    steps: int,
    memory_bytes: int,
    notes: tuple[str, ...],
    progress: StepProgress,
) -> VerifyReport:
    """Load both models, compare every output, then the intermediates of what failed. Memory is checked before."""
    batches = subject.batches or (len(cases),)
    done, total = 0, subject.calls(len(cases))

    def tell(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        done += 1

    tell("loading transformers' model")
    reference = open_reference(against, torch_dtype(subject.weights_dtype))
    tell("loading the artifact")
    sides = Sides(artifact, subject, reference, subject.open(artifact))
    checks: list[InputCheck] = []
    answered: list[Answered] = []
    for case in cases:
        tell(f"transformers: {case.name}")
        inputs = reference.inputs(case)
        checks += (checked := check_inputs(case, inputs))
        if all(check.equal for check in checked):
            answered.append(Answered(case, inputs, reference.run(inputs, steps)))
    comparisons = [
        each
        for batch in batches
        for start in range(0, len(answered), batch)
        for each in sides.compare(batch, answered[start : start + batch], steps, batch != batches[0], tell)
    ]
    comparisons.sort(key=lambda each: (each.graph != VISUAL, each.graph != PREFILL))
    half = subject.second_opinion
    if half is not None and not all(each.passed for each in comparisons):
        progress(f"transformers in {half}", total, total)
        comparisons = sides.second_opinions(half, comparisons, answered, steps)
    failed = next((each for each in comparisons if not each.passed), None)
    departure, intermediates = None, 0
    if failed is not None:
        progress(f"looking for where {failed.graph} departs", total, total)
        departure, intermediates = locate(sides, failed, answered)
        departure = departure or output_departs(failed)
    elif half is not None and answered:
        departure, intermediates = check_intermediates(
            sides, comparisons, answered, lambda graph: progress(f"intermediates of {graph}", total, total)
        )
    progress("done", total, total)
    report = VerifyReport(
        passed=False,
        artifact=artifact.manifest.name,
        against=against.resolve().name,
        dtype=subject.dtype,
        backend=sides.backend.name,
        versions={
            name: str(importlib.import_module(name).__version__) for name in (*subject.engines, "torch", "transformers")
        },
        steps=steps,
        tolerance=TOLERANCES[subject.dtype],
        memory_bytes=memory_bytes,
        notes=notes,
        cases=tuple(CaseSize(c.name, len(c.prompt.token_ids), len(c.prompt.patches)) for c in cases),
        inputs=tuple(checks),
        comparisons=tuple(comparisons),
        intermediates=intermediates,
        departure=departure,
    )
    agrees = departure is None and bool(comparisons) and all(check.equal for check in checks)
    return replace(report, passed=agrees and report.divergence_passed)


def check_inputs(case: Case, theirs: HfInputs) -> list[InputCheck]:
    """Grids, token ids after expansion, and M-RoPE positions: equal or not, and where not."""
    prompt = case.prompt
    pairs = [
        ("grids", prompt.grids, theirs.grids),
        ("token ids", prompt.token_ids, theirs.token_ids),
        ("M-RoPE positions", prompt.positions, theirs.positions),
        ("M-RoPE delta", np.array([prompt.delta]), np.array([theirs.delta])),
    ]
    checks = []
    for what, ours, original in pairs:
        detail = ""
        if ours.shape != original.shape:
            detail = f"shape {list(ours.shape)}, expected {list(original.shape)}"
        elif (ours != original).any():
            at = tuple(int(i) for i in np.argwhere(ours != original)[0])
            detail = f"at {list(at)} got {ours[at]}, expected {original[at]}"
        checks.append(InputCheck(case.name, what, not detail, detail))
    return checks
