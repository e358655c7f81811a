"""The emulated NPU, built from the installed torch-npu wheel and used as a build uses it."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_tc.artifacts import own
from qwen2vl_tc.artifacts.errors import MissingDependencyError, TargetError
from qwen2vl_tc.exporters.torchair import device
from qwen2vl_tc.exporters.torchair.cann_stubs import build
from qwen2vl_tc.exporters.torchair.cann_stubs.build import MAIN_LIBRARY, build_stubs, cache_folder, known_socs
from qwen2vl_tc.exporters.torchair.cann_stubs.elf import read_library

USE_THE_DEVICE = """
import json, sys
from qwen2vl_tc.artifacts.errors import TargetError
from qwen2vl_tc.artifacts.host.process import emulated, npu_usable
from qwen2vl_tc.exporters.torchair.device import open_device

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

report = {"emulated before": emulated()}
info = open_device("Ascend910B3")
print("OPEN", file=sys.stderr)
report["info"] = [info.emulated, info.soc, info.cann_version]
report["emulated after"], report["usable"] = emulated(), npu_usable()
report["same again"] = open_device("Ascend910B3") == info
try:
    open_device("Ascend910B2")
except TargetError as error:
    report["other soc"] = str(error)

import torch
before = resident_mb()
huge = torch.empty(10**11, dtype=torch.bfloat16, device="npu")
report["huge"] = [huge.device.type, resident_mb() - before]
del huge

def copy_and_free(times):
    for _ in range(times):
        block = torch.ones(5 * 2**20).npu()
        del block
        torch.npu.empty_cache()

copy_and_free(2)  # the first copies load code and start threads
before = resident_mb()
copy_and_free(40)
report["kept after freeing 800 MB"] = resident_mb() - before

x = torch.randn(257, 33)
report["round trip"] = torch.equal(x.npu().cpu(), x)
report["refused"] = []
for kernel in (
    lambda: torch.zeros(3, device="npu"),
    lambda: x.npu() + 1,
    lambda: x.npu().t().cpu(),
    lambda: x.npu()[:, :2].cpu(),
    lambda: x.npu().to(torch.float16),
):
    try:
        kernel()
        report["refused"].append(None)
    except RuntimeError as error:
        report["refused"].append("emulated NPU" in str(error) and "Compute on the CPU" in str(error))
