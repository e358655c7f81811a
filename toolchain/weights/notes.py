"""What a config.json says twice: which of the two counts, as in transformers."""

from collections.abc import Mapping
from typing import Any

from ...artifacts.schema import shown
from ...runtime.models.qwen2 import TEXT_DEFAULTS, WHOLE_DEFAULTS


def config_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """One sentence for each field of a readable config.json whose other mention is not read and says something else."""
    notes = []
    text = config.get("text_config")
    nested = isinstance(text, dict)
    if isinstance(text, dict):
        for name in sorted(TEXT_DEFAULTS.keys() - WHOLE_DEFAULTS.keys()):
            inside = text.get(name, TEXT_DEFAULTS[name])
            if name in config and config[name] != inside and name != "mrope_section":
                notes.append(
                    f"config.json: {name} {shown(config[name])} at the top does not count, text_config's "
                    f"{shown(inside)} does"
                )
        for name in sorted(WHOLE_DEFAULTS.keys() - TEXT_DEFAULTS.keys()):
            outside = config.get(name, WHOLE_DEFAULTS[name])
            if text.get(name, outside) not in (outside, None):
                notes.append(
                    f"config.json: text_config's {name} {shown(text[name])} does not count, the top's {shown(outside)} "
                    "does"
                )
        tied = [level["tie_word_embeddings"] for level in (config, text) if "tie_word_embeddings" in level]
        if len(set(tied)) == 2:
            notes.append("config.json: tie_word_embeddings is true at the top or in text_config alone, and counts")
    rope: Any = text if nested else config
    older, newer = rope.get("rope_scaling"), rope.get("rope_parameters")
    if older and newer:
        counting = {"rope_theta": rope.get("rope_theta", TEXT_DEFAULTS["rope_theta"]), **older}
        if differing := [key for key, value in counting.items() if newer.get(key, value) != value and key != "type"]:
            notes.append(
                f"config.json: rope_scaling counts, as in transformers; rope_parameters says another {differing[0]}"
            )
    return tuple(notes)
