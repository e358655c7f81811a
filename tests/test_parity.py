"""The whole way, against transformers on the same weights: convert, compile, load, generate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import tiny_config, tiny_windowed, write_checkpoint
from PIL import Image
from typer.testing import CliRunner

from qwen2vl_tc.runtime import Model, load
from qwen2vl_tc.runtime.requests.answer import Timings
from qwen2vl_tc.runtime.requests.generate import prefill_prompt
from qwen2vl_tc.runtime.text.prompt import Prompt
from qwen2vl_tc.toolchain.cli.main import app
from qwen2vl_tc.toolchain.host.execute_mode import EXECUTE_MODES, engine
from qwen2vl_tc.toolchain.verify.hf_processor import default_image_processor
from qwen2vl_tc.toolchain.weights.convert import convert

# fp32 sums of a few hundred products in another order differ by some 1e-6 of logits of order 5; a wrong operator is
# off by more than 1e-2
FP32_TOLERANCE = 1e-4
NEW_TOKENS = 32
QUESTION = "What is in the pictures? Answer."

SHAPES: dict[str, dict[str, Any]] = {
    "gqa1_untied": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa2_tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gqa7_untied": {
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
# of Qwen2.5-VL: windows of 2 x 2 and of 1 x 1 merge windows, an inner width that needs padding and one that
# needs none, all blocks with full attention but one and none
WINDOWED: dict[str, dict[str, Any]] = {
    "windows_tied": {"tie_word_embeddings": True},
    "windows_gqa7": {
        **SHAPES["gqa7_untied"],
        "vision": {"depth": 3, "hidden_size": 48, "num_heads": 3, "fullatt_block_indexes": [0, 2]},
    },
    "windows_of_one": {"vision": {"window_size": 28, "fullatt_block_indexes": [2]}},
    "windows_alone": {"vision": {"depth": 2, "intermediate_size": 128, "fullatt_block_indexes": [], "window_size": 84}},
}
CONFIGS = {
    **{name: tiny_config(**changes) for name, changes in SHAPES.items()},
    **{name: tiny_windowed(**changes) for name, changes in WINDOWED.items()},
}
OPERATOR_SETS = [("fused", "segments"), ("recipe", "tnd")]
# both layouts of config.json, both namings, one file and several, all meet a shape
FORMS: dict[str, dict[str, Any]] = {
    "gqa1_untied": {"layout": "nested", "names": "new"},
    "gqa2_tied": {"stored_head": True},
    "gqa7_untied": {"shards": 3},
    "wide_vision": {"layout": "nested", "shards": 2},
    "windows_tied": {"stored_head": True, "names": "new"},
    "windows_gqa7": {"layout": "nested", "names": "new", "shards": 2},
    "windows_of_one": {},
    "windows_alone": {"layout": "nested"},
}


def picture(height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return Image.fromarray(((ramp + rng.integers(0, 64, ramp.shape)) % 256).astype(np.uint8))


def messages(pictures: list[Image.Image]) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]


# a tiny model of each family
TINY = {"qwen2_vl": tiny_config, "qwen2_5_vl": tiny_windowed}
CASES = {
    "one_image": [picture(112, 140, 0)],
    "two_sizes": [picture(84, 196, 1), picture(57, 61, 2)],
    "one_row": [picture(28, 252, 3)],
    "text_only": [],
}


class Transformers:
    """transformers on the checkpoint itself, fed by its own picture processor."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
        self.processor = default_image_processor(folder)
        self.image_token = json.loads((folder / "config.json").read_text())["image_token_id"]

    def inputs(self, prompt: Prompt, pictures: list[Image.Image]) -> dict[str, Any]:
        ids = torch.from_numpy(prompt.token_ids)[None]
        found: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.image_token).long(),
        }
        if pictures:
            pixels = self.processor(images=pictures, return_tensors="pt")
            found["pixel_values"] = pixels["pixel_values"].to(self.model.dtype)
            found["image_grid_thw"] = pixels["image_grid_thw"]
        return found

    def visual(self, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            out = self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        merged: torch.Tensor = out.pooler_output if hasattr(out, "pooler_output") else out
        return merged

    def greedy(self, inputs: dict[str, Any], count: int) -> tuple[list[int], list[torch.Tensor]]:
        """New tokens, and the logits that each was chosen from."""
        with torch.no_grad():
            out = self.model.generate(
                **inputs,
                max_new_tokens=count,
                do_sample=False,
                repetition_penalty=1.0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), [step[0] for step in out.logits]


def our_logits(model: Model, prompt: Prompt, tokens: list[int]) -> list[np.ndarray]:
    """Logits of the prompt's last position and of every teacher-forced token."""
    backend = model.backend
    cache = backend.allocate(1)
    step = prefill_prompt(backend, cache, 0, prompt, model.processor, Timings())
    found = [backend.logits(step)[0]]
    for i, token in enumerate(tokens):
        at = np.array([len(prompt.token_ids) + i], np.int64)
        step = backend.decode(cache, backend.begin(cache, np.array([token]), at, at + prompt.delta), [int(at[0]) + 1])
        found.append(backend.logits(step)[0])
    return found


def visual_output(model: Model, prompt: Prompt) -> np.ndarray:
    embeds = model.backend.embed(model.processor.inputs, prompt.patches, prompt.grids)
    return embeds.in_order(embeds.tensor.float().numpy())


def generated(artifact: Path, pictures: list[Image.Image], folder: Path, mode: str) -> list[int]:
    """Tokens that `qwen2vl-tc generate` makes, from picture files."""
    words = ["generate", str(artifact), "--prompt", QUESTION, "--max-new-tokens", str(NEW_TOKENS), "--json"]
    words += ["--execute-mode", mode]
    for i, each in enumerate(pictures):
        each.save(folder / f"{i}.png")
        words += ["--image", str(folder / f"{i}.png")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == ("length" if len(answer["token_ids"]) == NEW_TOKENS else "stop")
    tokens: list[int] = answer["token_ids"]
    return tokens


@pytest.mark.parametrize(("operators", "visual_attention"), OPERATOR_SETS)
@pytest.mark.parametrize("shape", CONFIGS)
def test_every_graph_and_its_modules_run_eagerly_agree_with_transformers_in_fp32(
    build: Any, tmp_path: Path, shape: str, operators: str, visual_attention: str
) -> None:
    form = {"operators": operators, "visual_attention": visual_attention}
    name = shape if operators == "fused" else f"{shape}_{operators}"
    source, artifact = build(name, CONFIGS[shape], **FORMS[shape], **form)
    oracle = Transformers(source)
    models = {mode: load(artifact, engine(mode)) for mode in EXECUTE_MODES}
    assert [model.backend.name for model in models.values()] == ["reference", "eager"]
    for pictures in CASES.values():
        prompt = models["dynamo"].processor.prepare(messages(pictures))
        inputs = oracle.inputs(prompt, pictures)
        tokens, logits = oracle.greedy(inputs, NEW_TOKENS)
        assert 1 < np.std(logits[0].numpy()) < 25, "logits of the order that real models have"
        for mode, model in models.items():
            if pictures:
                assert np.abs(visual_output(model, prompt) - oracle.visual(inputs).numpy()).max() < FP32_TOLERANCE
            for ours, theirs in zip(our_logits(model, prompt, tokens[:-1]), logits, strict=True):
                assert np.abs(ours - theirs.numpy()).max() < FP32_TOLERANCE
            assert generated(artifact, pictures, tmp_path, mode) == tokens


@pytest.mark.parametrize(("operators", "visual_attention"), OPERATOR_SETS)
@pytest.mark.parametrize("family", TINY)
def test_both_forms_serve_long_prompts_and_many_pictures(
    build: Any, family: str, operators: str, visual_attention: str
) -> None:
    form = {"operators": operators, "visual_attention": visual_attention}
    source, artifact = build(f"{family}_{operators}", TINY[family](), max_length=1024, **form)
    model, oracle = load(artifact), Transformers(source)
    part = model.manifest.ge
    assert part is not None
    assert (part.operators, part.visual_attention) == (operators, visual_attention)
    six = [picture(56 + 28 * i, 196 - 28 * i, i) for i in range(6)]
    for pictures, text in ((six, "Compare. "), (CASES["one_image"], "word " * 180)):
        request = messages(pictures)
        request[0]["content"][-1]["text"] = text
        prompt = model.processor.prepare(request)
        assert pictures is six or len(prompt.token_ids) > 512
        inputs = oracle.inputs(prompt, pictures)
        tokens, logits = oracle.greedy(inputs, 64)
        for ours, theirs in zip(our_logits(model, prompt, tokens[:-1]), logits, strict=True):
            assert np.abs(ours - theirs.numpy()).max() < FP32_TOLERANCE
        assert list(model.generate(request, max_new_tokens=64).token_ids) == tokens


@pytest.mark.parametrize("mode", EXECUTE_MODES)
def test_a_prompt_continues_from_a_kept_cache_like_a_fresh_one(build: Any, mode: str) -> None:
    """Prefill takes a start position: the second part attends over what the first one wrote."""
    _, artifact = build("gqa1_untied", tiny_config(**SHAPES["gqa1_untied"]), **FORMS["gqa1_untied"])
    model = load(artifact, engine(mode))
    backend = model.backend
    prompt = model.processor.prepare(messages([]))
    whole = backend.logits(prefill_prompt(backend, backend.allocate(1), 0, prompt, model.processor, Timings()))
    # splits that leave one token, many, and all but one for the second part
    for cut in (len(prompt.token_ids) - 1, len(prompt.token_ids) // 2, 1):
        cache = backend.allocate(1)
        none = np.zeros(0, np.int64)
        for start, end in ((0, cut), (cut, len(prompt.token_ids))):
            step = backend.prefill(
                cache, 0, start, prompt.token_ids[start:end], prompt.positions[:, start:end], None, none
            )
        assert np.abs(backend.logits(step) - whole).max() < FP32_TOLERANCE


@pytest.mark.parametrize(("operators", "visual_attention"), OPERATOR_SETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", TINY)
def test_half_precision_is_no_worse_than_that_of_transformers(
    build: Any, tmp_path: Path, family: str, dtype: str, operators: str, visual_attention: str
) -> None:
    """Both against fp32 transformers on the rounded weights; RMS over five random models.

    1.5 allows for noise between five samples: both round at about the same places.
    """
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    ours: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    config = TINY[family](hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    form = {"operators": operators, "visual_attention": visual_attention}
    _, artifact = build(f"{family}_{dtype}_{operators}", config, dtype=dtype, **form)
    for seed in range(5):
        # one set of graphs serves every set of weights: convert replaces only its own part
        source = write_checkpoint(tmp_path / str(seed), config, seed=seed, dtype=dtype, tokenizer=True)
        convert(source, artifact, dtype, sync=False)
        model, exact, half = load(artifact), Transformers(source), Transformers(source, torch_dtype)
        pictures = CASES["one_image"]
        prompt = model.processor.prepare(messages(pictures))
        tokens, logits = exact.greedy(exact.inputs(prompt, pictures), 8)
        forced = our_logits(model, prompt, tokens[:-1])
        their_logits = teacher_forced(half, prompt, pictures, tokens)
        for a, b, c in zip(forced, their_logits, logits, strict=True):
            ours.append(a - c.numpy())
            theirs.append(b.float().numpy() - c.numpy())
    ratio = np.sqrt(np.mean(np.square(ours)) / np.mean(np.square(theirs)))
    print(f"{family}, {dtype}: RMS error {ratio:.2f} times that of transformers in {dtype}")
    assert ratio < 1.5


def teacher_forced(
    oracle: Transformers, prompt: Prompt, pictures: list[Image.Image], tokens: list[int]
) -> list[torch.Tensor]:
    """transformers' logits at the prompt's last position and after each token but the last, in one full pass."""
    inputs = oracle.inputs(prompt, pictures)
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]])], 1)
    whole = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == oracle.image_token).long(),
    }
    with torch.no_grad():
        logits = oracle.model(**whole).logits[0]
    return list(logits[len(prompt.token_ids) - 1 :])
