"""Options and arguments that several commands take, each worded once."""

from pathlib import Path
from typing import Annotated

import typer


def examples(*lines: str) -> str:
    """An epilog with one line each; typer keeps line breaks between paragraphs only, and reads brackets as markup."""
    return "\n\n".join(["[bold]Examples[/bold]", *(line.replace("[", "\\[") for line in lines)])


Src = Annotated[
    Path,
    typer.Option("--src", metavar="DIR", help="The Hugging Face checkpoint: config.json, *.safetensors, tokenizer."),
]
OptionalArtifact = Annotated[
    Path | None, typer.Argument(metavar="[ARTIFACT]", help="Default: the only artifact in the current folder.")
]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The artifact's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
NoSync = Annotated[
    bool, typer.Option("--no-sync", help="Do not wait until all is on the disk: faster, and not safe in a power cut.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="bf16|fp16|fp32", help="Default: the dtype of the weights.")
]
TrustedKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--trusted-key", metavar="PEM", help="Refuse what this public key has not signed; repeat it for several keys."
    ),
]
