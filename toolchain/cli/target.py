"""What graphs are compiled for: the options of compile and build."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ...artifacts.soc import DEFAULT_SOC
from .options import Dtype
from .values import batches, dump, passes, releases

if TYPE_CHECKING:
    from ..build.compile import CompileOptions

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
Dump = Annotated[str | None, typer.Option("--dump", metavar="pbtxt", help="Also write a readable copy of each graph.")]
Passes = Annotated[
    str | None,
    typer.Option(
        "--passes", metavar="NAME,...", help="Graph passes to run, for debugging: all (default), none, names."
    ),
]
MustAdmit = Annotated[
    str | None,
    typer.Option("--cann", metavar="RELEASE,...", help="CANN releases that must take the graphs, such as 9.0,9.1."),
]


@dataclass(frozen=True)
class GivenTarget:
    """As typed, in the order of the help."""

    soc: Soc = DEFAULT_SOC
    max_length: MaxLength = None
    batch: Batch = "1"
    dtype: Dtype = None
    operators: Operators = "fused"
    visual_attention: VisualAttention = "segments"
    dump_format: Dump = None
    pass_names: Passes = None
    cann: MustAdmit = None

    def parsed(self) -> "CompileOptions":
        """Raises TargetError for what cannot be meant; values are checked with the model at hand."""
        from ..build.compile import CompileOptions

        return CompileOptions(
            soc=self.soc,
            max_length=self.max_length,
            batches=batches(self.batch),
            dtype=self.dtype,
            dump_pbtxt=dump(self.dump_format),
            operators=self.operators,
            visual_attention=self.visual_attention,
            passes=passes(self.pass_names),
            cann=releases(self.cann) if self.cann else (),
        )
