"""The small files of a checkpoint: regular, of a size that a load accepts, within the folder, and strict JSON."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

from ...artifacts.errors import ArtifactError, ConfigError, ToolchainError
from ...artifacts.schema import parse_json

# what a load reads at most of one file; the largest there is, tokenizer.json, has 7 to 11 MB
MAX_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"


def read_file(folder: Path, name: str, error_type: type[ToolchainError] = ConfigError) -> bytes | None:
    """The bytes of a file of the checkpoint; None where there is none.

    A link must stay in the folder, or lead from a snapshot of Hugging Face's cache to that model's blobs. Raises
    `error_type` for other links, for what is no regular file, and for more than MAX_BYTES.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        if not _belongs(real, folder.resolve()):
            raise error_type(f"{path}: leads out of the checkpoint's folder, to {real}; copy the file there instead")
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise error_type(f"{path}: is a link to a file that is not there; download it again") from error
        return None
    except (OSError, RuntimeError) as error:  # RuntimeError: Python 3.10 to 3.12 say so of links in a circle
        raise error_type(f"{path}: cannot read: {_reason(error)}") from error
    try:
        data = _contents(fd, path, error_type)
    except OSError as error:
        raise error_type(f"{path}: cannot read: {_reason(error)}") from error
    finally:
        os.close(fd)
    if len(data) > MAX_BYTES:
        raise error_type(f"{path}: grew while it was read; is it still being downloaded?")
    return data


def _contents(fd: int, path: Path, error_type: type[ToolchainError]) -> bytes:
    """Up to one byte more than MAX_BYTES."""
    status = os.fstat(fd)
    # first: Python makes no file object of a folder
    if not stat.S_ISREG(status.st_mode):
        raise error_type(f"{path}: is not a regular file")
    if status.st_size > MAX_BYTES:
        raise error_type(
            f"{path}: has {status.st_size} bytes, at most {MAX_BYTES}: that is no such file; download it again"
        )
    with open(fd, "rb", closefd=False) as file:
        return file.read(MAX_BYTES + 1)


def read_object(folder: Path, name: str, error_type: type[ToolchainError] = ConfigError) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file. Raises `error_type` naming the file, as read_file does."""
    data = read_file(folder, name, error_type)
    return None if data is None else parse_object(data, folder / name, error_type)


def parse_object(data: bytes, path: Path, error_type: type[ToolchainError] = ConfigError) -> dict[str, Any]:
    """What `data`, read from `path`, says as JSON. Raises `error_type`."""
    if data.startswith(_BOM):
        raise error_type(
            f"{path}: begins with a byte-order mark, which JSON must not and transformers refuses; save it as UTF-8 "
            "without one"
        )
    try:
        value = parse_json(data, str(path))
    except ArtifactError as error:
        raise error_type(str(error)) from error
    if not isinstance(value, dict):
        raise error_type(f"{path}: expected a JSON object")
    return value


def _belongs(real: Path, folder: Path) -> bool:
    """Whether what a path leads to is part of the checkpoint."""
    if real.is_relative_to(folder):
        return True
    # models--<owner>--<name>/snapshots/<revision>/<file> -> ../../blobs/<hash>
    return folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno != errno.ELOOP and error.strerror:
        return error.strerror
    return "links in a circle"
