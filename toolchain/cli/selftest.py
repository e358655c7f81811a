"""The commands that prove an artifact on the machine that is to run it: selftest and warm."""

import dataclasses
from typing import Annotated

import typer

from ...artifacts.errors import TargetError
from ..words import command
from .asking import Backend
from .errors import FAILED
from .options import Artifact, Json, TrustedKeys

SELFTEST_EXAMPLES = (
    "qwen2vl-tc selftest qwen2-vl-7b.artifact --backend npu",
    "qwen2vl-tc selftest qwen2-vl-7b.artifact --make",
)
WARM_EXAMPLES = ("qwen2vl-tc warm qwen2-vl-7b.artifact",)


def selftest(
    artifact: Artifact,
    backend: Backend = None,
    make: Annotated[
        bool,
        typer.Option(
            "--make",
            help="Make the self-test by the reference backend alone, where transformers does not fit into memory.",
        ),
    ] = False,
    trusted_key: TrustedKeys = None,
    as_json: Json = False,
) -> None:
    """Run the calls whose answers the artifact holds, on the device that is here, and compare: a matter of seconds.

    The exit code is 1 if a graph departs; the first is named, with what is known to look like it and the form to
    compile instead.
    """
    from ..selftest.check import check_artifact
    from ..selftest.make import make_selftest
    from ..selftest.report import headline, render
    from .console import fail, result, result_json, stdout, step_progress
    from .output import warn_signed

    if make:
        if backend is not None or as_json:
            raise TargetError("--make takes no --backend, since the reference computes, and no --json")
        warn_signed(artifact)
        with step_progress("selftest") as progress:
            manifest = make_selftest(artifact, progress)
        size = manifest.selftest.file.bytes if manifest.selftest else 0
        result(f"wrote {artifact}: self-test of {size} B; next: {command('qwen2vl-tc', 'selftest', artifact)}")
        return
    report = check_artifact(artifact, backend, trusted_key or None)
    if as_json:
        result_json(dataclasses.asdict(report))
    else:
        render(report, stdout())
    if report.departure is not None:
        fail(f"self-test: {headline(report.departure)}")
        raise typer.Exit(FAILED)
    if not as_json:
        result(f"self-test passed on {report.device} in {report.seconds:.1f} s")


def warm(artifact: Artifact, trusted_key: TrustedKeys = None) -> None:
    """On the NPU host: compile the graphs ahead of the first request, into GE's cache in your cache folder, and prove
    their answers by the artifact's self-test.

    Run it again after an update of CANN or of the driver: each has a cache of its own. The exit code is 1 if a graph
    departs.
    """
    from ..host.warm import warm_artifact
    from ..selftest.report import headline, render
    from .console import fail, note, stdout, step_progress
    from .output import print_warmed

    with step_progress("warm") as progress:
        warmed = warm_artifact(artifact, progress, trusted_key or None)
    if warmed.selftest is None:
        note(f"{artifact} has no self-test, so nothing was compared; make one with `qwen2vl-tc selftest --make`")
    else:
        render(warmed.selftest, stdout())
        if warmed.selftest.departure is not None:
            fail(f"self-test: {headline(warmed.selftest.departure)}")
            raise typer.Exit(FAILED)
    print_warmed(warmed, artifact)
