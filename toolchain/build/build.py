"""`build`: convert, compile and verify in one staged tree that is committed once, or not at all."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...artifacts.errors import MissingDependencyError
from ...artifacts.manifest import Manifest, empty_manifest
from ...artifacts.staging import Staging, stage
from ...runtime.models import to_plain
from ..progress import Displays, StepProgress
from ..weights.convert import ConvertResult, artifact_name, convert_planned, plan_conversion
from .compile import CompileOptions, stage_graphs

if TYPE_CHECKING:
    from ..verify.report import VerifyReport


@dataclass(frozen=True)
class BuildResult:
    """What was built. report is None where verification was skipped; without `committed` the target is as it was."""

    manifest: Manifest
    converted: ConvertResult
    report: "VerifyReport | None"
    committed: bool


def build(
    src: Path,
    out: Path,
    *,
    options: CompileOptions | None = None,
    verify: bool = True,
    sync: bool = True,
    displays: Displays | None = None,
) -> BuildResult:
    """Build the artifact at `out` from the HF checkpoint at `src`; an artifact there is replaced at the very end.

    options.dtype: of the weights and the graphs; None takes the checkpoint's. A build that was killed resumes at its
    first unfinished weight file. If verification fails, nothing is committed and the result's report says why.
    Raises ToolchainError, and then leaves `out` as it was.
    """
    options = options or CompileOptions()
    displays = displays or Displays()
    with plan_conversion(src, options.dtype) as plan, stage(out, sync=sync, whole=True) as staging:
        options = replace(options, dtype=plan.dtype)
        # everything that can be refused is refused before gigabytes are written
        options.check(plan.checkpoint.config)
        if verify and importlib.util.find_spec("transformers") is None:
            raise MissingDependencyError(
                "verifying needs transformers; pip install 'qwen2vl-tc[compile]', or build with --no-verify"
            )
        from ...exporters.torchair.device import open_device

        with displays.steps("prepare") as step:
            step("opening the device", 0, 1)
            open_device(options.soc)
            step("done", 1, 1)
        with displays.copy("convert") as copied:
            converted = convert_planned(plan, staging, copied)
        model = to_plain(converted.model)
        manifest = empty_manifest("", model).with_weights(
            artifact_name(src), model, converted.weights, converted.processor
        )
        with displays.steps("compile") as step:
            manifest = stage_graphs(staging, manifest, options, step)
        report = None
        if verify:
            with displays.steps("verify") as step:
                report, manifest = _verify(staging, manifest, src, step)
        else:
            manifest = replace(manifest, verification="skipped")
        if report is not None and not report.passed:
            # nothing to resume: an artifact that computes something else is not finished by another run
            staging.journal.clear()
            return BuildResult(manifest, converted, report, committed=False)
        staging.commit(manifest)
        return BuildResult(manifest, converted, report, committed=True)


def _verify(staging: Staging, manifest: Manifest, src: Path, progress: StepProgress) -> "tuple[VerifyReport, Manifest]":
    """Verify the staged tree through the runtime, as a user would load it."""
    from ..verify.verify import store_report, verify, with_selftest

    staging.write_manifest(manifest)
    with staging.open() as artifact:
        report, selftest = with_selftest(artifact, src, "ge", verify(artifact, src, progress=progress), progress)
    return report, store_report(staging, manifest, "ge", report, selftest)
