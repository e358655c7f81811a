"""Qwen2.5-VL as a user meets it: a build with its self-test, a clip whose clock runs ahead of its tokens, a chat."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.synthetic import tiny_windowed, write_checkpoint
from PIL import Image
from typer.testing import CliRunner

from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.runtime import Model, load
from qwen2vl_tc.toolchain.cli.main import app

LENGTH = 512


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windowed")
    write_checkpoint(folder / "hf", tiny_windowed(), dtype="fp32", tokenizer=True)
    words = ["build", "--src", folder / "hf", "--out", folder / "a", "--max-length", LENGTH, "--batch", "1,2"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return folder / "a"


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    return load(artifact, "reference")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]


def test_a_build_is_verified_and_has_a_self_test(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest.verification == "passed" and manifest.selftest is not None
    done = CliRunner().invoke(app, ["selftest", str(artifact), "--backend", "reference"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.1}], ids=["greedy", "penalised"])
def test_a_clip_whose_clock_runs_out_of_positions_is_refused_before_any_compute(
    model: Model, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [picture(56, 56, seed) for seed in range(8)]
    # a step of the clip takes a minute and more: its time axis ends far behind its tokens
    size = {"resized_height": 56, "resized_width": 56}
    request = asked({"type": "video", "video": frames, "sample_fps": 0.028, **size})
    prompt = model.processor.prepare(request)
    assert prompt.delta > 300
    room = LENGTH - len(prompt.token_ids) - prompt.delta + 1
    assert len(model.generate(request, max_new_tokens=room, ignore_eos=True, **settings).token_ids) == room
    monkeypatch.setattr(model.backend, "visual", lambda calls: pytest.fail("computed"))
    with pytest.raises(RequestError, match=rf"up to rotary position .* ask for at most {room}, or compile with"):
        model.generate(request, max_new_tokens=room + 1, **settings)


def test_an_engine_reads_no_position_that_its_table_does_not_have(model: Model) -> None:
    backend = model.backend
    cache = backend.allocate(1)
    step = backend.begin(cache, np.array([5]), np.array([7]), np.array([LENGTH - 1]))
    step = backend.decode(cache, step, [8])
    with pytest.raises(RequestError, match=f"rotary position {LENGTH} are needed"):
        backend.decode(cache, step, [9])


def test_a_chat_keeps_what_it_has_seen_and_answers_as_a_new_request_does(model: Model) -> None:
    chat, said = model.chat(), []
    for text, pictures in (("One?", [picture(84, 140)]), ("Two?", [picture(30, 200, 1)]), ("And?", [])):
        shown = [{"type": "image", "image": each} for each in pictures]
        said.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
        answer = chat.send(text, images=pictures, max_new_tokens=6)
        assert answer.token_ids == model.generate(said, max_new_tokens=6).token_ids
        said.append({"role": "assistant", "content": answer.text})
    assert answer.cached_tokens > 20


def test_a_batch_of_a_picture_a_clip_and_text_answers_as_each_alone(model: Model) -> None:
    clip = {"type": "video", "video": [picture(56, 84, seed) for seed in range(4)]}
    requests = [
        asked({"type": "image", "image": picture(57, 61)}),
        asked(clip, {"type": "image", "image": picture(140, 28)}),
    ]
    requests.append(asked())
    alone = [model.generate(request, max_new_tokens=5).token_ids for request in requests]
    assert [each.token_ids for each in model.generate_batch(requests, max_new_tokens=5)] == alone
