"""Single fields of a config.json as transformers reads them: its classes' defaults, types, and what is refused."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...artifacts.errors import ConfigError
from ...artifacts.schema import shown

# far above any model; without a limit a config of a few bytes could ask for weeks of work
LARGEST_SIZE = 1 << 31
_LARGEST_NUMBER = 1e300


@dataclass(frozen=True)
class Section:
    """One JSON object of a config.json. `where` precedes its fields' names in errors: "", "text_config." and so on.

    Only a field that is absent has its default: null is a value, and no number.
    """

    fields: Mapping[str, Any]
    defaults: Mapping[str, Any]
    where: str = ""

    def error(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"config.json: {self.where}{key} is {shown(self.fields.get(key))}, expected {expected}")

    def whole(self, key: str, least: int = 1) -> int:
        """An integer from `least` up to LARGEST_SIZE. Raises ConfigError, as all of these do."""
        value = self.fields.get(key, self.defaults[key])
        if type(value) is not int or not least <= value < LARGEST_SIZE:
            raise self.error(key, "a positive integer" if least == 1 else f"an integer of at least {least}")
        return value

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value = self.fields.get(key, self.defaults[key])
        # an integer may be too large for a float
        if type(value) not in (int, float) or not 0 < value < _LARGEST_NUMBER:
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.fields.get(key, self.defaults[key])
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def inner(self, key: str, defaults: Mapping[str, Any]) -> "Section":
        """The object that a field holds; null and absence are an empty one, as in transformers."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "a JSON object")
        return Section(value or {}, defaults, f"{self.where}{key}.")

    def only(self, key: str, *accepted: Any, why: str = "") -> None:
        """Refuse a field that would change the arithmetic, unless it is absent or has one of these values."""
        if key in self.fields and not any(
            type(self.fields[key]) is type(each) and self.fields[key] == each for each in accepted
        ):
            values = " or ".join("null" if each is None else repr(each) for each in accepted)
            raise self.error(key, values + (f": {why}" if why else ""))

    def plain_rope(self) -> None:
        """Refuse a vision tower's rotary embedding of any other kind than the one that the towers have."""
        rope = self.inner("rope_parameters", {})
        rope.only("rope_type", "axial", "default", None)
        rope.only("rope_theta", 10000, 10000.0, None)

    def same(self, key: str, value: Any, meaning: str) -> None:
        """Refuse another name of a field that was read, where it says something else."""
        if self.fields.get(key, value) not in (value, None):
            raise self.error(key, f"{shown(value)}, like {meaning}; remove one of them")


# what changes nothing beside the plain rotary embedding
_PLAIN_ROPE: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, 1.0, None),
    "factor": (1, 1.0, None),
    "attention_factor": (1, 1.0, None),
    "original_max_position_embeddings": (None,),
}
_ROPE_FIELDS = ("type", "rope_type", "rope_theta", "mrope_section")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding: base of its frequencies, and how many of them turn by time, row and column."""

    theta: float
    section: tuple[int, int, int]


def read_rope(text: Section) -> Rope:
    """rope_scaling, or else rope_parameters (its name since transformers 5), with rope_theta inside or beside it.

    Raises ConfigError for every type but the plain one, "default" or "mrope": frequencies and attention scaling of
    yarn, linear, dynamic, longrope and llama3 are not implemented, nor is one embedding per layer type.
    """
    older, newer = (text.inner(name, text.defaults) for name in ("rope_scaling", "rope_parameters"))
    # also in the one that does not count: who wrote it there expects it to
    for each, key in itertools.product((older, newer), ("rope_type", "type")):
        if each.fields.get(key, "default") not in ("default", "mrope"):
            raise ConfigError(
                f"config.json: {each.where}{key} is {shown(each.fields[key])}, which is not supported: only default "
                "and mrope are; remove it to convert for the length that the model was trained with"
            )
    # where both are there, transformers takes the older name
    rope = older if older.fields else newer
    for key in sorted(rope.fields.keys() - set(_ROPE_FIELDS)):
        if isinstance(rope.fields[key], dict):
            raise ConfigError(
                f"config.json: {rope.where}{key} is a rotary embedding of its own for one type of layer, which is not "
                "supported"
            )
        rope.only(key, *_PLAIN_ROPE.get(key, (None,)), why="the plain rotary embedding has no such setting")
    text.only("partial_rotary_factor", *_PLAIN_ROPE["partial_rotary_factor"])
    section = rope.fields.get("mrope_section", rope.defaults["mrope_section"])
    if not isinstance(section, list) or len(section) != 3 or not all(type(n) is int and n > 0 for n in section):
        raise rope.error("mrope_section", "three positive integers")
    theta = (rope if "rope_theta" in rope.fields else text).number("rope_theta")
    return Rope(theta, (section[0], section[1], section[2]))
