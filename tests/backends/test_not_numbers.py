"""Logits that are no numbers are an error on CPU, whoever chooses the token, and reach no later answer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.altered import Arrays, Tensors, altered, altered_onnx
from helpers.synthetic import tiny_config
from PIL import Image
from typer.testing import CliRunner

from qwen2vl_tc.artifacts.errors import ArtifactError, ToolchainError
from qwen2vl_tc.artifacts.manifest import Manifest
from qwen2vl_tc.runtime import load
from qwen2vl_tc.toolchain.cli.main import app

FORMS = {"fused": "reference", "recipe": "reference", "onnx": "onnxruntime", "onnx --standard-only": "onnxruntime"}
PICTURE = Image.new("RGB", (140, 140), "red")

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(form) to an artifact that `load` runs in this form; cached."""
    found: dict[str, Path] = {}

    def make(form: str) -> Path:
        if form not in found:
            operators = "recipe" if form == "recipe" else "fused"
            _, artifact = build(f"not_numbers_{operators}", tiny_config(), batches="1,2", operators=operators)
            if form.startswith("onnx"):
                artifact = Path(shutil.copytree(artifact, tmp_path_factory.mktemp("onnx") / "artifact"))
                words = ["compile", str(artifact), "--mode", "onnx", "--max-length", "256", *form.split()[1:]]
                assert CliRunner().invoke(app, words).exit_code == 0
            found[form] = artifact
        return found[form]

    return make


def poisoned(artifact: Path, out: Path, form: str, parameter: str, rows: Any) -> Path:
    """A copy with rows of a matrix that are NaN, and right hashes."""

    def tensors(found: Tensors, manifest: Manifest) -> None:
        if parameter in found:
            found[parameter] = found[parameter].clone()
            found[parameter][rows] = float("nan")

    def arrays(found: Arrays) -> None:
        scales = f"{parameter}.scales"
        found[scales if scales in found else f"{parameter}.columns.scales"].reshape(-1)[rows] = np.nan

    return altered_onnx(artifact, out, "text", arrays) if "onnx" in form else altered(artifact, out, tensors)


@pytest.mark.parametrize("form", FORMS)
def test_a_poisoned_weight_is_an_error_that_names_the_graph(made: Made, tmp_path: Path, form: str) -> None:
    artifact = poisoned(made(form), tmp_path / "poisoned", form, "lm_head.weight", 7)
    (tmp_path / "requests").write_text('[{"role": "user", "content": "Hi."}]\n' * 2)
    # a penalty brings the logits to the host
    requests = (("--prompt", "Hello"), ("--requests", str(tmp_path / "requests")))
    for request in (*requests, ("--prompt", "Hello", "--repetition-penalty", "1.1")):
        result = CliRunner().invoke(app, ["generate", str(artifact), *request, "--max-new-tokens", "4"])
        assert result.exit_code == 2 and not result.stdout.strip()
        assert "prefill: its logits hold nan; verify the artifact" in result.stderr
    assert load(artifact).backend.name == FORMS[form]


@pytest.mark.parametrize("form", FORMS)
def test_a_token_that_poisons_the_next_one_is_still_given_out(made: Made, tmp_path: Path, form: str) -> None:
    whole = load(made(form)).generate("Hello", max_new_tokens=3, ignore_eos=True)
    first, second, _ = whole.token_ids
    assert {first, second}.isdisjoint(whole.prompt_token_ids) and first != second
    model = load(poisoned(made(form), tmp_path / "poisoned", form, "model.embed_tokens.weight", second))
    seen: list[int] = []
    with pytest.raises(ToolchainError, match="decode: its logits hold nan"):
        model.generate("Hello", max_new_tokens=3, ignore_eos=True, on_token=lambda token: seen.append(token.id))
    assert seen == [first, second]
    assert model.generate("Hello", max_new_tokens=2, ignore_eos=True).token_ids == (first, second)


def test_weights_that_were_altered_are_named_before_what_they_give(made: Made, tmp_path: Path) -> None:
    artifact = poisoned(made("onnx"), tmp_path / "poisoned", "onnx", "lm_head.weight", 7)
    shutil.copy(made("onnx") / "manifest.json", artifact)
    with pytest.raises(ArtifactError, match=r"text\.onnx\.data: blake3"):
        load(artifact).generate("Hello", max_new_tokens=1)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_failed_request_leaves_in_the_cache_reaches_no_later_answer(
    made: Made, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some attention multiplies what lies behind a row's length by zero, and zero times a NaN is NaN."""
    model = load(made(form))
    asked = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]}]
    text = [{"role": "user", "content": "Say something."}]
    expected = model.generate(text, max_new_tokens=4).token_ids
    chat = model.chat()
    chat.send("Hello", max_new_tokens=2)
    visual = model.backend.visual

    def not_numbers(calls: Any) -> Any:
        return visual(calls) * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(model.backend, "visual", not_numbers)
        for rows in (1, 2):
            with pytest.raises(ToolchainError, match="prefill: its logits hold nan"):
                model.generate_batch([asked] * rows, max_new_tokens=4)
            answers = model.generate_batch([text] * rows, max_new_tokens=4)
            assert [answer.token_ids for answer in answers] == [expected] * rows
        with pytest.raises(ToolchainError, match="prefill: its logits hold nan"):
            chat.send("What is this?", [PICTURE], max_new_tokens=4)
    answer = chat.send("So?", max_new_tokens=4)
    assert answer.token_ids == model.generate(chat.messages[:-1], max_new_tokens=4).token_ids
    assert answer.cached_tokens > 0 or not model.backend.reuses_caches
