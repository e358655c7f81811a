"""bench and bench cold-start: figures that come from the run, and all that they depend on beside them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.emulated_npu import emulated_npu, load_on_npu
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.runtime import Generation, Model, load
from qwen2vl_tc.toolchain.bench import page_cache
from qwen2vl_tc.toolchain.bench.bench import Bench, BenchOptions, bench, markdown

from .conftest import Run

# a picture that leaves room in a cache of 256
SIZE = (112, 84)


def quiet(step: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def model(built: Path) -> Model:
    return load(built, "reference")


def timed(monkeypatch: pytest.MonkeyPatch, model: Model, runs: list[tuple[float, tuple[float, ...]]]) -> list[Any]:
    """Replace each run's times by (ViT + prefill, steps); returns what generate_batch was called with."""
    given = iter(runs)
    calls: list[Any] = []
    original: Callable[..., list[Generation]] = model.generate_batch

    def generate_batch(requests: Any, **settings: Any) -> list[Generation]:
        calls.append((len(requests), settings))
        first, steps = next(given)
        answers = original(requests, **settings)
        for answer in answers:
            answer.timings_ms.update(visual=first / 4, prefill=first * 3 / 4)
            object.__setattr__(answer, "token_ms", steps)
        return answers

    monkeypatch.setattr(model, "generate_batch", generate_batch)
    return calls


