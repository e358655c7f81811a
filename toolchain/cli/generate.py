"""The commands that answer: generate and chat."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...artifacts.errors import RequestError
from ..words import question
from .asking import GivenEngine, GivenPictures, GivenSampling, GivenVision, System
from .options import Artifact
from .values import check_sources, requests_file

if TYPE_CHECKING:
    from ...runtime import Model
    from ...runtime.pictures.request import VisionOptions

GENERATE_EXAMPLES = (
    "qwen2vl-tc generate qwen2-vl-7b.artifact --image cat.jpg --prompt 'What is this?'",
    "qwen2vl-tc generate qwen2-vl-7b.artifact --image a.png --image b.png --prompt 'What differs?' --json",
    "qwen2vl-tc generate qwen2-vl-7b.artifact --prompt 'A poem.' --sample --top-k 50 --temperature 0.8 --seed 1",
    "qwen2vl-tc generate qwen2-vl-7b.artifact --video clip.mp4 --prompt 'What happens?' --max-pixels 200704",
    "qwen2vl-tc generate qwen2-vl-7b.artifact --requests requests.jsonl",
)
CHAT_EXAMPLES = (
    "qwen2vl-tc chat qwen2-vl-7b.artifact",
    "qwen2vl-tc chat qwen2-vl-7b.artifact --image cat.jpg --system 'Answer in one word.'",
    "qwen2vl-tc chat qwen2-vl-7b.artifact --video clip.mp4",
)


def generate(
    artifact: Artifact,
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to ask.")] = None,
    pictures: GivenPictures,
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
    sampling: GivenSampling,
    vision: GivenVision,
    engine: GivenEngine,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead; with --requests, one a line.")
    ] = False,
) -> None:
    """Answer a prompt about pictures, or about nothing but text. The text comes to stdout as it is made."""
    settings, options = sampling.settings(), vision.parsed()
    from .console import result, result_json, write_text

    if (prompt is None) == (requests is None):
        raise RequestError("give --prompt TEXT, or --requests FILE for several requests at once")
    if requests is not None and (pictures.image or pictures.video or system is not None):
        raise RequestError("--requests holds whole messages: put pictures, videos and system messages into the file")
    messages = question(prompt or "", pictures.images, pictures.videos, system)
    asked = [messages] if requests is None else requests_file(requests)
    for number, each in enumerate(asked):
        check_sources(each, options, "" if requests is None else f"requests[{number}]: ")
    model = engine.load(artifact)
    if requests is not None:
        _answer_batch(model, asked, options, settings, as_json)
        return
    if as_json:
        result_json(dataclasses.asdict(model.generate(messages, vision=options, **settings)))
        return
    written = False
    with closing(model.stream(messages, vision=options, **settings)) as pieces:
        try:
            for piece in pieces:
                written = True
                write_text(piece)
        finally:
            # an answer that was cut short ends its line, too
            if written:
                result("")


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
    *,
    pictures: GivenPictures,
    system: System = None,
    sampling: GivenSampling,
    vision: GivenVision,
    engine: GivenEngine,
) -> None:
    """Talk with the model: every turn computes only what is new. /image FILE shows it a picture; /help says more."""
    settings, options = sampling.settings(), vision.parsed()
    from .chat import run_chat

    check_sources(question("", pictures.images, pictures.videos, system), options)
    conversation = engine.load(artifact).chat(system, options)
    run_chat(conversation, pictures.images, pictures.videos, settings)
