"""The model families that there are, and which one an artifact or a checkpoint is of."""

import importlib
from collections.abc import Mapping
from typing import Any

from ...artifacts.errors import ArtifactError, ConfigError
from ...artifacts.manifest import GePart, Manifest
from ...artifacts.schema import dump_json, from_plain, parse_json, shown
from .base import Family, GraphOptions, GraphSpec
from .config import ModelConfig

# by config.json's model_type: the name that people know, of a family in the module beside this one that is called like
# the type, which is imported when it is asked for; or the family itself
FAMILIES: dict[str, str | Family] = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL"}


def family_of(model: Any) -> Family:
    """The family of a config, or of a manifest's plain one. Raises ArtifactError for one that is not here."""
    name = model.get("model_type") if isinstance(model, dict) else getattr(model, "model_type", None)
    if not isinstance(name, str) or name not in FAMILIES:
        raise ArtifactError(f"model_type {shown(name)} is not supported; supported: {', '.join(FAMILIES)}")
    row = FAMILIES[name]
    if isinstance(row, str):
        family: Family = importlib.import_module(f".{name}", __name__).FAMILY
        return family
    return row


def config_of(manifest: Manifest) -> ModelConfig:
    """The config of an artifact's model. Raises ArtifactError for a family that is not here, and for a model that
    cannot be."""
    where = f"{manifest.name}: manifest.json: model"
    try:
        family = family_of(manifest.model)
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}; use the release that made it, or rebuild it") from error
    config = from_plain(family.config, manifest.model, where)
    if problem := config.contradiction():
        raise ArtifactError(f"{where}: {problem}; the artifact is damaged or hostile: rebuild it")
    return config


def to_plain(config: ModelConfig) -> dict[str, Any]:
    """A config as the manifest holds it."""
    plain: dict[str, Any] = parse_json(dump_json(config), "config")
    return plain


def graphs_of(config: ModelConfig, part: GePart) -> dict[str, GraphSpec]:
    """The graphs that an artifact's GE part holds, by name."""
    return {spec.name: spec for spec in family_of(config).graphs(config, GraphOptions.of(part))}


def spec_of(specs: Mapping[str, GraphSpec], name: str, where: str) -> GraphSpec:
    """Raises ArtifactError for a graph that the model does not have."""
    if name not in specs:
        raise ArtifactError(f"{where}: has a graph {name}, this model's are {', '.join(specs)}; compile again")
    return specs[name]


def config_from_hf(plain: Any) -> ModelConfig:
    """Read a parsed HF config.json of any family.

    Raises ConfigError naming the field for a value of a wrong type or range, for what this toolchain does not compute
    (other model types, rotary embeddings, activations, quantization), and for shapes that contradict each other.
    """
    if not isinstance(plain, dict):
        raise ConfigError("config.json: expected a JSON object")
    try:
        family = family_of(plain)
    except ArtifactError as error:
        raise ConfigError(f"config.json: {error}") from error
    if quantization := plain.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConfigError(
            "config.json: quantization_config: quantized checkpoints "
            f"({method[:40] if isinstance(method, str) else 'unknown'}) are not supported yet; use the unquantized one"
        )
    config = family.read_config(plain)
    if problem := config.contradiction():
        raise ConfigError(f"config.json: {problem}")
    return config
