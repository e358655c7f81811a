"""A small share of `make fuzz`, which tries 5,000 mutations both ways, and every one that ever found something."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.released import unpack

from fuzz import runner
from fuzz.runner import Sandbox, fuzz, judge, unsplice, variant

CORPUS = json.loads(Path(__file__).with_name("corpus.json").read_text())


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("schema") / "clean")


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
