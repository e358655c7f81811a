"""What one request asks for beside its messages: lengths, sampling, and where the answer ends."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypedDict

from ...artifacts.errors import RequestError


@dataclass(frozen=True)
class Setting:
    """One setting of a request. help: what the command line says of it.

    kind: int, of at least `least`; float, above `above` and at most `most`; bool; str and Sequence: one or several
    strings or tokens. in_file: whether generation_config.json may have it; a number there may be anything from
    file_least on, since what does not sample does not use it.
    """

    kind: type
    help: str
    least: int = 0
    above: float = 0.0
    most: float = math.inf
    in_file: bool = True
    file_least: float = 0.0

    def takes(self, value: Any, of_file: bool = False) -> bool:
        """Whether a value is of this kind and in range."""
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        if self.kind is int:
            return isinstance(value, Integral) and int(value) >= self.least
        number: Any = value if isinstance(value, Real) else math.nan
        # neither NaN, nor infinite, nor an integer that no float holds
        fits = abs(number) <= sys.float_info.max and number <= self.most
        return bool(fits and (self.file_least <= number if of_file else self.above < number))

    def expected(self, of_file: bool = False) -> str:
        """What an error says was expected."""
        if self.kind is bool:
            return "true or false" if of_file else "True or False"
        if self.kind is int:
            return f"an integer of at least {self.least}"
        if of_file:
            return f"a number from {self.file_least} to {self.most}"
        return f"a number above {self.above:g}" + (f" and at most {self.most:g}" if self.most < math.inf else "")


# what the checks, generation_config.json's reader and the command line's options go by
SETTINGS = {
    "max_new_tokens": Setting(int, "Default: the model's own, or 128.", least=1),
    "min_new_tokens": Setting(int, "No end of the answer before so many tokens."),
    "do_sample": Setting(bool, "Draw tokens, or take the most likely one. Default: as the model's own settings say."),
    # below it, logits divided by it leave the range of fp32
    "temperature": Setting(float, "Default: the model's own.", above=1e-30),
    "top_k": Setting(int, "Draw among the N most likely tokens; 0: among all."),
    "top_p": Setting(float, "Draw among the likely tokens that together reach X.", most=1.0),
    "repetition_penalty": Setting(float, "Above 1: what was said already becomes less likely.", file_least=1e-6),
    "seed": Setting(int, "Makes --sample repeatable.", in_file=False),
    "stop": Setting(str, "Ends an answer that says so; repeat it for several."),
    "eos_token_id": Setting(Sequence, "Ends an answer, in place of the model's own; one or several."),
    "ignore_eos": Setting(bool, "Go on to --max-new-tokens, as benchmarks do.", in_file=False),
}
# settings whose value is one number or switch
PLAIN = tuple(name for name, setting in SETTINGS.items() if setting.kind in (int, float, bool))
# used by sampling alone, among what a file may hold out of a request's range
_SAMPLING = ("temperature", "top_p")


class GivenSettings(TypedDict, total=False):
    """What a caller may give; what is left out comes from the checkpoint's generation_config.json.

    max_new_tokens: at most so many tokens, the end token included. min_new_tokens: no end token before so many.
    do_sample: draw from the distribution that temperature, top_k (0 keeps all) and top_p leave; otherwise take the
    most likely token. repetition_penalty: above 1 makes tokens of the prompt and the answer less likely. seed: makes
    sampling repeatable; every row of a batch draws as it would alone, so equal requests get equal answers. stop:
    strings that end an answer, which keeps them. eos_token_id: one or several, replacing the checkpoint's. ignore_eos:
    go on to max_new_tokens, as benchmarks do.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | None
    ignore_eos: bool


@dataclass(frozen=True)
class Settings:
    """One request's settings, checked and complete; or a checkpoint's own, for requests that say nothing else.

    max_new_tokens None: default_new_tokens, the checkpoint's, or as far as the cache allows. Defaults: transformers'.
    """

    eos_token_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    default_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def takes_largest_logit(self) -> bool:
        """Whether the token is the logits' argmax, which the graphs compute themselves.

        Sampling among the one most likely token (top_k 1, as Qwen2-VL is published) is taking it.
        """
        plain = self.repetition_penalty == 1 and (self.min_new_tokens == 0 or not self.eos_token_ids)
        return plain and (not self.do_sample or self.top_k == 1)


def settings_for(defaults: Settings, vocab_size: int, given: Mapping[str, Any]) -> Settings:
    """Fill up what a request gave (GivenSettings) from the checkpoint's settings.

    Raises RequestError for an unknown setting, a value out of range, and sampling settings without sampling.
    """
    if unknown := sorted(set(given) - set(SETTINGS)):
        raise RequestError(f"unknown setting {', '.join(unknown)}; there are {', '.join(SETTINGS)}")
    asked = {name: value for name, value in given.items() if value is not None}
    do_sample = _plain("do_sample", asked, defaults)
    if not do_sample and (unused := [name for name in ("temperature", "top_k", "top_p") if name in asked]):
        raise RequestError(f"{', '.join(unused)} given without sampling; add do_sample=True (--sample)")
    # Qwen2-VL is published with top_k 1: another temperature would change nothing, and say nothing
    idle = [name for name in _SAMPLING if name in asked]
    if do_sample and defaults.top_k == 1 and "top_k" not in asked and idle:
        raise RequestError(
            f"{', '.join(idle)} given, but the checkpoint's own top_k is 1, which takes the most likely token; add "
            "top_k=50 (--top-k 50), or 0 to draw among all"
        )
    stop = asked.get("stop", defaults.stop)
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(f"stop is {stop!r}, expected a string or several, none empty")
    ends = asked.get("eos_token_id", defaults.eos_token_ids)
    ends = tuple(ends) if isinstance(ends, list | tuple | set | frozenset) else (ends,)
    if not all(isinstance(i, Integral) and not isinstance(i, bool) and 0 <= int(i) < vocab_size for i in ends):
        raise RequestError(f"eos_token_id is {list(ends)!r}, expected token ids below {vocab_size}")
    # without sampling, a checkpoint may hold values that sampling would refuse
    used = {name: _plain(name, asked, defaults) for name in PLAIN if do_sample or name not in _SAMPLING}
    ends = () if used.pop("ignore_eos") else tuple(int(i) for i in ends)
    settings = replace(defaults, **{"temperature": 1.0, "top_p": 1.0, **used}, eos_token_ids=ends, stop=tuple(stop))
    if settings.max_new_tokens is not None and settings.min_new_tokens > settings.max_new_tokens:
        raise RequestError(
            f"min_new_tokens {settings.min_new_tokens} is above max_new_tokens {settings.max_new_tokens}"
        )
    return settings


def _plain(name: str, asked: Mapping[str, Any], defaults: Settings) -> Any:
    setting = SETTINGS[name]
    value = asked.get(name, getattr(defaults, name, False))
    if value is None:
        return None
    if not setting.takes(value):
        is_cold = name == "temperature" and isinstance(value, int | float) and 0 <= value <= setting.above
        hint = "; use do_sample=False to take the most likely token" if is_cold else ""
        raise RequestError(f"{name} is {value!r}, expected {setting.expected()}{hint}")
    return setting.kind(value)
