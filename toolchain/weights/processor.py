"""The small files that the runtime needs: decided once, where a checkpoint has several places for one thing.

What is written under processor/ says everything once, so that a load has nothing to decide:
tokenizer.json with the added tokens, tokenizer_config.json with the special tokens that a template sees,
chat_template.jinja, preprocessor_config.json, and generation_config.json as it is.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifacts.errors import ArtifactError, ConfigError, RequestError
from ...artifacts.manifest import FileEntry, Folding
from ...artifacts.schema import dump_json, shown
from ...artifacts.staging import Staging
from ...runtime.models.config import ModelConfig
from ...runtime.pictures.vision import ImageSettings, image_settings_from_hf
from ...runtime.requests.settings import settings_for
from ...runtime.text.prompt import Processor
from .files import parse_object, read_file, read_object
from .folding import folding_from_hf
from .processor_fields import clip_notes, picture_notes
from .templates import JOINT, decide_template
from .tokens import TOKENIZER, TOKENIZER_CONFIG, decide_tokens

PREPROCESSOR = "preprocessor_config.json"
# transformers 5 saves the image processor inside this one
_VIDEO = "video_preprocessor_config.json"
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class ProcessorFiles:
    """What goes under processor/, by name; `notes` are contradictions that transformers resolves unlike one expects."""

    files: Mapping[str, bytes]
    folding: Folding
    notes: tuple[str, ...]

    def stage(self, staging: Staging) -> tuple[FileEntry, ...]:
        """Stage the files under processor/."""
        return tuple(staging.add(f"processor/{name}", data) for name, data in self.files.items())


def read_processor(folder: Path, config: ModelConfig, plain_config: Mapping[str, Any]) -> ProcessorFiles:
    """Read and check everything that a load and a request will read, by the code that they use.

    Raises ConfigError naming file and field, and what to do.
    """
    tokens = decide_tokens(folder, plain_config.get("tokenizer_class"))
    joint = read_object(folder, JOINT) or {}
    template = decide_template(folder, joint, read_object(folder, TOKENIZER_CONFIG) or {})
    pictures, folding, more = _pictures(folder, joint, config)
    files = {TOKENIZER: tokens.tokenizer, PREPROCESSOR: dump_json(pictures)}
    if tokens.named:
        files[TOKENIZER_CONFIG] = dump_json(tokens.named)
    if template.source is not None:
        files["chat_template.jinja"] = template.source.encode("utf-8")
    if (generation := read_file(folder, _GENERATION)) is not None:
        parse_object(generation, folder / _GENERATION)
        files[_GENERATION] = generation
    processor = _as_a_load_reads(folder, files, config)
    outside = [
        f"{token.content} ({i})"
        for i, token in processor.tokenizer.get_added_tokens_decoder().items()
        if i >= config.text.vocab_size
    ]
    notes = [*tokens.notes, *filter(None, (template.note,)), *more]
    if outside:
        notes.append(
            f"{TOKENIZER}: added tokens outside the model's vocabulary of {config.text.vocab_size}, with which a "
            f"prompt is refused: {shown(outside)}"
        )
    return ProcessorFiles(files, folding, tuple(notes))


def _as_a_load_reads(folder: Path, files: Mapping[str, bytes], config: ModelConfig) -> Processor:
    """The processor that a load will make, after one request without settings of its own."""
    try:
        processor = Processor(files, config)
        if "chat_template.jinja" in files:
            with suppress(RequestError):  # a template may refuse this conversation, and take others
                processor.prepare([{"role": "user", "content": "What is this?"}])
    except ArtifactError as error:
        raise ConfigError(f"{folder}/{error}") from error
    try:
        settings_for(processor.generation, config.text.vocab_size, {})
    except RequestError as error:
        raise ConfigError(f"{folder / _GENERATION}: {error}") from error
    return processor


def _pictures(
    folder: Path, joint: Mapping[str, Any], config: ModelConfig
) -> tuple[Mapping[str, Any], Folding, tuple[str, ...]]:
    """The image processor's settings, what they fold to, and which fields and files do not count."""
    inside, separate = _inner(folder, joint, "image_processor"), read_object(folder, PREPROCESSOR)
    where = f"{folder / PREPROCESSOR}" if inside is None else f"{folder / JOINT}: image_processor"
    chosen = separate if inside is None else inside
    if chosen is None:
        raise ConfigError(
            f"{folder}: {PREPROCESSOR} is missing; it says how pictures are normalized: download it from the model's "
            "page"
        )
    notes = picture_notes(chosen, where)
    effect = _effect(chosen, config, where)
    if inside is not None and separate is not None:
        try:
            differs = _effect(separate, config, str(folder / PREPROCESSOR)) != effect
        except ConfigError:
            differs = True
        if differs:
            notes += (f"{JOINT}: its image_processor counts, as in transformers; {PREPROCESSOR} says something else",)
    clips = _inner(folder, joint, "video_processor")
    clips_where = f"{folder / JOINT}: video_processor" if clips is not None else str(folder / _VIDEO)
    clips = read_object(folder, _VIDEO) if clips is None else clips
    notes += clip_notes(clips or {}, clips_where)
    if clips is not None and folding_from_hf(clips, config.vision, clips_where) != effect[1]:
        raise ConfigError(
            f"{clips_where}: rescales or normalizes clips otherwise than {where} does pictures, which is not "
            "supported: one patch embedding serves both; make them equal"
        )
    return chosen, effect[1], notes


def _inner(folder: Path, joint: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = joint.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{folder / JOINT}: {name} is {shown(value)}, expected an object")
    return value


def _effect(settings: Mapping[str, Any], config: ModelConfig, where: str) -> tuple[ImageSettings, Folding]:
    folding = folding_from_hf(settings, config.vision, where)
    try:
        return image_settings_from_hf(dump_json(settings), where), folding
    except ArtifactError as error:
        raise ConfigError(str(error)) from error
