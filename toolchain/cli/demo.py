"""The command for whoever has no checkpoint at hand: it goes the whole way, by the commands that a user types."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ...artifacts.errors import ToolchainError
from ..progress import Displays
from ..words import command, question
from .asking import GivenEngine
from .console import bytes_progress, result, stdout, step_progress, write_text

EXAMPLES = (
    "qwen2vl-tc demo",
    "qwen2vl-tc demo --out /tmp/demo",
    "qwen2vl-tc demo --no-keep",
)


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: ./qwen2vl-tc-demo, which git ignores.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep what was made, or delete it at the end.")] = True,
) -> None:
    """No weights at hand: take a tiny trained model, build it, ask it about a picture and inspect it."""
    from ..demo.demo import DEFAULT_FOLDER, prepare, remove

    folder = out or DEFAULT_FOLDER
    begin = time.perf_counter()
    prepare(folder)
    try:
        _show(folder, keep, begin)
    finally:
        if not keep:
            remove(folder)


def _show(folder: Path, keep: bool, begin: float) -> None:
    """Each command, and what comes of it.

    Raises ToolchainError if verification fails, or if the model's answer is wrong.
    """
    from ..build.build import build
    from ..build.compile import CompileOptions
    from ..demo import demo as made
    from ..inspect.inspect import inspect_artifact, render

    src, artifact, picture = folder / made.CHECKPOINT, folder / made.ARTIFACT, folder / made.PICTURE
    _title("1. A tiny checkpoint, trained on pictures of coloured shapes, and a picture that it has never seen")
    result(f"{src}: in the form that Hugging Face publishes, but tiny")
    result(f"{picture}: {', '.join(f'{thing} at the {thing.where}' for thing in made.SCENE.things)}")

    _title("2. Build: convert the weights, compile the graphs, verify both against transformers")
    _typed("build", "--src", src, "--out", artifact, "--max-length", made.MAX_LENGTH)
    displays = Displays(bytes_progress, step_progress)
    built = build(src, artifact, options=CompileOptions(max_length=made.MAX_LENGTH), displays=displays)
    if built.report is not None:
        from ..verify.render import render as render_report

        render_report(built.report, stdout())
    if not built.committed:
        raise ToolchainError(f"{artifact}: verification failed; `qwen2vl-tc doctor` shows what is installed here")

    _title("3. Generate: the runtime loads the artifact, traces nothing, and answers")
    _typed("generate", artifact, "--image", picture, "--prompt", made.PROMPT, "--max-new-tokens", made.NEW_TOKENS)
    model = GivenEngine().load(artifact)
    try:
        answer = model.generate(question(made.PROMPT, [str(picture)]), max_new_tokens=made.NEW_TOKENS)
    finally:
        model.close()
    write_text(answer.text)
    result("")
    if answer.text != made.EXPECTED:
        raise ToolchainError(f"{artifact}: answered {answer.text!r}, expected {made.EXPECTED!r}; please report this")
    result("The picture shows just that.")

    _title("4. Inspect: what is in the artifact")
    _typed("inspect", artifact)
    inspection = inspect_artifact(artifact)
    render(inspection, stdout())

    _title("Summary")
    for line in made.summary(made.DemoResult(folder, built, answer, inspection, time.perf_counter() - begin), keep):
        result(line)


def _title(text: str) -> None:
    console = stdout()
    console.print()
    console.print(text, style="bold")


def _typed(*words: "str | int | Path") -> None:
    result("$ " + command("qwen2vl-tc", *words))
