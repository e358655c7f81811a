"""A small share of `make fuzz`, which tries 5,000 mutations both ways, and every one that ever found something."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.onnx_artifact import onnx_artifact
from helpers.released import unpack

from fuzz import edges, runner
from fuzz.mutations import mutate
from fuzz.runner import Sandbox, fuzz, judge, unsplice, variant

CORPUS = json.loads(Path(__file__).with_name("corpus.json").read_text())


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("schema") / "clean")


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_artifact(tmp_path_factory.mktemp("onnx") / "clean")


def test_mutated_onnx_models_end_in_our_own_error_or_in_an_answer(onnx: Path, tmp_path: Path) -> None:
    failures, refused = [], 0
    with Sandbox(onnx) as sandbox:
        for number in range(60):
            rng = random.Random(f"onnx {number}")
            path = f"graphs/onnx/{rng.choice(('text', 'visual'))}.onnx"
            after = mutate(path, (onnx / path).read_bytes(), rng)
            answer = sandbox.run(variant(onnx, tmp_path / "variant", {path: after}, restamp=True))
            refused += answer["outcome"] == "refused"
            if problem := judge(path, answer, restamped=True):
                failures.append((number, path, problem))
    assert failures == []
    assert refused > 30


def test_command_lines_that_no_one_means_end_in_words(onnx: Path, tmp_path: Path) -> None:
    assert edges.fuzz(onnx, tmp_path / "files", 6, 14) == []


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a", "--requests", "fifo"),
        ("generate", "a", "--prompt", "x", "--image", "fifo"),
        ("compile", "--config", "fifo", "--out", "x"),
        ("inspect", "fifo"),
        ("bench", "a", "--size", "9" * 5000 + "x1"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_a_pipe_that_nobody_writes_into_and_a_number_without_end_are_refused(
    words: tuple[str, ...], onnx: Path, tmp_path: Path
) -> None:
    edges.make_files(onnx, tmp_path / "files")
    assert edges.run(edges.Line(words, "", {}), tmp_path / "files") is None


@pytest.mark.parametrize(
    ("script", "said"),
    [("print('Traceback')", "a traceback"), ("sys.exit(70)", "exit code 70"), ("time.sleep(60)", "no end after 1 s")],
)
def test_the_fuzz_of_command_lines_sees_what_is_wrong(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edges, "_START", f"import sys, time; {script}")
    monkeypatch.setattr(edges, "SECONDS", 1.0 if "sleep" in script else 60.0)
    assert said in str(edges.run(edges.Line(("inspect",), "", {}), tmp_path))


@pytest.mark.parametrize("restamp", [False, True], ids=["hashes as they were", "hashes renewed"])
def test_mutated_files_end_in_our_own_error_or_in_the_same_answer(clean: Path, tmp_path: Path, restamp: bool) -> None:
    report = fuzz(clean, tmp_path / "variant", 100, 11, restamp)
    assert report.failures == []
    assert report.outcomes["refused"] > 50


def test_what_once_failed_does_not_fail_again(clean: Path, tmp_path: Path) -> None:
    failures: list[Any] = []
    with Sandbox(clean) as sandbox:
        for known in CORPUS:
            path = known["path"]
            changes = {path: unsplice((clean / path).read_bytes(), known["splice"])}
            answer = sandbox.run(variant(clean, tmp_path / "variant", changes, known["restamp"]))
            if problem := judge(path, answer, known["restamp"]):
                failures.append((known, problem))
    assert failures == []


def test_an_artifact_that_hangs_its_process_counts_as_a_failure_and_the_next_one_is_tried(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Sandbox(clean) as sandbox:
        assert sandbox.run(clean)["outcome"] == "same"
        monkeypatch.setattr(runner, "SECONDS", 0.0)
        assert "hangs" in str(judge("x", sandbox.run(clean), True))
        monkeypatch.undo()
        assert sandbox.run(clean)["outcome"] == "same"
