"""generation_config.json: what a request that says nothing else gets."""

from typing import Any

from ...artifacts.errors import ArtifactError
from ...artifacts.schema import parse_json, shown
from .settings import PLAIN, SETTINGS, Settings

# settings that change the output and are not implemented, each with the values that change nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "typical_p": (None, 1.0),
    "min_p": (None, 0),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "top_h": (None,),
    "dola_layers": (None,),
    "max_time": (None,),
    "guidance_scale": (None, 1, 1.0),
}


def generation_defaults_from_hf(
    data: bytes | None, fallback_eos: tuple[int, ...], vocab_size: int, where: str = "generation_config.json"
) -> Settings:
    """Parse generation_config.json strictly; fields it leaves out, or the whole file, have transformers' defaults.

    `fallback_eos` serves when it names no eos_token_id. Raises ArtifactError for values of a wrong type or range, and
    for settings that would change the output but are not implemented.
    """
    plain = {} if data is None else parse_json(data, where)
    if not isinstance(plain, dict):
        raise ArtifactError(f"{where}: got {type(plain).__name__}, expected an object")
    for name, neutral in _NEUTRAL.items():
        if plain.get(name) not in neutral:
            raise ArtifactError(
                f"{where}: {name} is {shown(plain[name])}, which is not supported; remove it from the checkpoint's "
                "generation_config.json and convert again"
            )

    def token(name: str, value: Any) -> int:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ArtifactError(f"{where}: {name} is {shown(value)}, expected a token id below {vocab_size}")
        return value

    listed = plain.get("eos_token_id")
    eos = tuple(
        token("eos_token_id", value)
        for value in (listed if isinstance(listed, list) else [listed])
        if value is not None
    )
    eos = eos or fallback_eos
    if not eos:
        raise ArtifactError(f"{where}: names no eos_token_id, and the tokenizer has no <|im_end|>")
    if plain.get("pad_token_id") is not None:
        token("pad_token_id", plain["pad_token_id"])
    held = {name: plain[name] for name in PLAIN if SETTINGS[name].in_file and plain.get(name) is not None}
    for name, value in held.items():
        if not SETTINGS[name].takes(value, of_file=True):
            raise ArtifactError(f"{where}: {name} is {shown(value)}, expected {SETTINGS[name].expected(of_file=True)}")
    stop = plain.get("stop_strings") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ArtifactError(f"{where}: stop_strings is {shown(plain['stop_strings'])}, expected strings")
    longest = held.pop("max_new_tokens", None)
    defaults = Settings(
        eos,
        default_new_tokens=longest,
        stop=tuple(stop),
        **{name: SETTINGS[name].kind(value) for name, value in held.items()},
    )
    if defaults.do_sample and not (defaults.temperature > 0 and defaults.top_p > 0):
        raise ArtifactError(f"{where}: sampling needs temperature and top_p above 0")
    return defaults
