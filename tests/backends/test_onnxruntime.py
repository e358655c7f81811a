"""The ONNX models in onnxruntime, through the commands, against transformers on the same weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from qwen2vl_tc.runtime import Model, load
from qwen2vl_tc.runtime.generate import Timings, prefill_prompt
from qwen2vl_tc.runtime.prompt import Prompt
from qwen2vl_tc.runtime.vision import segment_ends, vision_positions
from qwen2vl_tc.toolchain.cli import app
from qwen2vl_tc.toolchain.hf_reference import HfReference, open_reference
from qwen2vl_tc.toolchain.synthetic import tiny_config, write_checkpoint
from qwen2vl_tc.toolchain.verify_cases import Case

# fp32 sums of a few hundred products in another order differ by some 1e-6 of logits of order 5; a wrong operator is
# off by more than 1e-2
TOLERANCE = 1e-4
STEPS = 16
QUESTION = "What is in the pictures? Answer."
SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gqa7": {
        "hidden_size": 112,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "vision": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    },
    "wide_vision": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vision": {"depth": 1, "embed_dim": 160, "num_heads": 2, "mlp_ratio": 4},
    },
}

Export = Callable[..., tuple[Path, Path]]


def run(*words: str | int | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """export(shape, dtype, *compile's options) to (HF folder, artifact with ONNX models); cached."""
    made: dict[tuple[str, ...], tuple[Path, Path]] = {}

    def make(shape: str, *options: str, dtype: str = "fp32") -> tuple[Path, Path]:
        key = (shape, dtype, *options)
        if key not in made:
            folder = tmp_path_factory.mktemp(shape)
            source = write_checkpoint(folder / "hf", tiny_config(**SHAPES[shape]), dtype=dtype, tokenizer=True)
            run("convert", "--src", source, "--out", folder / "artifact", "--no-sync")
            run("compile", folder / "artifact", "--mode", "onnx", "--max-length", 512, *options)
            made[key] = source, folder / "artifact"
        return made[key]

    return make


def picture(height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return Image.fromarray(((ramp + rng.integers(0, 64, ramp.shape)) % 256).astype(np.uint8))


def messages(pictures: list[Image.Image], text: str = QUESTION) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


CASES = {
    "one_image": [picture(112, 140, 0)],
    # two neighbours of one size run as one call of the visual model
    "three_images": [picture(84, 196, 1), picture(57, 61, 2), picture(57, 61, 3)],
    "text_only": [],
}


def logits(model: Model, prompt: Prompt, tokens: list[int]) -> list[np.ndarray]:
    """Logits of the prompt's last position and of every teacher-forced token."""
    backend = model.backend
    cache = backend.allocate(1)
    step = prefill_prompt(backend, cache, 0, prompt, model.processor.config.vision.spatial_merge_size, Timings())
    found = [backend.logits(step)[0]]
    for i, token in enumerate(tokens):
        at = np.array([len(prompt.token_ids) + i], np.int64)
        step = backend.decode(cache, backend.begin(cache, np.array([token]), at, at + prompt.delta), [int(at[0]) + 1])
        found.append(backend.logits(step)[0])
    return found


def visual(model: Model, prompt: Prompt) -> np.ndarray:
    positions = vision_positions(prompt.grids, model.processor.config.vision.spatial_merge_size)
    result: np.ndarray = model.backend.visual(prompt.patches, positions, segment_ends(prompt.grids)).tensor
    return result


def oracle(source: Path) -> HfReference:
    import torch

    return open_reference(source, torch.float32)


@pytest.mark.parametrize("options", [(), ("--standard-only",)], ids=["default", "standard"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_models_agree_with_transformers(export: Export, tmp_path: Path, shape: str, options: tuple[str]) -> None:
    source, artifact = export(shape, "--weights", "fp32", *options)
    model, reference = load(artifact), oracle(source)
    assert model.backend.name == "onnxruntime"
    for name, pictures in CASES.items():
        prompt = model.processor.prepare(messages(pictures))
        expected = reference.run(reference.inputs(Case(name, tuple(pictures), prompt)), STEPS)
        if expected.visual is not None:
            assert np.abs(visual(model, prompt) - expected.visual.numpy()).max() < TOLERANCE
        ours = logits(model, prompt, list(expected.tokens[:-1]))
        assert np.abs(np.stack(ours) - expected.logits.numpy()).max() < TOLERANCE
        words = ["generate", artifact, "--prompt", QUESTION, "--max-new-tokens", STEPS + 1, "--json"]
        for i, each in enumerate(pictures):
            each.save(tmp_path / f"{i}.png")
            words += ["--image", tmp_path / f"{i}.png"]
        made = json.loads(run(*words))["token_ids"]
        assert made == list(expected.tokens[: len(made)])
