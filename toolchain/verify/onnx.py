"""Verification of an artifact's ONNX models: run by onnxruntime, against transformers in fp32 on the same weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...artifacts.errors import ArtifactError
from ...artifacts.host.process import prepare_process
from ...artifacts.manifest import Manifest
from ...artifacts.schema import dump_json
from ...artifacts.staging import stage
from ...artifacts.store import Artifact, onnx_part, open_artifact
from ...runtime.loader import open_processor
from ...runtime.models import config_of, family_of
from ...runtime.requests.answer import Timings
from ...runtime.requests.generate import prefill_prompt
from .cases import Case
from .report import (
    TOLERANCES,
    CaseSize,
    Comparison,
    InputCheck,
    Progress,
    VerifyReport,
    compare,
    output_departs,
    output_tolerance,
)
from .verify import DEFAULT_STEPS, FAILED, PASSED, available_memory, check_memory, check_same_model, prepare_cases

REPORT_PATH = "reports/verify-onnx.json"
DECODE = "decode"


def verify_onnx_artifact(
    path: Path,
    against: Path,
    *,
    steps: int = DEFAULT_STEPS,
    progress: Progress | None = None,
    sync: bool = True,
    trusted_keys: Sequence[str | Path] | None = None,
) -> VerifyReport:
    """Verify the ONNX models of the artifact at `path`, and put the report and its verdict into it.

    Raises what `verify_onnx` raises, and ArtifactError if the artifact was replaced meanwhile.
    """
    with open_artifact(path, trusted_keys) as artifact:
        report = verify_onnx(artifact, against, steps=steps, progress=progress)
        verified = artifact.manifest
    with stage(path, sync=sync, resumes=False) as staging:
        if staging.base != verified:
            raise ArtifactError(f"{path}: was replaced while it was being verified; verify it again")
        entry = staging.add(REPORT_PATH, dump_json(report))
        verdict = PASSED if report.passed else FAILED
        part = dataclasses.replace(onnx_part(verified, path), reports=(entry,), verification=verdict)
        manifest = dataclasses.replace(verified, onnx=part)
        staging.keep(each for each in manifest.files() if each.path != REPORT_PATH)
        staging.commit(manifest)
    return report


def verify_onnx(
    artifact: Artifact, against: Path, *, steps: int = DEFAULT_STEPS, progress: Progress | None = None
) -> VerifyReport:
    """Compare an open artifact's ONNX models with the HF checkpoint in the folder `against`; writes nothing.

    The requests of `verify`, all as rows of one batch: the inputs, the visual output, and the logits of the prefill and
    of `steps` decode steps on transformers' greedy tokens.
    Raises ArtifactError without ONNX models, and what `verify` raises.
    """
    manifest = artifact.manifest
    part = onnx_part(manifest, artifact.path)
    report = progress or (lambda what, done, total: None)
    report("checking the checkpoint", 0, 1)
    check_same_model(artifact, against)
    cases, fitting, notes = prepare_cases(open_processor(artifact), part.max_length, steps)
    needed = _needed_memory(manifest, cases, fitting)
    if (note := check_memory(needed, available_memory())) is not None:
        notes.append(note)
    prepare_process()
    return _run(artifact, against, cases, fitting, needed, tuple(notes), report)


def _needed_memory(manifest: Manifest, cases: Sequence[Case], steps: int) -> int:
    """Bytes of both models together: transformers' in fp32, and ours as stored, once mapped and once laid out."""
    config = config_of(manifest)
    values = sum(weight.size for weight in family_of(config).weights(config))
    data = sum(graph.data.bytes for graph in manifest.onnx.graphs) if manifest.onnx else 0
    logits = 2 * len(cases) * (1 + steps) * config.text.vocab_size
    return 4 * (values + logits) + 2 * data


