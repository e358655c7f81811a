"""warm on the emulated device: every graph is compiled into the user's cache and has run once."""

from pathlib import Path
from typing import Any

import pytest
from helpers.emulated_npu import EmulatedGraph, emulated_npu
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.runtime import loader
from qwen2vl_tc.runtime.backends import npu
from qwen2vl_tc.toolchain.host import warm

from .conftest import Run


@pytest.fixture(scope="module")
def artifact(build: Any) -> Path:
    _, path = build("npu", tiny_config(), dtype="bf16", batches="1,3", max_length=2048)
    assert isinstance(path, Path)
    return path


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The emulated device, taken for an NPU host with driver 24.1; yields the cache's home."""
    with emulated_npu(monkeypatch, tmp_path):
        for module in (loader, warm):
            monkeypatch.setattr(module, "npu_problem", lambda: None)
        for module in (npu, warm):
            monkeypatch.setattr(module, "driver_version", lambda: "24.1")
        yield tmp_path / "qwen2vl-tc" / "ge"


def test_every_graph_is_compiled_and_run_and_the_cache_is_named(
    run: Run, artifact: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    original = npu.NpuBackend.run_graph

    def record(self: Any, name: str, inputs: Any) -> Any:
        ran.append(name)
        return original(self, name, inputs)

    monkeypatch.setattr(npu.NpuBackend, "run_graph", record)
    before = {path: path.stat().st_mtime_ns for path in artifact.rglob("*")}
    result = run("warm", artifact)
    assert result.exit_code == 0, result.output
    graphs = ["visual", "prefill", "decode_b1", "decode_b3"]
    part = read_manifest(artifact).ge
    assert part is not None
    assert graphs == [graph.name for graph in part.graphs]
    assert set(ran) == set(graphs)
    (folder,) = host.iterdir()
    assert folder.name.endswith("-Ascend910B2-cann-none-driver-24.1")
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.om" for name in graphs)
    assert result.stdout.startswith("warmed visual, prefill, decode_b1, decode_b3 in ")
    assert f": 28 B in 4 file(s), {folder}; next: qwen2vl-tc generate {artifact} " in result.stdout
    assert "warning" not in result.stderr
    assert {path: path.stat().st_mtime_ns for path in artifact.rglob("*")} == before, "the artifact stays as it is"


def test_a_cann_that_keeps_nothing_and_an_unknown_driver_are_said(
    run: Run, artifact: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_only(self: EmulatedGraph) -> None:
        self.calls.append("compile")

    monkeypatch.setattr(EmulatedGraph, "compile", compile_only)
    for module in (npu, warm):
        monkeypatch.setattr(module, "driver_version", lambda: None)
    result = run("warm", artifact)
    assert result.exit_code == 0
    assert "warning: GE left nothing in " in result.stderr
    assert "-driver-unknown when the driver is updated" in result.stderr


def test_altered_weights_are_said_here_and_not_at_the_first_request(
    run: Run, artifact: Path, host: Path, tmp_path: Path
) -> None:
    from shutil import copytree

    moved = Path(copytree(artifact, tmp_path / "moved"))
    (weights,) = (moved / "weights").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = run("warm", moved)
    assert result.exit_code == 2
    assert "altered or damaged" in result.stderr.splitlines()[-1]


def test_without_an_npu_it_refuses_by_name(run: Run, artifact: Path) -> None:
    result = run("warm", artifact)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "error: warm needs a usable NPU, and no NPU is here; run it on the NPU host\n"
