"""What is asked, how it is answered and by which engine: the options of generate, chat, bench and selftest."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...runtime.requests.settings import SETTINGS
from .options import TrustedKeys

if TYPE_CHECKING:
    from ...runtime import Model
    from ...runtime.pictures.request import VisionOptions

Image = Annotated[
    list[str] | None, typer.Option("--image", metavar="FILE", help="A picture; repeat it for several, in order.")
]
Video = Annotated[
    list[str] | None, typer.Option("--video", metavar="FILE", help="A video; repeat it for several, in order.")
]
MinPixels = Annotated[
    int | None, typer.Option("--min-pixels", metavar="N", help="Least area of a resized picture or frame.")
]
MaxPixels = Annotated[
    int | None, typer.Option("--max-pixels", metavar="N", help="Largest area of a resized picture or frame.")
]
VideoSampling = Annotated[
    str,
    typer.Option(
        "--video-sampling",
        metavar="RULE",
        help="qwen or transformers. Which frames: as qwen-vl-utils takes them (2 a second), or as transformers does "
        "(all).",
    ),
]
PictureModes = Annotated[
    str,
    typer.Option(
        "--picture-modes",
        metavar="RULE",
        help="viewer or transformers. Transparent, 16-bit and float pictures: as a viewer shows them, or with "
        "transformers' bits.",
    ),
]
AllowHttp = Annotated[
    bool, typer.Option("--allow-http", help="Fetch pictures and videos from http(s) URLs. For requests you trust.")
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="Replaces the chat template's own system message.")
]
Backend = Annotated[
    str | None,
    typer.Option(
        # not reference|onnxruntime|npu: the names of options are cut where this column is wide
        "--backend",
        metavar="ENGINE",
        help="reference, onnxruntime or npu: what runs the graphs. Default: the best here.",
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", help=SETTINGS["max_new_tokens"].help)
]
MinNewTokens = Annotated[
    int | None, typer.Option("--min-new-tokens", metavar="N", help=SETTINGS["min_new_tokens"].help)
]
Sample = Annotated[
    bool | None,
    typer.Option("--sample/--greedy", help=SETTINGS["do_sample"].help),
]
Temperature = Annotated[float | None, typer.Option("--temperature", metavar="X", help=SETTINGS["temperature"].help)]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="N", help=SETTINGS["top_k"].help)]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="X", help=SETTINGS["top_p"].help)]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", metavar="X", help=SETTINGS["repetition_penalty"].help),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help=SETTINGS["seed"].help)]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help=SETTINGS["stop"].help)]
ExecuteMode = Annotated[
    str | None,
    typer.Option(
        "--execute-mode",
        metavar="dynamo|eager",
        help="dynamo: the compiled graphs. eager: the modules behind them, operator by operator. "
        "Default: EXE_MODE, or dynamo.",
    ),
]


@dataclass(frozen=True)
class GivenPictures:
    """What a question shows, in order."""

    image: Image = None
    video: Video = None

    @property
    def images(self) -> list[str]:
        return self.image or []

    @property
    def videos(self) -> list[str]:
        return self.video or []


@dataclass(frozen=True)
class GivenSampling:
    """How long an answer gets, and how its tokens are chosen; None is the model's own."""

    max_new_tokens: MaxNewTokens = None
    min_new_tokens: MinNewTokens = None
    do_sample: Sample = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    repetition_penalty: RepetitionPenalty = None
    seed: Seed = None
    stop: Stop = None

    def settings(self) -> dict[str, Any]:
        """The runtime's settings, by their names there."""
        # an option that may be repeated and was not is None or empty, by typer's version
        return {**dataclasses.asdict(self), "stop": self.stop or None}


@dataclass(frozen=True)
class GivenVision:
    """How pictures and clips are read."""

    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    video_sampling: VideoSampling = "qwen"
    picture_modes: PictureModes = "viewer"
    allow_http: AllowHttp = False

    def parsed(self) -> "VisionOptions":
        """Raises RequestError for an unknown sampling or modes, and for bounds that make no sense."""
        from ...runtime.pictures.request import VisionOptions
        from ...runtime.pictures.sources import HttpLimits

        return VisionOptions(
            self.min_pixels,
            self.max_pixels,
            self.video_sampling,
            HttpLimits(allowed=self.allow_http),
            picture_modes=self.picture_modes,
        )


@dataclass(frozen=True)
class GivenEngine:
    """What runs the graphs, and whose artifacts it takes."""

    backend: Backend = None
    execute_mode: ExecuteMode = None
    trusted_key: TrustedKeys = None

    @property
    def trusted_keys(self) -> list[Path] | None:
        # an option that may be repeated and was not is None or empty, by typer's version
        return self.trusted_key or None

    def load(self, artifact: Path) -> "Model":
        """The model, ready to answer; which engine was chosen is said."""
        from ...runtime import load
        from ..host.execute_mode import engine
        from .console import note

        model = load(artifact, engine(self.execute_mode, self.backend), trusted_keys=self.trusted_keys)
        note(f"backend: {model.backend.name} ({model.reason})")
        return model