print(json.dumps(report))
"""


def clean_environment(cache: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(cache), "XDG_CACHE_HOME": str(cache)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def used(cache: Path) -> tuple[dict[str, Any], str]:
    """What a fresh process with no variable set reports of the device, and its stderr."""
    command = [sys.executable, "-c", USE_THE_DEVICE]
    done = subprocess.run(command, env=clean_environment(cache), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # the report is all of stdout: a command's --json must stay readable
    return json.loads(done.stdout), done.stderr


def test_a_fresh_process_opens_the_emulated_npu(used: tuple[dict[str, Any], str]) -> None:
    report, _ = used
    assert report["info"] == [True, "Ascend910B3", None]
    assert report["same again"]


def test_opening_prints_nothing(used: tuple[dict[str, Any], str]) -> None:
    assert used[1].startswith("OPEN\n")


def test_the_emulated_npu_is_never_taken_for_a_real_one(used: tuple[dict[str, Any], str]) -> None:
    report, _ = used
    assert (report["emulated before"], report["emulated after"], report["usable"]) == (False, True, False)


def test_a_tensor_of_200_gb_takes_no_memory(used: tuple[dict[str, Any], str]) -> None:
    kind, megabytes = used[0]["huge"]
    assert kind == "npu"
    assert megabytes < 8


def test_freed_memory_goes_back_to_the_system(used: tuple[dict[str, Any], str]) -> None:
    # libraries loaded meanwhile count, too; a leak would keep all 800
    assert used[0]["kept after freeing 800 MB"] < 400


def test_contiguous_tensors_survive_the_round_trip(used: tuple[dict[str, Any], str]) -> None:
    assert used[0]["round trip"]


def test_every_kernel_is_refused_by_name_rather_than_computed_wrongly(used: tuple[dict[str, Any], str]) -> None:
    assert used[0]["refused"] == [True] * 5


def test_a_second_soc_in_one_process_is_refused(used: tuple[dict[str, Any], str]) -> None:
    assert "Ascend910B2" in used[0]["other soc"]
    assert "new process" in used[0]["other soc"]


def test_an_unknown_soc_is_refused_with_those_that_are_known() -> None:
    script = "from qwen2vl_tc.exporters.torchair.device import open_device; open_device('Ascend910B22')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "TargetError: --soc Ascend910B22" in done.stderr
    assert "Ascend910B2," in done.stderr


def test_a_cann_that_is_installed_in_part_does_not_hinder(tmp_path: Path) -> None:
    script = "from qwen2vl_tc.exporters.torchair.device import open_device; print(open_device('Ascend910B2').emulated)"
    environment = {**os.environ, "ASCEND_HOME_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_two_processes_that_build_at_once_share_one_whole_result(tmp_path: Path) -> None:
    script = "from qwen2vl_tc.exporters.torchair.cann_stubs.build import build_stubs; print(build_stubs())"
    command = [sys.executable, "-c", script]
    environment = clean_environment(tmp_path)
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    (folder,) = map(Path, printed)
    assert list(folder.parent.iterdir()) == [folder], "nothing half-made is left behind"
    assert len(list(folder.glob("*.so"))) == 8
    assert "Ascend910B2" in known_socs(folder)


def test_what_is_built_once_is_used_again(cache: Path, used: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert (build_stubs() / MAIN_LIBRARY).is_file()


def test_each_library_answers_to_its_name_and_leads_to_the_one_with_the_functions(cache: Path, used: object) -> None:
    (folder,) = (cache / "qwen2vl-tc" / "cann-stubs").iterdir()
    main = read_library(folder / MAIN_LIBRARY)
    assert {"aclrtMalloc", "aclInit", "qwen2vl_tc_emulated_npu"} <= main.defined
    # a stand-in for any of these would be taken by the whole process
    assert not {"malloc", "pthread_create", "PyErr_Clear", "_Znwm"} & main.defined
    others = [read_library(path) for path in folder.glob("*.so") if path.name != MAIN_LIBRARY]
    assert all(MAIN_LIBRARY in library.needed for library in others)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return monkeypatch


def test_without_a_compiler_the_error_says_what_to_install(empty_cache: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty_cache.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"C compiler .*install one"):
        build_stubs()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(empty_cache: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no headers here >&2\nexit 1\n")
    broken.chmod(0o755)
    empty_cache.setenv("CC", str(broken))
    with pytest.raises(MissingDependencyError, match="no headers here"):
        build_stubs()
    assert not list(cache_folder().iterdir())


def test_a_cc_that_does_not_exist_is_named(empty_cache: pytest.MonkeyPatch) -> None:
    empty_cache.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(MissingDependencyError, match="no-such-compiler"):
        build_stubs()


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(
    empty_cache: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    empty_cache.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TargetError, match="XDG_CACHE_HOME"):
        build_stubs()


def test_another_system_than_linux_is_refused(empty_cache: pytest.MonkeyPatch) -> None:
    empty_cache.setattr(sys, "platform", "darwin")
    with pytest.raises(TargetError, match="Linux"):
        build_stubs()


def test_without_torch_npu_the_error_says_what_to_install(empty_cache: pytest.MonkeyPatch) -> None:
    empty_cache.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"qwen2vl-tc\[compile\]"):
        build_stubs()


def test_torch_and_torch_npu_of_different_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.12.1+cpu", "torch-npu": "2.13.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(MissingDependencyError, match=r"torch==2\.13\.0"):
        device.open_device("Ascend910B2")


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0", (2, 13, 0)), ("2.13.0+cpu", (2, 13, 0)), ("2.13.0.post1", (2, 13, 0))]
)
def test_local_and_post_releases_match_their_release(version: str, numbers: tuple[int, ...]) -> None:
    assert device.release(version) == numbers


@pytest.mark.parametrize("cut", [0, 4, 40, 2000])
def test_a_damaged_library_is_one_clear_error(tmp_path: Path, cut: int) -> None:
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None and spec.origin is not None
    whole = (Path(spec.origin).parent / "lib" / "libnpu_profiler.so").read_bytes()
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(whole[:cut])
    with pytest.raises(TargetError, match=r"damaged\.so.*reinstall"):
        read_library(damaged)


@pytest.mark.parametrize("how", ["others may write into it", "another user's", "a link", "a link in it"])
def test_libraries_that_another_user_could_have_put_there_are_not_loaded(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = build.stubs_folder()
    folder.parent.mkdir(parents=True)
    (tmp_path / "made").mkdir(mode=0o700)
    if how == "a link":
        folder.symlink_to(tmp_path / "made")
    else:
        (tmp_path / "made").rename(folder)
    if how == "others may write into it":
        folder.chmod(0o777)
    if how == "another user's":
        owner = folder.stat().st_uid
        monkeypatch.setattr(own, "trusted_users", lambda: {owner + 1})
    if how == "a link in it":
        (folder / MAIN_LIBRARY).symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(TargetError, match="others could have put it there; delete it"):
        build.build_stubs()