def _run(
    artifact: Artifact,
    against: Path,
    cases: Sequence[Case],
    steps: int,
    memory_bytes: int,
    notes: tuple[str, ...],
    progress: Progress,
) -> VerifyReport:
    import torch

    from ...runtime.backends.onnxruntime import OnnxBackend, import_onnxruntime
    from .reference import PREFILL, VISUAL, Expected, open_reference
    from .run import check_inputs
    from .transformers_import import import_transformers

    part = onnx_part(artifact.manifest, artifact.path)
    tolerance = TOLERANCES[part.weights]
    visual_tolerance = output_tolerance(VISUAL, part.weights)
    total = 2 + 2 * len(cases) + steps
    progress("loading transformers' model", 0, total)
    # the weights that were exported are the artifact's: rounded to its dtype
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    weights = artifact.manifest.weights
    reference = open_reference(against, dtypes[weights.dtype if weights else "fp32"])
    checks: list[InputCheck] = []
    known: list[tuple[Case, Expected]] = []
    for done, case in enumerate(cases, start=1):
        progress(f"transformers: {case.name}", done, total)
        inputs = reference.inputs(case)
        found = check_inputs(case, inputs)
        checks += found
        if all(check.equal for check in found):
            known.append((case, reference.run(inputs, steps)))
    progress("loading the ONNX models", 1 + len(cases), total)
    for graph in part.graphs:
        artifact.check(graph.data)
    backend = OnnxBackend(artifact)
    comparisons: list[Comparison] = []
    processor = open_processor(artifact)
    cache = backend.allocate(max(1, len(known)))
    for row, (case, expected) in enumerate(known):
        progress(f"onnxruntime: {case.name}", 2 + len(cases) + row, total)
        prompt = case.prompt
        if expected.visual is not None:
            embeds = backend.embed(processor.inputs, prompt.patches, prompt.grids)
            ours = embeds.in_order(embeds.tensor)
            comparisons.append(compare(case.name, VISUAL, None, ours, expected.visual.numpy(), visual_tolerance, None))
        out = prefill_prompt(backend, cache, row, prompt, processor, Timings())
        theirs, token = expected.logits[0].numpy(), int(backend.tokens(out)[0])
        comparisons.append(compare(case.name, PREFILL, None, backend.logits(out)[0], theirs, tolerance, token))
    for number in range(1, 1 + steps) if known else ():
        progress(f"onnxruntime: step {number}", 2 + 2 * len(cases) + number - 1, total)
        fed = np.array([expected.tokens[number - 1] for _, expected in known], np.int64)
        lengths = np.array([len(case.prompt.token_ids) for case, _ in known], np.int64) + number - 1
        deltas = np.array([case.prompt.delta for case, _ in known], np.int64)
        out = backend.decode(cache, backend.begin(cache, fed, lengths, lengths + deltas), (lengths + 1).tolist())
        for row, (case, expected) in enumerate(known):
            theirs, token = expected.logits[number].numpy(), int(backend.tokens(out)[row])
            ours = backend.logits(out)[row]
            comparisons.append(compare(case.name, DECODE, number, ours, theirs, tolerance, token))
    progress("done", total, total)
    comparisons.sort(key=lambda each: (each.graph != VISUAL, each.graph != PREFILL))
    versions = {"onnxruntime": import_onnxruntime().__version__, "torch": torch.__version__}
    made = VerifyReport(
        passed=False,
        artifact=artifact.manifest.name,
        against=against.resolve().name,
        dtype=part.weights,
        backend=backend.name,
        versions={**versions, "transformers": str(import_transformers().__version__)},
        steps=steps,
        tolerance=tolerance,
        memory_bytes=memory_bytes,
        notes=notes,
        cases=tuple(CaseSize(c.name, len(c.prompt.token_ids), len(c.prompt.patches)) for c in cases),
        inputs=tuple(checks),
        comparisons=tuple(comparisons),
        intermediates=0,
        departure=next(map(output_departs, (each for each in comparisons if not each.passed)), None),
    )
    equal = all(check.equal for check in checks)
    return dataclasses.replace(made, passed=made.departure is None and equal and made.divergence_passed)
