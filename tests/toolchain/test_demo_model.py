"""The demo model is a real, small checkpoint, and it has learned what the README says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen2vl_tc.runtime import Model, load
from qwen2vl_tc.runtime.requests.answer import Timings
from qwen2vl_tc.runtime.requests.generate import prefill_prompt
from qwen2vl_tc.toolchain.demo import CHECKPOINT
from qwen2vl_tc.toolchain.demo.pictures import (
    COLOURS,
    DIRECTIONS,
    PLACES,
    SHAPES,
    WELCOME,
    Thing,
    conversation,
    kept_from_training,
    sample,
    turns,
)
from scripts.demo_model.evaluate import answer_by_artifact, answer_by_transformers, held_out, score
from scripts.demo_model.inputs import HfInputs

from .conftest import Run

# as in test_parity.py: sums of a few hundred products in another order
FP32_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """The demo model in fp32, for batches of 1 and 4 and 512 cache positions. Tests do not change it."""
    artifact = tmp_path_factory.mktemp("demo_model") / "artifact"
    converted = run("convert", "--src", CHECKPOINT, "--out", artifact, "--dtype", "fp32", "--no-sync")
    assert converted.exit_code == 0, converted.output
    compiled = run("compile", artifact, "--max-length", "512", "--batch", "1,4")
    assert compiled.exit_code == 0, compiled.output
    return artifact


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> Model:
    return load(demo_artifact)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, dict[str, Any]]:
    """transformers' model in fp32, and what it says about the keys."""
    from transformers import Qwen2VLForConditionalGeneration

    found, info = Qwen2VLForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    return found.eval(), info


def test_it_is_small_and_transformers_loads_every_weight(loaded: tuple[Any, dict[str, Any]]) -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 4_000_000
    assert not any(loaded[1].values()), loaded[1]


def test_its_tokenizer_agrees_with_transformers_and_takes_any_text(model: Model) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    for text in ("Where is the red circle?", "日本語 🙂 ünï\tcode\n", "<|im_start|>user\nHi<|im_end|>"):
        ids = model.processor.tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert model.processor.decode(ids, skip_special_tokens=False) == text
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == model.processor.prepare(messages).text


def test_evaluation_shows_only_combinations_that_training_never_does() -> None:
    for seed in range(300):
        for moves in (False, True):
            assert not any(map(kept_from_training, sample(seed, False, moves).things))
            assert all(map(kept_from_training, sample(seed, True, moves).things))
    for places in (PLACES, tuple(DIRECTIONS)):
        trained = {
            thing
            for colour in COLOURS
            for shape in SHAPES
            for where in places
            if not kept_from_training(thing := Thing(colour, shape, where))
        }
        # each part is known, only their combination is new
        assert {(t.colour, t.shape) for t in trained} == {(c, s) for c in COLOURS for s in SHAPES}
        assert {(t.shape, t.where) for t in trained} == {(s, p) for s in SHAPES for p in places}


def test_it_answers_held_out_questions_through_the_runtime(demo_artifact: Path) -> None:
    found = score(answer_by_artifact(demo_artifact), 40)
    assert set(found) == {"colour", "shape", "count", "position", "description", "movement", "follow-up"}
    for kind, each in found.items():
        # of 200 scenes 0.93 to 1.0, by kind; here a kind is asked 8 to 40 times
        assert each.share >= 0.85, (kind, each)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_for_onnxruntime_it_passes_verification_and_answers_as_well(
    demo_artifact: Path, run: Run, tmp_path: Path, weights: str
) -> None:
    artifact = tmp_path / "artifact"
    assert run("convert", "--src", CHECKPOINT, "--out", artifact, "--no-sync").exit_code == 0
    assert run("compile", artifact, "--mode", "onnx", "--weights", weights, "--max-length", "512").exit_code == 0
    verified = run("verify", artifact, "--against", CHECKPOINT)
    assert verified.exit_code == 0, verified.output
    before, after = (score(answer_by_artifact(path), 20) for path in (demo_artifact, artifact))
    # what a question's words decide by little, rounding may turn: one answer in fifty, of 96 and more
    assert sum(each.right for each in after.values()) >= sum(each.right for each in before.values()) - 2


def test_transformers_gives_the_same_answers(demo_artifact: Path) -> None:
    ours, theirs = answer_by_artifact(demo_artifact), answer_by_transformers(CHECKPOINT)
    for messages, _ in held_out(5):
        assert ours(messages) == theirs(messages)


def test_it_greets(model: Model) -> None:
    for said in ("Hello", "Hi!"):
        answer = model.generate([{"role": "user", "content": said}])
        assert (answer.text, answer.finish_reason) == (WELCOME, "stop")


def test_its_fp32_logits_agree_with_transformers(model: Model, loaded: tuple[Any, dict[str, Any]]) -> None:
    """On a picture and on a clip, at the prompt's end and after every token of the answer."""
    inputs, backend = HfInputs(model.processor), model.backend
    for moves in (False, True):
        scene = sample(7, held_out=True, moves=moves)
        asked = turns(scene, np.random.default_rng(7))[:2]
        prompt = model.processor.prepare(conversation(scene, asked))
        whole = model.processor.prepare(conversation(scene, asked, answer_last=True), add_generation_prompt=False)
        with torch.no_grad():
            theirs = loaded[0](**inputs.batch([whole])).logits[0].numpy()
        cache = backend.allocate(1)
        length = len(prompt.token_ids)
        assert whole.token_ids[:length].tolist() == prompt.token_ids.tolist()
        step = prefill_prompt(backend, cache, 0, prompt, model.processor, Timings())
        for at in range(length, len(whole.token_ids)):
            assert np.abs(backend.logits(step)[0] - theirs[at - 1]).max() < FP32_TOLERANCE
            where = np.array([at], np.int64)
            step = backend.decode(
                cache, backend.begin(cache, whole.token_ids[at : at + 1], where, where + prompt.delta), [at + 1]
            )


def test_it_holds_what_a_published_checkpoint_holds() -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.json"),
        *("preprocessor_config.json", "generation_config.json"),
    }
    assert json.loads((CHECKPOINT / "config.json").read_text())["architectures"] == ["Qwen2VLForConditionalGeneration"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--out", "file"], "error: file: File exists"),
        (["train", "--out", "."], "error: .: is not empty"),
        (["evaluate", "--artifact", "absent"], "absent: no such folder"),
        (["evaluate", "--scenes", "0"], "--scenes"),
    ],
)
def test_what_its_commands_cannot_do_they_say_without_a_traceback(words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "scripts.demo_model", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