def test_the_first_step_is_apart_warm_up_is_left_out_and_decode_is_over_all_other_steps(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = timed(
        monkeypatch, model, [(900.0, (50.0, 50.0)), (100.0, (1.0, 2.0)), (300.0, (3.0, 4.0)), (200.0, (5.0, 99.0))]
    )
    measured = bench(model, BenchOptions(3, size=SIZE, batch=2, warmup=1, runs=3), quiet)
    assert [rows for rows, _ in calls] == [2] * 4
    assert all(settings["max_new_tokens"] == 3 and settings["ignore_eos"] for _, settings in calls)
    assert (measured.first_step_ms, measured.visual_ms, measured.prefill_ms) == (200.0, 50.0, 150.0)
    assert measured.decode is not None
    assert (measured.decode.steps, measured.decode.mean_ms, measured.decode.p50_ms) == (6, 19.0, 3.5)
    assert 90 < measured.decode.p99_ms < 99
    assert measured.decode.tokens_per_second == round(2 * 1000 / 19.0, 3)


def test_every_run_makes_all_tokens_whatever_ends_an_answer(model: Model) -> None:
    measured = bench(model, BenchOptions(40, size=SIZE, warmup=0, runs=2), quiet)
    assert measured.new_tokens == 40
    assert measured.decode is not None
    assert measured.decode.steps == 2 * 39


def test_one_token_has_no_decode_and_the_table_says_so(model: Model) -> None:
    measured = bench(model, BenchOptions(1, size=SIZE, warmup=0, runs=1), quiet)
    assert measured.decode is None
    assert "| - | - | - | - |" in markdown(measured)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (BenchOptions(batch=3), "largest decode graph takes 2; compile it with --batch 3"),
        (BenchOptions(runs=0), "runs is 0"),
        (BenchOptions(max_new_tokens=4000, size=SIZE), "max_new_tokens 4000 need a cache of"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    model: Model, monkeypatch: pytest.MonkeyPatch, options: BenchOptions, said: str
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(type(model.backend), "run_graph", lambda *args: ran.append(args))
    with pytest.raises(RequestError, match=said):
        bench(model, options, quiet)
    assert not ran


def test_the_command_prints_one_markdown_table_and_what_it_depends_on(run: Run, built: Path, picture: Path) -> None:
    result = run("bench", built, "--image", picture, "--max-new-tokens", "4", "--runs", "2", "--backend", "reference")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    head, rule, figures = (line.strip("|").split("|") for line in lines[:3])
    assert len(head) == len(rule) == len(figures)
    assert set("".join(rule)) <= set("- :")
    assert lines[3] == ""
    assert all(line.startswith("- ") for line in lines[4:])
    said = "\n".join(lines[4:])
    for stated in ("fp32", "backend reference on cpu", "batch 1", "shapes.png", "1 warm-up run(s), then 2", "torch 2."):
        assert stated in said


def test_json_holds_every_field_and_the_eager_mode_its_name(run: Run, built: Path) -> None:
    words = ("--size", "112x84", "--max-new-tokens", "4", "--runs", "1", "--warmup", "0", "--batch", "2", "--json")
    result = run("bench", built, *words, "--execute-mode", "eager", "--backend", "reference")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == set(Bench.__dataclass_fields__)
    assert (found["execute_mode"], found["batch"], found["patches"]) == ("eager", 2, 8 * 6)
    assert found["input"] == "generated picture of 112 x 84"
    assert found["first_step_ms"] == pytest.approx(found["visual_ms"] + found["prefill_ms"], abs=0.002)
    assert found["decode"]["steps"] == 3
    assert found["memory"]["host"] > 0
    assert found["memory"]["device"] is None
    assert found["machine"]["cores"] > 0


def test_on_an_npu_device_memory_and_versions_are_stated(
    build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, artifact = build("npu", tiny_config(), dtype="bf16", batches="1,3", max_length=2048)
    with emulated_npu(monkeypatch, tmp_path):
        measured = bench(load_on_npu(artifact), BenchOptions(4, size=SIZE, warmup=0, runs=1), quiet)
    assert measured.memory.device is not None
    assert measured.machine.device == "Ascend910B2"
    assert {"torch", "torch-npu", "cann", "driver"} <= set(measured.versions)
    assert "peak device memory" in markdown(measured)


def test_onnx_models_are_measured_like_graphs(run: Run, built: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(built, tmp_path / "artifact")
    made = run("compile", artifact, "--mode", "onnx", "--weights", "int8", "--max-length", "256")
    assert made.exit_code == 0, made.output
    words = ("--size", "112x84", "--backend", "onnxruntime", "--runs", "1", "--json")
    speed = json.loads(run("bench", artifact, *words, "--max-new-tokens", "4").stdout)
    assert (speed["dtype"], speed["backend"]) == ("int8", "onnxruntime")
    assert "onnxruntime" in speed["versions"]
    assert speed["threads"] > 0
    cold = json.loads(run("bench", "cold-start", artifact, *words).stdout)
    assert cold["backend"] == "onnxruntime"
    assert list(cold["phases_ms"]) == PHASES
    assert sum(cold["phases_ms"].values()) <= cold["first_token_ms"]


def test_a_wrong_size_is_refused(run: Run, built: Path) -> None:
    for words in (("bench", built), ("bench", "cold-start", built)):
        result = run(*words, "--size", "large")
        assert result.exit_code == 2
        assert "--size large: expected width and height" in result.stderr


PHASES = ["start", "imports", "manifest", "weights", "graphs", "device", "processor"]
PHASES += ["preprocess", "visual", "prefill", "weight_check"]


def test_cold_start_has_every_phase_and_they_are_no_more_than_the_whole(run: Run, built: Path) -> None:
    result = run("bench", "cold-start", built, "--size", "112x84", "--runs", "2", "--backend", "reference", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found["phases_ms"]) == PHASES
    assert len(found["runs"]) == 2
    for each in found["runs"]:
        assert all(ms >= 0 for ms in each["phases_ms"].values())
        assert sum(each["phases_ms"].values()) <= each["first_token_ms"]
        after = sum(each["phases_ms"][name] for name in ("visual", "prefill", "weight_check"))
        assert each["before_visual_ms"] == pytest.approx(each["first_token_ms"] - after, abs=0.1)
    assert (found["cache"], found["runs"][0]["resident"]) == ("warm", 1.0)
    assert "before the parent starts the process" in found["clock"]


def test_cold_start_prints_a_table_with_the_state_of_the_cache(run: Run, built: Path) -> None:
    result = run("bench", "cold-start", built, "--size", "112x84", "--runs", "1", "--cold")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:2] == ["| phase | ms |", "| --- | ---: |"]
    assert "- cold page cache: " in result.stdout


def test_cold_start_passes_on_what_its_processes_refuse(run: Run, built: Path) -> None:
    result = run("bench", "cold-start", built, "--size", "112x84", "--runs", "1", "--backend", "npu")
    assert result.exit_code == 2
    assert "backend npu: no NPU is here" in result.stderr.splitlines()[-1]


def test_files_are_seen_in_the_page_cache(tmp_path: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_bytes(bytes(1 << 20))
    empty.write_bytes(b"")
    page_cache.drop([file, empty])
    page_cache.warm([file, empty])
    assert page_cache.resident([file, empty]) == 1.0
