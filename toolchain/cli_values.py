"""The options' values: what a user typed, checked."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.errors import ConfigError, RequestError, TargetError

if TYPE_CHECKING:
    from ..runtime.pictures import VisionOptions

MODES = ("dynamo", "onnx", "air")
DUMPS = ("pbtxt",)
_MAX_REQUESTS_BYTES = 256 << 20


def batches(text: str) -> tuple[int, ...]:
    """`1,4` to (1, 4); their range is checked with the model at hand."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise TargetError(f"--batch {text}: expected batch sizes separated by commas, such as 1,4") from error


def passes(text: str | None) -> tuple[str, ...] | None:
    """`all` (None), `none`, or names separated by commas. Raises TargetError for an unknown one."""
    from ..exporters.torchair.passes import PASSES

    if text is None or text == "all":
        return None
    names = () if text == "none" else tuple(text.split(","))
    if unknown := [name for name in names if name not in PASSES]:
        raise TargetError(f"--passes {', '.join(unknown)}: unknown; there are all, none, {', '.join(PASSES)}")
    return names


def dump(text: str | None) -> bool:
    """Whether a readable copy of each graph is wanted. Raises TargetError for another format than pbtxt."""
    if text is not None and text not in DUMPS:
        raise TargetError(f"--dump {text}: expected {', '.join(DUMPS)}")
    return text is not None


def check_mode(mode: str) -> None:
    """Raises TargetError for a mode that this version cannot compile to."""
    if mode not in MODES:
        raise TargetError(f"--mode {mode}: expected one of {', '.join(MODES)}")


def config_file(path: Path) -> Path:
    """A config.json, named itself or by its folder. Raises ConfigError for what is there and is no file: reading a pipe
    or a device may never end."""
    found = path / "config.json" if path.is_dir() else path
    if found.exists() and not found.is_file():
        raise ConfigError(f"{found}: not a file; --config is a config.json, or the folder of one")
    return found


def check_source(src: Path) -> None:
    """Raises ConfigError unless there is a folder to read a checkpoint from."""
    if not src.exists():
        raise ConfigError(f"{src}: no such folder; --src is a checkpoint as downloaded from Hugging Face")
    if not src.is_dir():
        raise ConfigError(f"{src}: is a file; --src is the checkpoint's folder")


def chat_messages(prompt: str, images: list[str], videos: list[str], system: str | None) -> list[dict[str, Any]]:
    """One question in the form that the runtime takes: pictures first, as the model was trained."""
    pictures = [*(("image", path) for path in images), *(("video", path) for path in videos)]
    content = [*({"type": kind, kind: path} for kind, path in pictures), {"type": "text", "text": prompt}]
    question = {"role": "user", "content": content}
    return [question] if system is None else [{"role": "system", "content": system}, question]


def vision_options(
    min_pixels: int | None, max_pixels: int | None, video_sampling: str, allow_http: bool
) -> "VisionOptions":
    """Raises RequestError for an unknown sampling; the numbers are checked with each picture."""
    from ..runtime.pictures import VisionOptions
    from ..runtime.sources import HttpLimits

    return VisionOptions(min_pixels, max_pixels, video_sampling, HttpLimits(allowed=allow_http))


def _read(path: Path) -> bytes:
    """A file, or what comes through a pipe. Raises RequestError for one without an end."""
    # a pipe that nobody writes into is an empty one: opened as usual, it would wait for a writer
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(fd, True)
    with open(fd, "rb") as file:
        data = file.read(_MAX_REQUESTS_BYTES + 1)
    if len(data) > _MAX_REQUESTS_BYTES:
        raise RequestError(f"{path}: more than {_MAX_REQUESTS_BYTES >> 20} MB; ask in several runs")
    return data


def requests_file(path: Path) -> list[Any]:
    """A file of JSON lines, each a list of messages. Raises RequestError for a line that is no JSON, or no line."""
    try:
        # not splitlines: JSON may hold characters that it takes for the end of a line
        lines = _read(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}:{number}: not JSON: {error}") from error
    if not found:
        raise RequestError(f"{path}: has no requests; each line is a list of messages as JSON")
    return found
