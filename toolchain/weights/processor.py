"""The small files of a checkpoint that the runtime needs: tokenizer, chat template, image processor, generation."""

from pathlib import Path
from typing import Any

from ...artifacts.errors import ConfigError
from ...artifacts.manifest import FileEntry
from ...artifacts.schema import dump_json
from ...artifacts.staging import Staging
from .source import read_json

TOKENIZER = "tokenizer.json"
PREPROCESSOR = "preprocessor_config.json"
# transformers 5 saves the image processor inside this one
_JOINT = "processor_config.json"
_OPTIONAL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """The image processor's settings. Raises ConfigError if the checkpoint has none."""
    if (folder / PREPROCESSOR).is_file():
        return read_json(folder / PREPROCESSOR)
    if (folder / _JOINT).is_file():
        inner = read_json(folder / _JOINT).get("image_processor")
        if isinstance(inner, dict):
            return inner
    raise ConfigError(
        f"{folder}: {PREPROCESSOR} is missing; it says how pictures are normalized: download it from the model's page"
    )


def check_tokenizer(folder: Path) -> None:
    """Raise ConfigError unless there is a tokenizer.json."""
    if (folder / TOKENIZER).is_file():
        return
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        raise ConfigError(
            f"{folder}: {TOKENIZER} is missing, only vocab.json and merges.txt are there; make it with transformers: "
            f"python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\""
        )
    raise ConfigError(f"{folder}: {TOKENIZER} is missing; download it from the model's page")


def copy_processor(folder: Path, staging: Staging) -> tuple[FileEntry, ...]:
    """Stage the files under processor/. Raises ConfigError if tokenizer.json or preprocessor_config.json is missing."""
    check_tokenizer(folder)
    entries = [
        staging.add(f"processor/{TOKENIZER}", (folder / TOKENIZER).read_bytes()),
        staging.add(f"processor/{PREPROCESSOR}", dump_json(read_preprocessor(folder))),
    ]
    for name in _OPTIONAL:
        if (folder / name).is_file():
            entries.append(staging.add(f"processor/{name}", (folder / name).read_bytes()))
    return tuple(entries)
