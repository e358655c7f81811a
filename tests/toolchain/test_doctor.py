"""doctor says what works here and what to install, whatever is missing."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from qwen2vl_tc.artifacts.errors import MissingDependencyError
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.toolchain.host import doctor
from qwen2vl_tc.toolchain.host.doctor import Ability, Diagnosis, Finding, diagnose, render


def piece(diagnosis: Diagnosis, name: str) -> Finding:
    (found,) = (finding for finding in diagnosis.findings if finding.piece == name)
    return found


def task(diagnosis: Diagnosis, name: str) -> Ability:
    (found,) = (ability for ability in diagnosis.abilities if ability.task == name)
    return found


def test_a_machine_without_npu_builds_and_verifies_and_cannot_run_on_the_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "npu_count", lambda: 0)
    diagnosis = diagnose()
    assert task(diagnosis, "convert").possible
    assert task(diagnosis, "compile --mode dynamo") == Ability("compile --mode dynamo", True, "on the emulated NPU")
    assert task(diagnosis, "verify").possible
    assert task(diagnosis, "generate --backend reference").possible
    assert "NPU" in task(diagnosis, "generate --backend npu").reason


def test_an_npu_host_compiles_and_runs_on_its_npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler" / "version.info").write_text("Version=8.5.0\nversion_dir=8.5.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "npu_count", lambda: 8)
    monkeypatch.setattr(doctor, "cann_problem", lambda: None)
    monkeypatch.setattr(doctor, "_soc_name", lambda: "Ascend910B2")
    diagnosis = diagnose()
    assert piece(diagnosis, "NPU").detail == "8 x Ascend910B2"
    assert piece(diagnosis, "CANN").detail == "8.5.0"
    assert task(diagnosis, "compile --mode dynamo").reason == "on the NPU"
    assert task(diagnosis, "generate --backend npu").possible


def test_cann_that_is_installed_and_does_not_load_is_told_apart_from_no_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    monkeypatch.setattr(doctor, "cann_problem", lambda: "libascend_hal.so: cannot open shared object file")
    found = piece(diagnose(), "CANN")
    assert found.status == "warning"
    assert "libascend_hal.so" in found.detail
    assert "source /opt/cann/set_env.sh" in found.advice


def test_with_nothing_installed_every_package_gets_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    diagnosis = diagnose()
    for name in ("torch", "torch-npu", "torch-npu's imports", "transformers", "onnx", "onnxruntime", "base packages"):
        found = piece(diagnosis, name)
        assert found.status == "missing"
        assert found.advice.startswith("pip install")
    assert not any(ability.possible for ability in diagnosis.abilities)
    assert all(ability.reason.startswith(("needs ", "not built yet")) for ability in diagnosis.abilities)


def test_versions_of_torch_and_torch_npu_that_do_not_match_stop_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.12.0", "torch-npu": "2.13.0"}
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, "1.0"))
    diagnosis = diagnose()
    assert piece(diagnosis, "torch-npu").advice == "pip install torch==2.13.0"
    assert not task(diagnosis, "compile --mode dynamo").possible


def test_without_a_compiler_only_stand_ins_that_are_built_already_let_it_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent() -> list[str]:
        raise MissingDependencyError("no compiler")

    monkeypatch.setattr(doctor, "find_compiler", absent)
    monkeypatch.setattr(doctor, "npu_count", lambda: 0)
    monkeypatch.setattr(doctor, "stubs_folder", lambda: tmp_path / "absent")
    assert not task(diagnose(), "compile --mode dynamo").possible
    monkeypatch.setattr(doctor, "stubs_folder", lambda: tmp_path)
    assert task(diagnose(), "compile --mode dynamo").possible


def test_little_memory_is_a_warning_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: 1 << 30)
    found = piece(diagnose(), "memory")
    assert (found.status, found.detail) == ("warning", "1.0 GiB available")


def test_the_diagnosis_is_plain_data_and_every_piece_is_printed() -> None:
    diagnosis = diagnose()
    assert json.loads(json.dumps(dataclasses.asdict(diagnosis)))["findings"][0]["piece"] == "Python"
    console = Console(file=io.StringIO(), width=200)
    render(diagnosis, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(finding.piece in text for finding in diagnosis.findings)
    assert all(ability.task in text for ability in diagnosis.abilities)


def test_doctor_imports_no_engine() -> None:
    script = """
