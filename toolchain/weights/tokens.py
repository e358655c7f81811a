"""Special and added tokens: four files name them, and which of them counts is decided as transformers decides it.

Source: AutoTokenizer, PreTrainedTokenizerBase._from_pretrained and TokenizersBackend of transformers 5.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ...artifacts.errors import ArtifactError, ConfigError
from ...artifacts.schema import shown
from ...runtime.text.prompt import TEMPLATE_TOKENS
from ...runtime.text.tokenizer import open_tokenizer, refuse, steps
from .files import parse_object, read_file, read_object

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
# Qwen2Tokenizer takes vocabulary, merges and post-processor of tokenizer.json and makes the rest itself
_REBUILT = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
_REBUILT_DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_AS_STORED = ("PreTrainedTokenizerFast", "TokenizersBackend")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SHOWN = 6
# file, key and value of a token
_Place = tuple[str, str, Any]


@dataclass(frozen=True)
class Tokens:
    """What was decided: tokenizer.json with the added tokens that count, and the special tokens that a template sees.

    notes: what the files say against each other.
    """

    tokenizer: bytes
    named: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Files:
    folder: Path
    settings: dict[str, Any]
    special: dict[str, Any]
    added: dict[str, Any]

    def error(self, name: str, what: str) -> ConfigError:
        return ConfigError(f"{self.folder / name}: {what}")


def decide_tokens(folder: Path, class_of_config: Any = None) -> Tokens:
    """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    class_of_config: config.json's tokenizer_class. Raises ConfigError for what is damaged, and for what would be
    encoded otherwise than transformers encodes it.
    """
    data = read_file(folder, TOKENIZER)
    if data is None:
        raise _no_tokenizer(folder)
    stored = _open(folder, data)
    files = _Files(folder, *((read_object(folder, name) or {}) for name in (TOKENIZER_CONFIG, _SPECIAL_MAP, _ADDED)))
    rebuilt = _is_rebuilt(files, class_of_config)
    for switch in ("split_special_tokens", "add_prefix_space"):
        if files.settings.get(switch) not in (None, False):
            raise files.error(
                TOKENIZER_CONFIG,
                f"{switch} is {shown(files.settings[switch])}, which is not supported; set it to false",
            )
    if rebuilt:
        _check_rebuilt(folder, stored)
    merged = "added_tokens_decoder" not in files.settings
    before = stored.get_added_tokens_decoder()
    table = _table(files, merged, before)
    special = _Special(files, merged, rebuilt)
    after = before
    # as published: all files say the same, and nothing of several megabytes need be made anew
    marked = {token.content for token in table.values() if token.special}
    if _described(table) != _described(before) or not marked.issuperset(each.content for each in special.all()):
        tokenizer = _without_added(folder, data) if rebuilt else stored
        _add(tokenizer, table, special, rebuilt)
        after = tokenizer.get_added_tokens_decoder()
        if _described(after) != _described(before):
            data = _stored_form(tokenizer)
    named = {name: special.named[name].content for name in TEMPLATE_TOKENS if name in special.named}
    notes = _notes(files, merged, named, _ids(before), _ids(after), table)
    return Tokens(data, named, (*notes, *_list_notes(files, {each.content for each in after.values() if each.special})))


def _ids(tokens: Mapping[int, AddedToken]) -> dict[str, int]:
    return {token.content: i for i, token in tokens.items()}


def _stored_form(tokenizer: Tokenizer) -> bytes:
    """tokenizer.json with the added tokens in its vocabulary too, where no merge makes them: a load else renumbers."""
    plain = json.loads(tokenizer.to_str())
    for token in plain["added_tokens"]:
        plain["model"]["vocab"].setdefault(token["content"], token["id"])
    return json.dumps(plain, ensure_ascii=False).encode("utf-8")


def _no_tokenizer(folder: Path) -> ConfigError:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return ConfigError(
            f"{folder}: {TOKENIZER} is missing, only vocab.json and merges.txt are there; make it with transformers: "
            f"python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\""
        )
    return ConfigError(f"{folder}: {TOKENIZER} is missing; download it from the model's page")


def _open(folder: Path, data: bytes) -> Tokenizer:
    try:
        return open_tokenizer(data, str(folder / TOKENIZER))
    except ArtifactError as error:
        raise ConfigError(str(error)) from error


def _is_rebuilt(files: _Files, class_of_config: Any) -> bool:
    name = files.settings.get("tokenizer_class") or class_of_config
    if name in _REBUILT:
        return True
    if name not in _AS_STORED:
        raise files.error(
            TOKENIZER_CONFIG,
            f"tokenizer_class is {shown(name)}, expected {' or '.join(filter(None, _REBUILT + _AS_STORED))}",
        )
    return False


def _check_rebuilt(folder: Path, stored: Tokenizer) -> None:
    """That what the class makes itself is what the file says: else versions of transformers encode differently."""
    wanted: dict[str, list[dict[str, Any]]] = {
        "normalizer": [{"type": "NFC"}],
        "pre_tokenizer": [
            {"type": "Split", "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
        "decoder": [{"type": "ByteLevel"}],
    }
    for part, expected in wanted.items():
        keys = {key for step in expected for key in step}
        got = [{key: step[key] for key in step if key in keys} for step in steps(getattr(stored, part))]
        if got != expected:
            raise ConfigError(
                f"{folder / TOKENIZER}: {part} is {str(got)[:200]}, but transformers' Qwen2Tokenizer computes with "
                f"{expected}; use the model's own {TOKENIZER}"
            )


def _without_added(folder: Path, data: bytes) -> Tokenizer:
    plain = parse_object(data, folder / TOKENIZER)
    plain["added_tokens"] = []
    try:
        tokenizer = Tokenizer.from_str(json.dumps(plain))
    except BaseException as error:
        refuse(error, f"{folder / TOKENIZER}: cannot be read")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token(files: _Files, where: str, name: str, value: Any, **given: bool) -> AddedToken:
    """An added token from its text, or from an object of text and flags."""
    fields = {"content": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    fields.pop("__type", None)
    flags = {flag: fields.pop(flag) for flag in _FLAGS if flag in fields}
    content = fields.pop("content", None)
    # "id": tokenizer.json's own form
    fields.pop("id", None)
    if not isinstance(content, str) or not content or fields or not all(type(flag) is bool for flag in flags.values()):
        raise files.error(where, f"{name} is {shown(value)}, expected a token's text, or its content and flags")
    return AddedToken(content, **{**flags, **given})


def _table(files: _Files, merged: bool, stored: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
    """The added tokens by id: those of added_tokens_decoder, or else of added_tokens.json and tokenizer.json."""
    table: dict[int, AddedToken] = {}
    if not merged:
        decoder = files.settings["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise files.error(TOKENIZER_CONFIG, f"added_tokens_decoder is {shown(decoder)}, expected an object")
        for number, value in decoder.items():
            name = f"added_tokens_decoder.{number}"
            if not (number.isascii() and number.isdigit() and len(number) < 10):
                raise files.error(TOKENIZER_CONFIG, f"{name}: expected a token id")
            table[int(number)] = _token(files, TOKENIZER_CONFIG, name, value)
        return table
    special = {token.content for token in _Special(files, True, False).all()}
    for content, number in files.added.items():
        if type(number) is not int or not 0 <= number < 1 << 31:
            raise files.error(_ADDED, f"{shown(content)} is {shown(number)}, expected a token id")
        table[number] = AddedToken(content, normalized=content not in special, special=content in special)
    table.update(stored)
    return table


def _unnamed(files: _Files, merged: bool) -> tuple[list[_Place], dict[str, _Place]]:
    """The list of special tokens without a name that counts, and the named ones of objects in its place.

    tokenizer_config.json's additional_special_tokens is another name of its extra_special_tokens, unless those are
    there. special_tokens_map.json's extra_special_tokens go on behind them; additional_special_tokens of a file count
    only where no extra_special_tokens are left, not even an empty list.
    """
    named: dict[str, _Place] = {}
    lists: dict[str, list[_Place]] = {}

    def take(where: str, written: str, value: Any, key: str) -> None:
        if isinstance(value, dict) and key == _EXTRA:
            lists.pop(key, None)
            named.update({name: (where, name, token) for name, token in value.items()})
        elif isinstance(value, list) or value is None:
            before = lists.get(key, []) if key == _EXTRA and value is not None else []
            lists[key] = before + [(where, written, token) for token in value or []]
        else:
            raise files.error(where, f"{written} is {shown(value)}, expected tokens")

    renamed = _ADDITIONAL in files.settings and not files.settings.get(_EXTRA)
    for key in (_EXTRA, _ADDITIONAL):
        if key in files.settings and not (renamed and key == _EXTRA):
            take(TOKENIZER_CONFIG, key, files.settings[key], _EXTRA if renamed else key)
    for key in (_EXTRA, _ADDITIONAL):
        if merged and key in files.special:
            take(_SPECIAL_MAP, key, files.special[key], key)
    return lists.get(_EXTRA, lists.get(_ADDITIONAL, [])), named


class _Special:
    """The special tokens: `named` by their attribute, and `extra` ones without a name."""

    def __init__(self, files: _Files, merged: bool, rebuilt: bool) -> None:
        self._files = files
        settings = dict(files.settings)
        self.named: dict[str, AddedToken] = {}
        values: dict[str, tuple[str, Any]] = {name: ("", text) for name, text in _REBUILT_DEFAULTS.items() if rebuilt}
        values |= {name: (TOKENIZER_CONFIG, settings[name]) for name in TEMPLATE_TOKENS if name in settings}
        if merged:
            values |= {name: (_SPECIAL_MAP, files.special[name]) for name in TEMPLATE_TOKENS if name in files.special}
        sources = [(TOKENIZER_CONFIG, files.settings), *([(_SPECIAL_MAP, files.special)] if merged else [])]
        for where, source in sources:
            # tokens of other names, image_token say
            values |= {
                name: (where, value)
                for name, value in source.items()
                if name.endswith("_token") and name not in TEMPLATE_TOKENS
                if isinstance(value, str) or where == _SPECIAL_MAP
            }
        extra, others = _unnamed(files, merged)
        values |= {name: (where, value) for name, (where, _, value) in others.items()}
        for name in sorted(values, key=lambda name: (*TEMPLATE_TOKENS, name).index(name)):
            where, value = values[name]
            if value is not None:
                self.named[name] = _token(files, where, name, value, special=True)
        self.extra = [_token(files, where, key, value, special=True) for where, key, value in extra]

    def all(self) -> list[AddedToken]:
        return [*self.named.values(), *self.extra]


def _add(tokenizer: Tokenizer, table: Mapping[int, AddedToken], special: _Special, rebuilt: bool) -> None:
    """Add what transformers adds, in its order: it gives the ids, not the table."""
    named = {token.content for token in special.named.values()}
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for _, token in sorted(table.items()):
        known.add(token.content)
        flags = {flag: getattr(token, flag) for flag in _FLAGS}
        flags["special"] |= token.content in named
        tokenizer.add_tokens([AddedToken(token.content, **flags)])
    for token in special.all():
        if token.content not in known:
            known.add(token.content)
            tokenizer.add_tokens([token])
    if rebuilt:
        tokenizer.add_tokens([AddedToken(token.content, special=True) for token in special.all()])


def _described(tokens: Mapping[int, AddedToken]) -> dict[int, tuple[Any, ...]]:
    return {i: (token.content, *(getattr(token, flag) for flag in _FLAGS)) for i, token in tokens.items()}


def _listed(tokens: Iterable[str]) -> str:
    names = [shown(token) for token in tokens]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _list_notes(files: _Files, special: set[str]) -> Iterator[str]:
    """Lists of special tokens with some that are none in the end."""
    for where, source in ((TOKENIZER_CONFIG, files.settings), (_SPECIAL_MAP, files.special)):
        for key in (_EXTRA, _ADDITIONAL):
            value = source.get(key)
            listed = [
                token.get("content") if isinstance(token, dict) else token
                for token in (value.values() if isinstance(value, dict) else value or [])
            ]
            if lost := [str(text) for text in listed if text not in special]:
                yield f"{where}: {key} {_listed(lost)} do not count, as in transformers: other files or keys do"


def _notes(
    files: _Files,
    merged: bool,
    named: Mapping[str, str],
    before: Mapping[str, int],
    after: Mapping[str, int],
    table: Mapping[int, AddedToken],
) -> tuple[str, ...]:
    """What a reader of one file alone would not expect."""
    notes = []
    for name in TEMPLATE_TOKENS:
        value = files.special.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if not merged and name in files.special and text != named.get(name):
            notes.append(
                f"{_SPECIAL_MAP}: {name} {shown(text)} does not count, {shown(named.get(name))} does: transformers "
                f"reads that file only where {TOKENIZER_CONFIG} has no added_tokens_decoder; write it there instead"
            )
        mine = files.settings.get(name)
        mine = mine.get("content") if isinstance(mine, dict) else mine
        if merged and name in files.special and name in files.settings and text != mine:
            notes.append(
                f"{TOKENIZER_CONFIG}: {name} {shown(mine)} does not count, {_SPECIAL_MAP}'s {shown(text)} does"
            )
    if unknown := [text for text in files.added if text not in after]:
        notes.append(f"{_ADDED}: {_listed(unknown)} do not count: {TOKENIZER_CONFIG} has added_tokens_decoder")
    if dropped := [text for text in before if text not in after]:
        notes.append(
            f"{TOKENIZER}: the added tokens {_listed(dropped)} do not count: {TOKENIZER_CONFIG} has an "
            "added_tokens_decoder without them"
        )
    if moved := [token.content for i, token in table.items() if after.get(token.content) != i] + [
        text for text, i in files.added.items() if after.get(text, i) != i
    ]:
        ids = (f"{text} is {after.get(text)}" for text in dict.fromkeys(moved))
        notes.append(f"ids of added tokens differ from what their files say, as in transformers: {_listed(ids)}")
    return tuple(notes)
