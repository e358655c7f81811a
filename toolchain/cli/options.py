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
Mode = Annotated[
    str,
    typer.Option(
        "--mode",
        metavar="dynamo|air|onnx",
        help="dynamo: GE graphs for torchair. air: offline models for ATC from those graphs. onnx: for CPUs, "
        "translated from those graphs, too; where there are none, they are traced for this and not kept.",
    ),
]
Soc = Annotated[str, typer.Option("--soc", metavar="NAME", help="The SoC to compile for; none needs to be here.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        metavar="N",
        help="Tokens that the KV cache holds: prompt and answer together. Default: 8192, or what the model can.",
    ),
]
Batch = Annotated[
    str, typer.Option("--batch", metavar="N,...", help="Batch sizes to decode with, one graph each, such as 1,4.")
]
Dump = Annotated[str | None, typer.Option("--dump", metavar="pbtxt", help="Also write a readable copy of each graph.")]
Operators = Annotated[
    str,
    typer.Option(
        "--operators",
        metavar="fused|recipe",
        help="recipe: PromptFlashAttention and IncreFlashAttention, for a CANN that refuses the fused operator.",
    ),
]
VisualAttention = Annotated[
    str,
    typer.Option(
        "--visual-attention",
        metavar="segments|tnd",
        help="segments: a run for each size of picture. tnd: one run for pictures of any sizes, for many small ones; "
        "takes CANN 9.0 or newer.",
    ),
]
MustAdmit = Annotated[
    str | None,
    typer.Option("--cann", metavar="RELEASE,...", help="CANN releases that must take the graphs, such as 9.0,9.1."),
]
ExecuteMode = Annotated[
    str | None,
    typer.Option(
        "--execute-mode",
        metavar="dynamo|eager",
        help="dynamo: the compiled graphs. eager: the modules behind them, operator by operator. "
        "Default: EXE_MODE, or dynamo.",
    ),
]
TrustedKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--trusted-key", metavar="PEM", help="Refuse what this public key has not signed; repeat it for several keys."
    ),
]
Weights = Annotated[
    str,
    typer.Option("--weights", metavar="int8|int4|fp32|fp16", help="With --mode onnx: how weights are stored."),
]
StandardOnly = Annotated[
    bool, typer.Option("--standard-only", help="With --mode onnx: no operator outside the ONNX standard.")
]
Passes = Annotated[
    str | None,
    typer.Option(
        "--passes", metavar="NAME,...", help="Graph passes to run, for debugging: all (default), none, names."
    ),
]