import sys
from qwen2vl_tc.toolchain.host.doctor import diagnose
diagnose()
print(sorted({"torch", "torch_npu", "transformers", "onnxruntime"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_operators_of_an_artifact_are_named_and_not_taken_for_granted_without_cann(built: Path) -> None:
    found = piece(diagnose(built), "artifact: operators")
    assert found.status == "warning"
    assert found.detail == "not asked, for want of CANN: AddLayerNorm, GeluV2"


def test_an_artifact_is_ok_on_a_host_whose_cann_has_its_operators(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2vl_tc.runtime.backends import npu

    monkeypatch.setattr(doctor, "npu_usable", lambda: True)
    monkeypatch.setattr(npu, "vendor_modules", lambda: None)
    for answers, status in (({}, "ok"), ({"GeluV2": "too old"}, "missing")):
        monkeypatch.setattr(npu, "missing_operators", lambda part, answers=answers: answers)
        assert piece(diagnose(built), "artifact: operators").status == status


@pytest.mark.parametrize(
    ("version", "status", "detail"),
    [
        (
            "2.13.0",
            "warning",
            "2.13.0 is no pair read of the vendor's table, which ends at torch-npu 2.12.0 with CANN 9.1.0",
        ),
        ("2.12.0.post3", "ok", "by the vendor's table 2.12.0 goes with CANN 9.1.0"),
        ("2.9.0", "ok", "by the vendor's table 2.9.0 goes with CANN 8.5.0"),
    ],
)
def test_the_vendors_pair_and_the_rules_are_two_statements(
    monkeypatch: pytest.MonkeyPatch, version: str, status: str, detail: str
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: version)
    found = diagnose()
    assert piece(found, "CANN for torch-npu") == dataclasses.replace(
        piece(found, "CANN for torch-npu"), status=status, detail=detail
    )
    assert "rules for CANN 8.0 to 9.1" in piece(found, "CANN for the graphs").detail


@pytest.mark.parametrize(
    ("admitted", "installed", "status", "words"),
    [
        (("8.5", "9.0"), None, "ok", "these take them: 8.5, 9.0"),
        (("8.5", "9.0"), "9.0.0", "ok", "these take them: 8.5, 9.0"),
        (("8.5", "9.0"), "9.1.0", "missing", "9.1, which is here, does not"),
        (("8.5", "9.0"), "9.3.0", "warning", "9.3 is newer than the rules"),
        ((), None, "warning", "by the rules none takes them"),
        (None, None, "warning", "by the rules none takes them"),
    ],
)
def test_doctor_says_which_cann_takes_an_artifacts_graphs(
    built: Path, monkeypatch: pytest.MonkeyPatch, admitted: tuple[str, ...] | None, installed: str | None, status: str,
    words: str,
) -> None:  # fmt: skip
    manifest = read_manifest(built)
    assert manifest.ge is not None
    changed = dataclasses.replace(manifest, ge=dataclasses.replace(manifest.ge, admitted=admitted))
    monkeypatch.setattr(doctor, "read_manifest", lambda path: changed)
    monkeypatch.setattr(doctor, "cann_problem", lambda: None if installed else "none here")
    monkeypatch.setattr(doctor, "_cann_version", lambda home: installed)
    monkeypatch.setattr(doctor, "_soc_name", lambda: "Ascend910B2")
    found = piece(diagnose(built), "CANN for the graphs")
    assert found.status == status
    assert words in found.detail
    assert found.advice.startswith(f"qwen2vl-tc {'compile' if admitted is None else 'check'} ") == (not admitted)
