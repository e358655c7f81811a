"""The commands that look: at an artifact, and at this machine."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ...artifacts.errors import TargetError
from .console import fail
from .errors import FAILED
from .options import Json, OptionalArtifact, TrustedKeys

INSPECT_EXAMPLES = (
    "qwen2vl-tc inspect",
    "qwen2vl-tc inspect qwen2-vl-7b.artifact --json --patches 65536 --tokens 8192",
    "qwen2vl-tc inspect qwen2-vl-7b.artifact --graph decode_b1 --dot layer.dot",
)
DOCTOR_EXAMPLES = (
    "qwen2vl-tc doctor",
    "qwen2vl-tc doctor qwen2-vl-7b.artifact",
    "qwen2vl-tc doctor --json",
)


def inspect(
    artifact: OptionalArtifact = None,
    as_json: Json = False,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", help="Costs: tokens of the prompt, and of the cache. Default: 507."),
    ] = None,
    patches: Annotated[
        int | None, typer.Option("--patches", metavar="N", help="Costs: patches of the picture. Default: 1872.")
    ] = None,
    graph: Annotated[
        str | None, typer.Option("--graph", metavar="NAME", help="With --dot: the graph to draw a layer of.")
    ] = None,
    dot: Annotated[
        Path | None, typer.Option("--dot", metavar="FILE", help="Draw one layer for Graphviz, and print no report.")
    ] = None,
    trusted_key: TrustedKeys = None,
    layer: Annotated[
        int | None, typer.Option("--layer", metavar="N", help="With --dot: the layer, from 0. Default: the second.")
    ] = None,
) -> None:
    """Show what is in an artifact: graphs, operators, costs at given lengths, bytes, versions, target.

    With --trusted-key, the exit code is 1 after the report unless one of the keys signed the artifact.
    """
    from ...artifacts.naming import naming
    from ..inspect.inspect import draw_artifact, inspect_artifact, render
    from .console import result, result_json, stdout
    from .locate import find_artifact

    no_drawing = as_json or bool(trusted_key)
    if (graph is None) != (dot is None) or (layer is not None and dot is None) or (dot is not None and no_drawing):
        raise TargetError("a drawing takes --graph and --dot together, perhaps --layer, no --json and no --trusted-key")
    target = artifact or find_artifact(Path())
    if graph is not None and dot is not None:
        drawing = draw_artifact(target, graph, layer, tokens, patches)
        with naming(dot):
            dot.write_text(drawing.text)
        result(f"wrote {dot}: layer {drawing.layer} of {graph}, {drawing.device_ops} device operators")
        return
    inspection = inspect_artifact(target, tokens, patches, trusted_key or None)
    if as_json:
        result_json(dataclasses.asdict(inspection))
    else:
        render(inspection, stdout())
    if trusted_key and not (inspection.signed and inspection.signed.trusted):
        fail(f"{target}: not signed by a trusted key, see the signature in the report")
        raise typer.Exit(FAILED)


def doctor(
    artifact: Annotated[
        Path | None, typer.Argument(metavar="[ARTIFACT]", help="Also ask CANN for the operators that it uses.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what this machine can build and run, and what to install for the rest."""
    from ..host.doctor import diagnose, render
    from .console import result_json, stdout

    diagnosis = diagnose(artifact)
    if as_json:
        result_json(dataclasses.asdict(diagnosis))
    else:
        render(diagnosis, stdout())
