"""Weights count as checked when their hashing came to its end, and only then."""

import os
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2vl_tc.artifacts import integrity
from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError
from qwen2vl_tc.runtime.integrity import WeightCheck


class PanicException(BaseException):
    """What pyo3 raises for a panic in Rust: no Exception."""


def check_of(check: Callable[[Any], None]) -> WeightCheck:
    files = SimpleNamespace(files=("first", "second"))
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(weights=files), check=check, map=lambda *a, **k: None)
    return WeightCheck(artifact)


def refuses(entry: str) -> None:
    raise ArtifactError(f"{entry}: altered")


def in_the_thread(raises: BaseException, otherwise: Callable[[str], None]) -> Callable[[str], None]:
    """A check that fails so in the hashing thread, and is `otherwise` where it is called again."""

    def check(entry: str) -> None:
        if threading.current_thread().name == "weight-check":
            raise raises
        otherwise(entry)

    return check


@pytest.fixture(autouse=True)
def threads_of_blake3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_most_threads", 4)


def test_altered_weights_are_refused_every_time() -> None:
    check = check_of(refuses)
    for _ in range(2):
        with pytest.raises(ArtifactError, match="first: altered"):
            check.wait()


@pytest.mark.parametrize("stops", [PanicException("no threads"), SystemExit(), MemoryError(), OSError("no")], ids=repr)
def test_what_stops_the_thread_makes_the_waiting_one_hash(stops: BaseException) -> None:
    with pytest.raises(ArtifactError, match="first: altered"):
        check_of(in_the_thread(stops, refuses)).wait()
    seen: list[str] = []
    check_of(in_the_thread(stops, seen.append)).wait()
    assert seen == ["first", "second"]


def test_a_thread_that_cannot_start_makes_the_waiting_one_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_threads(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_threads)
    with pytest.raises(ArtifactError, match="first: altered"):
        check_of(refuses).wait()
    seen: list[str] = []
    check_of(seen.append).wait()
    assert seen == ["first", "second"]


def test_a_process_forked_while_the_thread_hashes_hashes_itself() -> None:
    go_on, parent = threading.Event(), os.getpid()

    def check(entry: str) -> None:
        if os.getpid() == parent:
            go_on.wait()
        refuses(entry)

    weights = check_of(check)
    if (pid := os.fork()) == 0:
        signal.alarm(30)
        try:
            weights.wait()
        except ArtifactError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    go_on.set()
    with pytest.raises(ArtifactError):
        weights.wait()


def test_hashing_that_panics_with_threads_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(3 << 20)
    expected, real = integrity.hash_bytes(data), integrity.blake3

    def blake3(max_threads: int) -> Any:
        if max_threads > 1:
            raise PanicException("The global thread pool has not been initialized")
        return real(max_threads=max_threads)

    monkeypatch.setattr(integrity, "blake3", blake3)
    assert integrity.hash_bytes(data) == expected
    assert integrity._most_threads == 1


@pytest.mark.parametrize("stops", [PanicException("poisoned"), SystemExit(0), KeyboardInterrupt()], ids=repr)
def test_hashing_that_is_stopped_again_is_an_error_of_ours_and_no_exit(stops: BaseException) -> None:
    def check(entry: str) -> None:
        raise stops

    weights = check_of(check)
    for _ in range(2):
        with pytest.raises(TargetError, match=f"cannot be hashed: {type(stops).__name__}") as caught:
            weights.wait()
        assert caught.value.__cause__ is stops


@pytest.mark.parametrize("stops", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_who_interrupts_the_waiting_thread_is_not_held_back(stops: BaseException) -> None:
    def interrupted(entry: str) -> None:
        raise stops

    with pytest.raises(type(stops)):
        check_of(in_the_thread(PanicException("no threads"), interrupted)).wait()


def test_hashing_that_panics_without_threads_too_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def blake3(max_threads: int) -> Any:
        raise PanicException("no pool")

    monkeypatch.setattr(integrity, "blake3", blake3)
    with pytest.raises(TargetError, match="blake3 panicked: no pool"):
        integrity.hash_bytes(bytes(3 << 20))
