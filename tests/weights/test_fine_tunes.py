"""What fine-tunes do to a checkpoint: each family's are converted as their base model is, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.synthetic import tiny_config, tiny_windowed, write_checkpoint
from safetensors.numpy import load_file, save_file

from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.runtime.loader import open_processor
from qwen2vl_tc.toolchain.weights.convert import convert

FAMILIES: dict[str, Callable[..., dict[str, Any]]] = {"qwen2_vl": tiny_config, "qwen2_5_vl": tiny_windowed}
# what stands before the tower's names, before the decoder's, and before the output layer's
NAMINGS = {
    "published": ("", "model.", ""),
    "since 4.52": ("model.", "model.language_model.", ""),
    "a decoder of its own": ("", "language_model.model.", "language_model."),
}


def renamed(name: str, naming: str) -> str:
    tower, decoder, head = NAMINGS[naming]
    if name.startswith("visual."):
        return tower + name
    return decoder + name.removeprefix("model.") if name.startswith("model.") else head + name


def data(artifact: Path) -> list[bytes]:
    with open_artifact(artifact) as opened:
        part = opened.manifest.weights
        assert part is not None
        return [(artifact / entry.path).read_bytes() for entry in part.files]


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_found_under_every_name(family: str, naming: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", FAMILIES[family](), tokenizer=True)
    convert(base, tmp_path / "a", sync=False)
    tensors = load_file(base / "model.safetensors")
    save_file({renamed(name, naming): tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    convert(base, tmp_path / "b", sync=False)
    assert data(tmp_path / "a") == data(tmp_path / "b")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vocabulary_of_its_own_ties_by_config_alone_template_and_bounds_in_size(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family](vocab_size=331, tie_word_embeddings=True)
    source = write_checkpoint(tmp_path / "hf", config, tokenizer=True)
    settings = json.loads((source / "preprocessor_config.json").read_text())
    del settings["min_pixels"], settings["max_pixels"]
    settings["size"] = {"min_pixels": 3136, "max_pixels": 50176}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    template = "{% for each in messages %}<|im_start|>{{ each.role }}: {{ each.content }}{% endfor %}ASSISTANT:"
    for path in source.glob("chat_template.*"):
        path.unlink()
    (source / "chat_template.jinja").write_text(template)
    convert(source, tmp_path / "a", sync=False)
    with open_artifact(tmp_path / "a") as artifact:
        processor = open_processor(artifact)
    try:
        assert processor.prepare([{"role": "user", "content": "Hi"}]).text == "<|im_start|>user: HiASSISTANT:"
        assert (processor.settings.min_pixels, processor.settings.max_pixels) == (3136, 50176)
        assert processor.config.text.vocab_size == 331 and processor.config.text.tie_word_embeddings
    finally:
        processor.close()
