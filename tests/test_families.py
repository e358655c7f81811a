"""A family of the tests' own goes through every command by being put into FAMILIES alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import toy
from helpers.synthetic import tiny_config, write_checkpoint
from PIL import Image
from typer.testing import CliRunner, Result

from qwen2vl_tc.runtime.models import FAMILIES
from qwen2vl_tc.toolchain.cli.main import app

ROOT = Path(__file__).parents[1]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def known() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, toy.FAMILY.name, toy.FAMILY)
        yield


@pytest.fixture(scope="module")
def source(known: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "toy"
    return write_checkpoint(folder, tiny_config(model_type="toy_vl"), dtype="fp32", names="new", tokenizer=True)


@pytest.fixture(scope="module")
def artifact(source: Path) -> Path:
    out = source.parent / "toy.artifact"
    for words in (
        ("convert", "--src", source, "--out", out, "--no-sync"),
        ("compile", out, "--max-length", "256", "--batch", "1,2"),
        ("compile", out, "--mode", "onnx", "--weights", "fp32", "--max-length", "256"),
    ):
        done = run(*words)
        assert done.exit_code == 0, done.output
    return out


def test_no_other_source_file_knows_the_toy() -> None:
    sources = [
        path for folder in ("artifacts", "runtime", "exporters", "toolchain") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(sources) > 100
    assert not [path for path in sources if "toy" in path.read_text(encoding="utf-8").lower()]


def test_it_is_verified_against_its_original(artifact: Path, source: Path) -> None:
    from helpers.toy_original import register

    register()
    done = run("verify", artifact, "--against", source, "--json")
    graphs = json.loads(done.stdout)
    for report in (graphs, graphs["onnx"]):
        assert done.exit_code == 0 and report["passed"], done.output
        assert {case["name"] for case in report["cases"]} == {"one image", "two images", "a clip", "text only"}
        # fp32 rounds at other places here than there
        assert max(comparison["max_error"] for comparison in report["comparisons"]) < 1e-4


def test_cann_would_take_its_graphs_in_half_precision(source: Path, tmp_path: Path) -> None:
    done = run("compile", "--config", source / "config.json", "--out", tmp_path / "toy", "--max-length", "256")
    assert done.exit_code == 0, done.output
    done = run("check", tmp_path / "toy", "--json")
    assert json.loads(done.stdout)["admitted"], done.output


def test_it_answers_alike_on_both_engines(artifact: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((84, 56, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    words = ("--image", tmp_path / "picture.png", "--prompt", "Hello", "--max-new-tokens", "4", "--json")
    answers = []
    for backend in ("reference", "onnxruntime"):
        done = run("generate", artifact, "--backend", backend, *words)
        assert done.exit_code == 0, done.output
        answers.append(json.loads(done.stdout)["token_ids"])
    assert len(answers[0]) == 4 and answers[0] == answers[1]
