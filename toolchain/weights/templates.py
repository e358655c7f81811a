"""The chat template: six places may hold one, and transformers' Qwen2VLProcessor decides which counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifacts.errors import ConfigError
from ...artifacts.schema import shown
from .files import read_file, read_object

JOINT = "processor_config.json"
_LEGACY = "chat_template.json"
_PLAIN = "chat_template.jinja"
_NAMED_FOLDER = "additional_chat_templates"
_NAMED_DEFAULT = f"{_NAMED_FOLDER}/default.jinja"


@dataclass(frozen=True)
class Template:
    """The template that counts, or None where no file has one; `note` names those that say something else."""

    source: str | None
    note: str | None


def decide_template(folder: Path, joint: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> Template:
    """The first of processor_config.json, chat_template.json, chat_template.jinja, the default among the named ones.

    Only where the processor has none does the tokenizer's own count (tokenizer_config.json): transformers' processor
    then asks for one, its tokenizer does not. Raises ConfigError where transformers fails: for chat_template.json
    beside named templates, and for named ones without a default.
    """
    templates: dict[str, str] = {}
    _keep(templates, folder, JOINT, joint.get("chat_template"), listed=False)
    legacy = read_object(folder, _LEGACY)
    named = sorted((folder / _NAMED_FOLDER).glob("*.jinja"))
    if legacy is not None:
        if named:
            raise ConfigError(
                f"{folder}: transformers refuses {_LEGACY} beside {_NAMED_FOLDER}/{named[0].name}; rename {_LEGACY} to "
                f"{_PLAIN}, its text alone, or remove {_NAMED_FOLDER}"
            )
        if "chat_template" not in legacy:
            raise ConfigError(f"{folder / _LEGACY}: chat_template is missing")
        _keep(templates, folder, _LEGACY, legacy["chat_template"], listed=False)
    for name in (_PLAIN, _NAMED_DEFAULT):
        if (data := read_file(folder, name)) is not None:
            templates[name] = _text(folder / name, data)
    if named and not templates:
        raise ConfigError(f"{folder / _NAMED_FOLDER}: {_missing_default([path.stem for path in named])}")
    _keep(templates, folder, "tokenizer_config.json", tokenizer_config.get("chat_template"), listed=True)
    if not templates:
        return Template(None, None)
    (first, source), *others = templates.items()
    if differing := [name for name, text in others if text != source]:
        return Template(
            source,
            f"chat template: that of {first} counts, as in transformers; what {', '.join(differing)} says differs",
        )
    return Template(source, None)


def _keep(templates: dict[str, str], folder: Path, name: str, value: Any, *, listed: bool) -> None:
    """A template, or the one called default of several: an object, in tokenizer_config.json also a list."""
    if listed and isinstance(value, list):
        if not all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in value):
            raise ConfigError(
                f"{folder / name}: chat_template is {shown(value)}, expected objects of name and template"
            )
        pairs = {each["name"]: each["template"] for each in value if isinstance(each["name"], str)}
    elif isinstance(value, dict):
        pairs = value
    else:
        pairs = {"default": value}
    if pairs and "default" not in pairs:
        raise ConfigError(f"{folder / name}: {_missing_default(list(pairs))}")
    if (text := pairs.get("default")) is None:
        return
    if not isinstance(text, str):
        raise ConfigError(f"{folder / name}: chat_template is {shown(text)}, expected text")
    templates[name] = text


def _missing_default(names: list[str]) -> str:
    return f"has chat templates {shown(names)}, none of them called default; call the one to use so"


def _text(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    # transformers opens it as text, which makes these one character
    return text.replace("\r\n", "\n").replace("\r", "\n")
