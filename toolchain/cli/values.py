"""The options' values: what a user typed, checked."""

import codecs
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifacts.cann import RELEASES, cann_release
from ...artifacts.errors import ArtifactError, ConfigError, RequestError, TargetError

if TYPE_CHECKING:
    from ...runtime.pictures.request import VisionOptions

MODES = ("dynamo", "onnx", "air")
DUMPS = ("pbtxt",)
_MAX_REQUESTS_BYTES = 256 << 20


def batches(text: str) -> tuple[int, ...]:
    """`1,4` to (1, 4); their range is checked with the model at hand."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise TargetError(f"--batch {text}: expected batch sizes separated by commas, such as 1,4") from error


def releases(text: str, option: str = "--cann") -> tuple[str, ...]:
    """`8.5,9.0.0` to ("8.5", "9.0"). Raises TargetError for a release that no rule speaks of."""
    named = tuple(dict.fromkeys(cann_release(part) or part for part in text.split(",")))
    if unknown := [name for name in named if name not in RELEASES]:
        raise TargetError(f"{option} {', '.join(unknown)}: expected some of {', '.join(RELEASES)}, such as 8.5,9.0")
    return named


def passes(text: str | None) -> tuple[str, ...] | None:
    """`all` (None), `none`, or names separated by commas. Raises TargetError for an unknown one."""
    from ...exporters.torchair.passes import PASSES

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
    file = path / "config.json" if path.is_dir() else path
    if file.exists() and not file.is_file():
        raise ConfigError(f"{file}: not a file; --config is a config.json, or the folder of one")
    return file


def check_source(src: Path) -> None:
    """Raises ConfigError unless there is a folder to read a checkpoint from."""
    if not src.exists():
        raise ConfigError(f"{src}: no such folder; --src is a checkpoint as downloaded from Hugging Face")
    if not src.is_dir():
        raise ConfigError(f"{src}: is a file; --src is the checkpoint's folder")


def _read(path: Path) -> bytes:
    """A file, or what comes through a pipe. Raises RequestError for what cannot be read and what has no end."""
    try:
        # a pipe that nobody writes into is an empty one: opened as usual, it would wait for a writer
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.set_blocking(fd, True)
            with open(fd, "rb", closefd=False) as file:
                data = file.read(_MAX_REQUESTS_BYTES + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise RequestError(
            f"{path}: cannot read: {error.strerror}; --requests is a file of JSON lines, each a list of messages"
        ) from error
    if len(data) > _MAX_REQUESTS_BYTES:
        raise RequestError(f"{path}: more than {_MAX_REQUESTS_BYTES >> 20} MB; ask in several runs")
    return data


def requests_file(path: Path) -> list[Any]:
    """A file of JSON lines, each a list of messages or {"messages": that list}, a byte order mark before them or not.

    Raises RequestError, naming the line, for what is neither, for a key that stands twice, and where no line is.
    """
    from ...artifacts.schema import parse_json

    requests = []
    # not splitlines: JSON may hold characters that it takes for the end of a line
    for number, line in enumerate(_read(path).removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            try:
                requests.append(_messages(parse_json(line, f"{path}:{number}"), f"{path}:{number}"))
            except ArtifactError as error:
                raise RequestError(str(error)) from error
    if not requests:
        raise RequestError(f"{path}: has no requests; each line is a list of messages as JSON")
    return requests


def _messages(request: Any, where: str) -> Any:
    if not isinstance(request, dict):
        return request
    if set(request) != {"messages"}:
        raise RequestError(
            f"{where}: an object with {', '.join(request) or 'no keys'}, expected a list of messages or "
            '{"messages": [...]}; pictures and clips are items of the messages'
        )
    return request["messages"]


def check_sources(messages: Any, vision: "VisionOptions", where: str = "") -> None:
    """Raises RequestError, which starts with `where`, for what is no list of messages and for a picture or video that
    is missing: before the minutes that loading may take. `prepare` checks the rest.
    """
    from ...runtime.pictures.sources import check_there, describe
    from ...runtime.text.messages import vision_items

    try:
        # a string is a prompt without messages
        for item in [] if isinstance(messages, str) else vision_items(messages, (), (), {}):
            for source in item.source if isinstance(item.source, list) else [item.source]:
                check_there(f"{item.where}: {describe(source, item.kind)}", source, vision.http)
    except RequestError as error:
        raise RequestError(f"{where}{error}") from error
