"""What one request asks for beside its messages: lengths, sampling, and where the answer ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from ...artifacts.errors import RequestError
from .defaults import GenerationDefaults

# below it, logits divided by it leave the range of fp32
_LEAST_TEMPERATURE = 1e-30


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
    """One request's settings, checked and complete. max_new_tokens None: the default, as far as the cache allows."""

    eos_token_ids: frozenset[int]
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


def settings_for(defaults: GenerationDefaults, vocab_size: int, given: Mapping[str, Any]) -> Settings:
    """Fill up what a request gave (GivenSettings) from generation_config.json.

    Raises RequestError for an unknown setting, a value out of range, and sampling settings without sampling.
    """
    known = GivenSettings.__annotations__
    if unknown := sorted(set(given) - set(known)):
        raise RequestError(f"unknown setting {', '.join(unknown)}; there are {', '.join(known)}")
    asked = {name: value for name, value in given.items() if value is not None}

    def number(name: str, default: float, above: float, most: float = math.inf) -> float:
        value = asked.get(name, default)
        real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or not above < value <= most:
            cold = name == "temperature" and real and 0 <= value <= above
            hint = "; use do_sample=False to take the most likely token" if cold else ""
            limit = f" and at most {most:g}" if most < math.inf else ""
            raise RequestError(f"{name} is {value!r}, expected a number above {above:g}{limit}{hint}")
        return float(value)

    def whole(name: str, default: int | None, least: int) -> int | None:
        value = asked.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise RequestError(f"{name} is {value!r}, expected an integer of at least {least}")
        return int(value)

    def switch(name: str, default: bool) -> bool:
        value = asked.get(name, default)
        if not isinstance(value, bool):
            raise RequestError(f"{name} is {value!r}, expected True or False")
        return value

    do_sample = switch("do_sample", defaults.do_sample)
    if not do_sample and (unused := [name for name in ("temperature", "top_k", "top_p") if name in asked]):
        raise RequestError(f"{', '.join(unused)} given without sampling; add do_sample=True (--sample)")
    top_k = whole("top_k", defaults.top_k, 0) or 0
    # Qwen2-VL is published with top_k 1: another temperature would change nothing, and say nothing
    idle = [name for name in ("temperature", "top_p") if name in asked]
    if do_sample and top_k == 1 and "top_k" not in asked and idle:
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
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ends):
        raise RequestError(f"eos_token_id is {list(ends)!r}, expected token ids below {vocab_size}")
    settings = Settings(
        eos_token_ids=frozenset() if switch("ignore_eos", False) else frozenset(int(i) for i in ends),
        max_new_tokens=whole("max_new_tokens", None, 1),
        default_new_tokens=defaults.max_new_tokens,
        min_new_tokens=whole("min_new_tokens", defaults.min_new_tokens, 0) or 0,
        do_sample=do_sample,
        # without sampling these are not used, and a checkpoint may hold values that sampling would refuse
        temperature=number("temperature", defaults.temperature, _LEAST_TEMPERATURE) if do_sample else 1.0,
        top_k=top_k,
        top_p=number("top_p", defaults.top_p, 0, 1) if do_sample else 1.0,
        repetition_penalty=number("repetition_penalty", defaults.repetition_penalty, 0),
        seed=whole("seed", None, 0),
        stop=tuple(stop),
    )
    if settings.max_new_tokens is not None and settings.min_new_tokens > settings.max_new_tokens:
        raise RequestError(
            f"min_new_tokens {settings.min_new_tokens} is above max_new_tokens {settings.max_new_tokens}"
        )
    return settings
