"""The command that asks whether a CANN would take the graphs."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import FAILED
from .options import Json, OptionalArtifact
from .values import releases

EXAMPLES = (
    "qwen2vl-tc check",
    "qwen2vl-tc check qwen2-vl-7b.artifact --cann 9.1",
    "qwen2vl-tc check qwen2-vl-7b.artifact --cann 8.1,8.5 --json",
)


def check(
    artifact: OptionalArtifact = None,
    cann: Annotated[
        str, typer.Option("--cann", metavar="RELEASE,...", help="The CANN releases to ask about.")
    ] = "8.5,9.0,9.1",
    as_json: Json = False,
) -> None:
    """Hold every node of the graphs against the rules of CANN's releases, at the smallest and the largest sizes.

    Needs neither an NPU nor CANN: the rules were read from published sources. The exit code is 1 if a release that was
    asked about does not take every graph.
    """
    asked = releases(cann)
    from ..check.check import check_artifact
    from ..check.report import as_json as check_json
    from ..check.report import lines
    from .console import result, result_json
    from .locate import find_artifact

    checked = check_artifact(artifact or find_artifact(Path()), asked)
    if as_json:
        result_json(check_json(checked))
    else:
        for line in lines(checked):
            result(line)
    if checked.admitted != checked.releases:
        raise typer.Exit(FAILED)
