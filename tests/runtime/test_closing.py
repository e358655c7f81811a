"""A model gives back what it took, and says so when it is used where it cannot run."""

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.released import unpack

from qwen2vl_tc.artifacts.errors import RequestError, TargetError
from qwen2vl_tc.runtime import load

QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("closing") / "artifact")


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/dev/fd"))


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_no_descriptor_and_no_process_stays_behind_however_a_model_ends(artifact: Path) -> None:
    load(artifact, "reference").generate(QUESTION, max_new_tokens=2)  # what a first load opens for good
    before, processes = descriptors(), children()
    load(artifact, "reference").generate(QUESTION, max_new_tokens=2)
    assert descriptors() == before
    with load(artifact, "reference") as model:
        model.generate(QUESTION, max_new_tokens=2)
        assert descriptors() > before
    assert descriptors() == before, "also while the closed model is still there"
    model = load(artifact, "reference")
    model.close()
    model.close()
    assert (descriptors(), children()) == (before, processes)


def test_a_closed_model_refuses_every_use(artifact: Path) -> None:
    model = load(artifact, "reference")
    conversation, pieces = model.chat(), model.stream(QUESTION, max_new_tokens=8)
    next(pieces)
    model.close()
    uses: list[Any] = [
        lambda: model.generate(QUESTION),
        lambda: model.generate_batch([QUESTION]),
        lambda: model.stream(QUESTION),
        lambda: conversation.send("Hi"),
        lambda: list(pieces),
        lambda: model.take_cache(1),
    ]
    for use in uses:
        with pytest.raises(RequestError, match="this model is closed; load it again"):
            use()
    assert model.backend.name == "reference"


def test_a_forked_process_is_told_to_load_the_model_itself(artifact: Path) -> None:
    model = load(artifact, "reference")
    model.generate(QUESTION, max_new_tokens=2)
    if (pid := os.fork()) == 0:
        signal.alarm(60)
        try:
            model.generate(QUESTION, max_new_tokens=2)
        except TargetError as error:
            os._exit(7 if "cannot be used in one that was forked from it" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    model.generate(QUESTION, max_new_tokens=2)
