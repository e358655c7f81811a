"""`build` makes a verified artifact in one step, or leaves the old one as it was."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from qwen2vl_tc.artifacts.errors import TargetError
from qwen2vl_tc.artifacts.manifest import GePart, Manifest
from qwen2vl_tc.artifacts.schema import from_plain
from qwen2vl_tc.artifacts.staging import Staging
from qwen2vl_tc.artifacts.store import open_artifact, read_manifest
from qwen2vl_tc.toolchain.build import build as build_module
from qwen2vl_tc.toolchain.verify import verify
from qwen2vl_tc.toolchain.verify.report import VerifyReport

from .conftest import TINY, Run

Stage = Callable[..., Manifest]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def graphs_of_built(built: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Takes the graphs of `built` instead of tracing the same ones again."""
    part = read_manifest(built).ge
    assert part is not None
    kept: GePart = part

    def stage_graphs(staging: Staging, manifest: Manifest, options: Any, progress: Any) -> Manifest:
        for entry in kept.files():
            staging.add(entry.path, (built / entry.path).read_bytes())
        return dataclasses.replace(manifest, ge=kept)

    monkeypatch.setattr(build_module, "stage_graphs", stage_graphs)
    return stage_graphs


def test_build_converts_compiles_and_verifies(built: Path, build_result: Result) -> None:
    with open_artifact(built) as artifact:
        artifact.check_all()
        manifest = artifact.manifest
    assert manifest.name == "tiny"
    assert manifest.weights is not None and manifest.weights.dtype == "fp32"
    assert manifest.ge is not None and [graph.name for graph in manifest.ge.graphs] == [
        *("visual", "prefill", "decode_b1", "decode_b2")
    ]
    assert manifest.verification == "passed"
    assert json.loads((built / "reports/verify.json").read_text())["passed"] is True
    hidden = [path.name for path in built.parent.iterdir() if path.name.startswith(".")]
    assert hidden == [], "neither a staged tree nor a lock stays"


def test_build_says_what_it_measured_wrote_and_what_is_next(built: Path, build_result: Result) -> None:
    lines = build_result.stdout.splitlines()
    assert any("decode_b2" in line for line in lines)
    assert "GeluV2" in build_result.stdout, "the operator to check on the device"
    assert any("transformers" in line for line in lines)
    assert lines[-1].startswith(f"wrote {built}: ")
    assert "verification: passed; next: qwen2vl-tc generate" in lines[-1]
    phases = [line.partition(":")[0] for line in build_result.stderr.splitlines()]
    assert list(dict.fromkeys(phases)) == ["prepare", "convert", "compile", "verify", "warning"]


def test_no_verify_is_recorded(checkpoint: Path, graphs_of_built: Stage, run: Run, tmp_path: Path) -> None:
    result = run("build", "--src", checkpoint, "--out", tmp_path / "a", "--no-verify", "--no-sync")
    assert result.exit_code == 0
    assert read_manifest(tmp_path / "a").verification == "skipped"
    assert "verification: skipped" in result.stdout


def test_an_artifact_that_fails_verification_is_not_written_and_the_old_one_stays(
    built: Path,
    checkpoint: Path,
    graphs_of_built: Stage,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = from_plain(VerifyReport, json.loads((built / "reports/verify.json").read_text()), "report")
    failed = dataclasses.replace(passed, passed=False)
    monkeypatch.setattr(verify, "verify", lambda artifact, against, progress: failed)
    shutil.copytree(built, tmp_path / "old")
    before = files(tmp_path / "old")
    for out in (tmp_path / "old", tmp_path / "new"):
        result = run("build", "--src", checkpoint, "--out", out, "--no-sync")
        assert result.exit_code == 1
        assert "FAILED" in result.stdout
        assert result.stderr.splitlines()[-1] == f"error: verification failed: {out} was not written"
    assert files(tmp_path / "old") == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_build_that_is_stopped_leaves_the_old_artifact_and_resumes(
    built: Path,
    checkpoint: Path,
    graphs_of_built: Stage,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "artifact"
    shutil.copytree(built, out)
    before = files(out)

    def stop(*arguments: Any) -> Manifest:
        raise KeyboardInterrupt

    words = ("build", "--src", checkpoint, "--out", out, "--no-verify", "--no-sync")
    with monkeypatch.context() as patched:
        patched.setattr(build_module, "stage_graphs", stop)
        stopped = run(*words)
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines()[-1] == "interrupted"
    assert files(out) == before
    resumed = run(*words)
    assert resumed.exit_code == 0
    assert "of it there already" in resumed.stderr
    now = files(out)
    assert {name for name in now if now[name] != before.get(name)} == {"manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_what_cannot_be_compiled_is_refused_before_anything_is_written(
    checkpoint: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*arguments: Any) -> None:
        raise AssertionError("the conversion began")

    monkeypatch.setattr(build_module, "convert_planned", written)
    words = ("build", "--src", checkpoint, "--out", tmp_path / "a")
    assert "--soc Ascend1" in run(*words, "--soc", "Ascend1").stderr
    limit = TINY["max_position_embeddings"]
    assert f"expected 2 to {limit}" in run(*words, "--max-length", str(limit + 1)).stderr
    monkeypatch.setattr(build_module.importlib.util, "find_spec", lambda name: None)
    result = run(*words)
    assert result.exit_code == 2
    assert "pip install 'qwen2vl-tc[compile]', or build with --no-verify" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_compiling_leaves_the_old_artifact(
    built: Path, checkpoint: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Manifest:
        raise TargetError("torchair cannot trace the visual graph")

    monkeypatch.setattr(build_module, "stage_graphs", refuse)
    shutil.copytree(built, tmp_path / "artifact")
    before = files(tmp_path / "artifact")
    result = run("build", "--src", checkpoint, "--out", tmp_path / "artifact", "--no-verify", "--no-sync")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: torchair cannot trace the visual graph"
    assert files(tmp_path / "artifact") == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo terminals")
def test_a_terminal_gets_a_bar_with_bytes_and_rate(checkpoint: Path, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    script = Path(sys.executable).parent / "qwen2vl-tc"
    words = [script, "convert", "--src", checkpoint, "--out", tmp_path / "a", "--no-sync"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=follower, env=environment, text=True, check=True)
    os.set_blocking(leader, False)
    parts = []
    # a read gives no more than one buffer of the terminal's
    with contextlib.suppress(BlockingIOError):
        while part := os.read(leader, 1 << 16):
            parts.append(part)
    os.close(follower)
    os.close(leader)
    shown = b"".join(parts).decode()
    assert "━" in shown
    assert "kB" in shown and "/s" in shown
    assert done.stdout.startswith("wrote ")
