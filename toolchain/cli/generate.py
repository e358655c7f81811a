"""The commands that answer: generate and chat."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...artifacts.errors import RequestError
from .options import Artifact, ExecuteMode, TrustedKeys, examples
from .values import chat_messages, check_sources, requests_file, vision_options

if TYPE_CHECKING:
    from ...runtime import Model
    from ...runtime.pictures.request import VisionOptions

GENERATE_EXAMPLES = examples(
    "qwen2vl-tc generate qwen2-vl-7b.artifact --image cat.jpg --prompt 'What is this?'",
    "qwen2vl-tc generate qwen2-vl-7b.artifact --image a.png --image b.png --prompt 'What differs?' --json",
    "qwen2vl-tc generate qwen2-vl-7b.artifact --prompt 'A poem.' --sample --top-k 50 --temperature 0.8 --seed 1",
    "qwen2vl-tc generate qwen2-vl-7b.artifact --video clip.mp4 --prompt 'What happens?' --max-pixels 200704",
    "qwen2vl-tc generate qwen2-vl-7b.artifact --requests requests.jsonl",
)
CHAT_EXAMPLES = examples(
    "qwen2vl-tc chat qwen2-vl-7b.artifact",
    "qwen2vl-tc chat qwen2-vl-7b.artifact --image cat.jpg --system 'Answer in one word.'",
    "qwen2vl-tc chat qwen2-vl-7b.artifact --video clip.mp4",
)

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
    int | None, typer.Option("--max-new-tokens", metavar="N", help="Default: the model's own, or 128.")
]
MinNewTokens = Annotated[
    int | None, typer.Option("--min-new-tokens", metavar="N", help="No end of the answer before so many tokens.")
]
Sample = Annotated[
    bool | None,
    typer.Option(
        "--sample/--greedy", help="Draw tokens, or take the most likely one. Default: as the model's own settings say."
    ),
]
Temperature = Annotated[float | None, typer.Option("--temperature", metavar="X", help="Default: the model's own.")]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="N", help="Draw among the N most likely tokens; 0: among all.")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="X", help="Draw among the likely tokens that together reach X.")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", metavar="X", help="Above 1: what was said already becomes less likely."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Makes --sample repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends an answer that says so; repeat it for several.")
]


def generate(
    artifact: Artifact,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to ask.")] = None,
    image: Image = None,
    video: Video = None,
    system: System = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--requests",
            metavar="FILE",
            # a bracket before a letter would be markup
            help='JSON lines, each \\[messages] or {"messages": [...]}: answered together, as batches.',
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    do_sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    video_sampling: VideoSampling = "qwen",
    picture_modes: PictureModes = "viewer",
    allow_http: AllowHttp = False,
    backend: Backend = None,
    execute_mode: ExecuteMode = None,
    trusted_key: TrustedKeys = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead; with --requests, one a line.")
    ] = False,
) -> None:
    """Answer a prompt about pictures, or about nothing but text. The text comes to stdout as it is made."""
    settings = _settings(locals())
    vision = vision_options(min_pixels, max_pixels, video_sampling, picture_modes, allow_http)
    from .console import result, result_json, write_text

    if (prompt is None) == (requests is None):
        raise RequestError("give --prompt TEXT, or --requests FILE for several requests at once")
    if requests is not None and (image or video or system is not None):
        raise RequestError("--requests holds whole messages: put pictures, videos and system messages into the file")
    messages = chat_messages(prompt or "", image or [], video or [], system)
    asked = [messages] if requests is None else requests_file(requests)
    for number, each in enumerate(asked):
        check_sources(each, vision, "" if requests is None else f"requests[{number}]: ")
    model = _loaded(artifact, backend, execute_mode, trusted_key)
    if requests is not None:
        _answer_batch(model, asked, vision, settings, as_json)
        return
    if as_json:
        result_json(dataclasses.asdict(model.generate(messages, vision=vision, **settings)))
        return
    written = False
    with closing(model.stream(messages, vision=vision, **settings)) as pieces:
        try:
            for piece in pieces:
                written = True
                write_text(piece)
        finally:
            # an answer that was cut short ends its line, too
            if written:
                result("")


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """A command's options that are settings of the runtime, by their names there."""
    from ...runtime.requests.settings import GivenSettings

    given = {name: options[name] for name in GivenSettings.__annotations__ if name in options}
    # an option that may be repeated and was not is None or empty, by typer's version
    return {**given, "stop": given["stop"] or None}


def _loaded(artifact: Path, backend: str | None, execute_mode: str | None, trusted_keys: list[Path] | None) -> "Model":
    from ...runtime import load
    from ..host.execute_mode import engine
    from .console import note

    # an option that may be repeated and was not is None or empty, by typer's version
    model = load(artifact, engine(execute_mode, backend), trusted_keys=trusted_keys or None)
    note(f"backend: {model.backend.name} ({model.reason})")
    return model


def _answer_batch(
    model: "Model", requests: list[Any], vision: "VisionOptions", settings: dict[str, Any], as_json: bool
) -> None:
    """One line of JSON, or one numbered text, for every request."""
    from .console import result_json, token_progress, write_text

    number = 0
    with token_progress("generate") as made:
        for group in model.answer_groups(requests, vision=vision, on_token=lambda token: made(), **settings):
            for answer in group:
                if as_json:
                    result_json(dataclasses.asdict(answer), indent=None)
                else:
                    write_text(f"[{number}] {answer.text}\n")
                number += 1


def chat(
    artifact: Artifact,
    image: Image = None,
    video: Video = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    do_sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    video_sampling: VideoSampling = "qwen",
    picture_modes: PictureModes = "viewer",
    allow_http: AllowHttp = False,
    backend: Backend = None,
    execute_mode: ExecuteMode = None,
    trusted_key: TrustedKeys = None,
) -> None:
    """Talk with the model: every turn computes only what is new. /image FILE shows it a picture; /help says more."""
    settings = _settings(locals())
    vision = vision_options(min_pixels, max_pixels, video_sampling, picture_modes, allow_http)
    from .chat import run_chat

    check_sources(chat_messages("", image or [], video or [], system), vision)
    conversation = _loaded(artifact, backend, execute_mode, trusted_key).chat(system, vision)
    run_chat(conversation, image or [], video or [], settings)
