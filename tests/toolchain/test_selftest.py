"""The self-test: made with the artifact, passed by a right device, failed by name where a fault was put into it."""

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from helpers.emulated_npu import emulated_npu, load_on_npu
from helpers.faults import (
    ATTENTION,
    ROTATIONS,
    WRITES,
    Faulty,
    columns_unturned,
    heads_swapped,
    lengths_misread,
    mask_ignored,
    not_numbers,
    one_row_uniform,
    uniform_average,
    unwritten,
    written_one_off,
)
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.errors import TargetError
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.runtime import Model, loader
from qwen2vl_tc.runtime.backends.npu import NpuBackend
from qwen2vl_tc.toolchain.host import warm
from qwen2vl_tc.toolchain.selftest.check import SelftestDeparture, check_model
from qwen2vl_tc.toolchain.selftest.make import make_selftest

from .conftest import Run


def silent(step: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def artifact(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the device: bf16, batches of 1 and 3, a cache beyond position 512, answers by the reference backend."""
    _, path = build("npu", tiny_config(), dtype="bf16", batches="1,3", max_length=2048)
    copy = Path(copytree(path, tmp_path_factory.mktemp("selftest") / "artifact"))
    make_selftest(copy, silent, sync=False)
    return copy


@pytest.fixture(scope="module")
def device(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Faulty]]:
    """The artifact on the emulated device, which also counts as an NPU, and what makes that misbehave."""
    with pytest.MonkeyPatch.context() as patch, emulated_npu(patch, tmp_path_factory.mktemp("cache")):
        for module in (loader, warm):
            patch.setattr(module, "npu_problem", lambda: None)
        faulty = Faulty(patch)
        yield load_on_npu(artifact), faulty


def departure(device: tuple[Model, Faulty]) -> SelftestDeparture:
    model, faulty = device
    try:
        found = check_model(model).departure
    finally:
        faulty.repair()
    assert found is not None, "the fault was not noticed"
    return found


def test_an_untouched_device_passes_every_call_of_every_graph(device: tuple[Model, Faulty]) -> None:
    report = check_model(device[0])
    assert report.passed
    assert (report.device, report.source, report.dtype, report.not_covered) == ("npu:0", "reference", "bf16", ())
    counts = {graph: sum(each.graph == graph for each in report.outcomes) for graph in ("visual", "prefill")}
    assert counts == {"visual": 2, "prefill": 10}
    for graph, rows in (("decode_b1", {0}), ("decode_b3", {0, 1, 2})):
        found = [each for each in report.outcomes if each.graph == graph]
        assert len(found) == 12 and {each.row for each in found} == rows


def test_the_limit_is_twice_the_reference_s_own_error_and_says_so(device: tuple[Model, Faulty]) -> None:
    part, report = device[0].manifest.selftest, check_model(device[0])
    assert part is not None
    for kind, own in (("visual", part.visual), ("prefill", part.prefill), ("decode", part.decode)):
        limit = report.limits[kind]
        assert (limit.rms, limit.largest) == (2 * own.rms, 2 * own.largest)
        assert limit.reason.startswith("2 x the reference backend's own error on the GE graphs, 0.0")
        worst = max(each.rms or 0.0 for each in report.outcomes if each.graph.startswith(kind))
        assert worst == pytest.approx(own.rms), "the emulated device computes what the reference computes"


@pytest.mark.parametrize(
    ("graph", "operators", "fault", "known"),
    [
        ("visual", ATTENTION, uniform_average, "uniform average"),
        ("prefill", ATTENTION, uniform_average, "uniform average"),
        ("decode_b1", ATTENTION, uniform_average, "uniform average"),
        ("decode_b3", ATTENTION, uniform_average, "uniform average"),
        ("visual", ROTATIONS, columns_unturned, "leaves the last columns of each head unturned"),
        ("visual", ATTENTION, unwritten, "left as it was"),
        ("prefill", ATTENTION, not_numbers, "left as it was in fresh memory"),
        ("decode_b1", ATTENTION, unwritten, "left as it was"),
        ("prefill", ATTENTION, mask_ignored, "a mask that is ignored beyond position 512"),
        ("visual", ATTENTION, lengths_misread, "cumulative lengths taken as plain ones"),
        ("prefill", WRITES, written_one_off, "written one position off"),
        ("decode_b1", WRITES, written_one_off, "written one position off"),
        ("visual", ATTENTION, heads_swapped, "two heads"),
        ("prefill", ATTENTION, heads_swapped, "two heads"),
        ("decode_b3", ATTENTION, heads_swapped, "two heads"),
        ("decode_b3", ATTENTION, one_row_uniform, "rows split wrongly"),
    ],
)
def test_a_fault_of_an_operator_is_caught_and_named_by_its_graph(
    device: tuple[Model, Faulty], graph: str, operators: tuple[str, ...], fault: Any, known: str
) -> None:
    device[1].set(graph, operators, fault)
    found = departure(device)
    assert found.graph == graph
    assert any(known in each for each in found.known), found.known
    worst = found.worst
    assert worst is not None
    # as far from the limit as rounding is on its other side
    assert worst.rms is None or worst.rms > 3 * found.limit.rms


@pytest.mark.parametrize("graph", ["visual", "prefill", "decode_b1"])
def test_an_output_left_as_it_was_is_caught_and_named(device: tuple[Model, Faulty], graph: str) -> None:
    device[1].leave_outputs(graph)
    found = departure(device)
    assert found.graph == graph
    assert found.known[0].startswith("an output left as it was")


def test_the_form_to_compile_instead_is_the_other_one_of_the_graph_that_departs(device: tuple[Model, Faulty]) -> None:
    device[1].set("visual", ATTENTION, uniform_average)
    instead = departure(device).instead
    part = device[0].manifest.ge
    assert part is not None
    other = "tnd" if part.visual_attention == "segments" else "segments"
    assert f"--visual-attention {other} --operators fused --soc Ascend910B2 --max-length 2048 --batch 1,3" in instead
    device[1].set("decode_b3", ATTENTION, uniform_average)
    assert f"--visual-attention {part.visual_attention} --operators recipe" in departure(device).instead


def test_a_graph_that_the_device_refuses_is_the_one_that_departs(
    device: tuple[Model, Faulty], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_graph = NpuBackend.run_graph

    def refuse(self: Any, name: str, inputs: Any) -> Any:
        if name == "prefill":
            raise RuntimeError("E89999: tiling failed\nTraceBack ...")
        return run_graph(self, name, inputs)

    monkeypatch.setattr(NpuBackend, "run_graph", refuse)
    found = departure(device)
    assert (found.graph, found.refused) == ("prefill", "prefill does not run on npu:0: E89999: tiling failed")


def test_selftest_and_warm_end_with_code_1_and_the_graph_where_the_device_is_wrong(
    run: Run, device: tuple[Model, Faulty], artifact: Path
) -> None:
    right = run("selftest", artifact, "--backend", "npu")
    assert right.exit_code == 0, right.output
    assert right.stdout.splitlines()[-1].startswith("self-test passed on npu:0 in ")
    assert run("warm", artifact).exit_code == 0
    device[1].set("prefill", ATTENTION, uniform_average)
    try:
        as_json = run("selftest", artifact, "--backend", "npu", "--json")
        wrong, warmed = run("selftest", artifact, "--backend", "npu"), run("warm", artifact)
    finally:
        device[1].repair()
    plain = json.loads(as_json.stdout)
    assert (as_json.exit_code, plain["passed"], plain["departure"]["graph"]) == (1, False, "prefill")
    for result in (wrong, warmed):
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("error: self-test: prefill (short, tokens ")
        assert "known to look like it: attention that returns the uniform average of the values: " in result.stdout
        assert "\ncompile instead: qwen2vl-tc compile ARTIFACT --visual-attention " in result.stdout


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_the_artifact_s_other_backends_run_it_too(run: Run, artifact: Path, tmp_path: Path, backend: str) -> None:
    copy = Path(copytree(artifact, tmp_path / "artifact"))
    if backend == "onnxruntime":
        result = run("compile", copy, "--mode", "onnx", "--weights", "int8", "--max-length", "2048")
        assert result.exit_code == 0, result.output
    result = run("selftest", copy, "--backend", backend)
    assert result.exit_code == 0, result.output
    assert f" on cpu ({backend}, {'bf16' if backend == 'reference' else 'int8'})" in result.stdout


def test_a_cache_shorter_than_the_stored_prompts_is_refused_with_the_length(
    device: tuple[Model, Faulty], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device[0].backend, "max_length", 512)
    with pytest.raises(TargetError, match=r"takes 662 cache positions, backend npu has 512; compile with --max-length"):
        check_model(device[0])


def test_inspect_says_what_answered_it(run: Run, artifact: Path) -> None:
    assert json.loads(run("inspect", artifact, "--json").stdout)["selftest"] == "reference"
    assert read_manifest(artifact).selftest is not None
    line = next(line for line in run("inspect", artifact).stdout.splitlines() if "self-test" in line)
    assert "answers by reference" in line
