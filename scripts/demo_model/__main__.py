"""Make and measure the demo model: `python -m scripts.demo_model train | evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from qwen2vl_tc.toolchain.cli.console import result
from qwen2vl_tc.toolchain.cli.errors import Commands
from qwen2vl_tc.toolchain.demo import CHECKPOINT
from qwen2vl_tc.toolchain.verify.transformers_import import import_transformers

app = typer.Typer(cls=Commands, add_completion=False, help=__doc__)


@app.command()
def train(out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the checkpoint.")]) -> None:
    """Train the model from scratch on the CPU."""
    import_transformers()
    from .train import train

    train(out)


@app.command()
def evaluate(
    src: Annotated[
        Path, typer.Option(metavar="DIR", help="The checkpoint; default: the one in this package.")
    ] = CHECKPOINT,
    artifact: Annotated[
        Path | None, typer.Option(metavar="ARTIFACT", help="Ask this artifact of it, through the runtime, instead.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Held-out pictures and clips.")] = 200,
) -> None:
    """Print the share of right answers on held-out scenes, by kind of question."""
    from .evaluate import answer_by_artifact, answer_by_transformers, score

    if artifact is None:
        import_transformers()
    scores = score(answer_by_artifact(artifact) if artifact else answer_by_transformers(src), scenes)
    for kind, each in scores.items():
        result(f"{kind:12} {each.right:5} of {each.asked:5}  {each.share:7.1%}")


if __name__ == "__main__":
    app()
