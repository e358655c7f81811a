"""tokenizer.json, as far as its settings cannot make the library run for ever, fill the memory, or panic."""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from tokenizers import Tokenizer
from tokenizers.models import BPE

from ...artifacts.errors import ArtifactError

# Any other regular expression could take exponential time, which the library cannot be stopped in.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Replace and its like can turn one letter into gigabytes.
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")
_DECODERS = ("ByteLevel",)
_PRE_TOKENIZERS = ("Split", "ByteLevel")
# the model's settings, with which encoding is what transformers computes; dropout would make it random
_MODEL: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}


def open_tokenizer(data: bytes, where: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer, without truncation and padding. Raises ArtifactError naming `where`.

    Only what Qwen2's tokenizers are made of is taken: NFC or another normal form, its own pattern, byte-level BPE.
    """
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except BaseException as error:
        refuse(error, f"{where}: cannot be read")
    if not isinstance(tokenizer.model, BPE):
        raise ArtifactError(f"{where}: model is {type(tokenizer.model).__name__}, expected BPE")
    for name, accepted in _MODEL.items():
        if (value := getattr(tokenizer.model, name)) not in accepted:
            raise ArtifactError(
                f"{where}: model.{name} is {str(value)[:80]}, expected {accepted[0]}: text would be encoded otherwise "
                "than by transformers"
            )
    for part, known in (
        ("normalizer", _NORMALIZERS),
        ("pre_tokenizer", _PRE_TOKENIZERS),
        ("decoder", _DECODERS),
    ):
        for step in steps(getattr(tokenizer, part)):
            if step["type"] not in known:
                raise ArtifactError(f"{where}: {part} {step['type']} is not one of Qwen2's: {', '.join(known)}")
            if step["type"] == "Split" and step.get("pattern") != {"Regex": QWEN2_PATTERN}:
                raise ArtifactError(
                    f"{where}: splits text by another pattern than Qwen2's: {str(step['pattern'])[:80]}"
                )
    # a file may carry the limits of some training run; transformers resets them too
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def steps(part: Any) -> Iterator[dict[str, Any]]:
    """A part's settings, those of a sequence one by one."""
    if part is None:
        return
    open_parts = [json.loads(part.__getstate__())]
    while open_parts:
        step = open_parts.pop(0)
        if step["type"] == "Sequence":
            open_parts += next(value for value in step.values() if isinstance(value, list))
        else:
            yield step


def refuse(error: BaseException, what: str) -> NoReturn:
    """Raise ArtifactError for what the library raised. A panic of its Rust code is a BaseException without a name."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        raise ArtifactError(f"{what}: {error}") from error
    raise error
