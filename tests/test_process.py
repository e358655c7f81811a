"""torch-npu is installed, CANN is not: torch and transformers import all the same, with no variable set by the user."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl_tc.artifacts.host import process
from qwen2vl_tc.artifacts.host.process import AUTOLOAD_VARIABLE, driver_version, npu_count, prepare_process


def run(script: str) -> str:
    """Run in a fresh process in which no variable of torch's is set; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != AUTOLOAD_VARIABLE}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_imports_in_a_prepared_process() -> None:
    assert (
        run("""
from qwen2vl_tc.artifacts.host.process import prepare_process
prepare_process()
import torch
print(torch.ones(2).sum().item())
""")
        == "2.0"
    )


def test_child_processes_are_prepared_too() -> None:
    assert (
        run("""
import subprocess, sys
from qwen2vl_tc.artifacts.host.process import prepare_process
prepare_process()
print(subprocess.run([sys.executable, "-c", "import torch"]).returncode)
""")
        == "0"
    )


def test_transformers_runs_its_cpu_code_even_beside_the_emulated_npu() -> None:
    assert run("""
from qwen2vl_tc.exporters.torchair.device import open_device
from qwen2vl_tc.toolchain.verify.transformers_import import import_transformers
open_device("Ascend910B2")
transformers = import_transformers()
transformers.Qwen2VLForConditionalGeneration
from transformers.integrations import sdpa_attention
from transformers.utils import is_torch_npu_available
print(is_torch_npu_available(), is_torch_npu_available(check_device=True), sdpa_attention._is_torch_npu_available)
import sys, torch_npu
print(sys.modules["torch_npu"] is torch_npu)
""").split() == ["False", "False", "False", "True"]


def test_importing_transformers_does_not_import_torch_npu() -> None:
    assert (
        run("""
import sys
from qwen2vl_tc.toolchain.verify.transformers_import import import_transformers
import_transformers().Qwen2VLForConditionalGeneration
print("torch_npu" in sys.modules)
""")
        == "False"
    )


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process as it was before torch was imported, on a machine with torch-npu."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv(AUTOLOAD_VARIABLE, raising=False)
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(process, "npu_usable", lambda: False)
    return monkeypatch


def test_autoload_is_switched_off_without_a_usable_npu_even_if_the_user_asked_for_it(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(AUTOLOAD_VARIABLE, "1")
    prepare_process()
    assert os.environ[AUTOLOAD_VARIABLE] == "0"


def test_a_host_with_a_usable_npu_is_left_alone(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(process, "npu_usable", lambda: True)
    prepare_process()
    assert AUTOLOAD_VARIABLE not in os.environ


def test_a_machine_without_torch_npu_is_left_alone(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(importlib.util, "find_spec", lambda name: None)
    prepare_process()
    assert AUTOLOAD_VARIABLE not in os.environ


def test_preparing_after_torch_is_imported_changes_nothing(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "torch", sys)
    prepare_process()
    assert AUTOLOAD_VARIABLE not in os.environ


def test_npus_are_counted_by_their_own_nodes_and_not_by_the_managers(tmp_path: Path) -> None:
    for node in ("davinci0", "davinci1", "davinci12", "davinci_manager", "davinci_manager_docker", "null"):
        (tmp_path / node).touch()
    assert npu_count(tmp_path) == 3


INSTALL_INFO = "UserName=HwHiAiUser\nDriver_Install_Path_Param={}\nDriver_Install_Mode=all\n"
VERSION_INFO = "Version=24.1.rc2\nascendhal_version=7.35.19\npackage_version=24.1.rc2\nInnerversion=V100R001C18\n"


@pytest.mark.parametrize(
    ("recorded", "folder", "content", "found"),
    [
        (None, "usr/local/Ascend", VERSION_INFO, "24.1.rc2"),
        ("/opt/ascend", "opt/ascend", VERSION_INFO, "24.1.rc2"),
        ("/opt/ascend", "usr/local/Ascend", VERSION_INFO, None),
        (None, "usr/local/Ascend", "package_version=24.1.rc2\n", None),
        # it becomes part of a folder's name
        (None, "usr/local/Ascend", "Version=../../24\n", None),
        (None, "elsewhere", "", None),
    ],
)
def test_the_driver_s_version_is_read_where_its_installer_recorded_it(
    tmp_path: Path, recorded: str | None, folder: str, content: str, found: str | None
) -> None:
    if recorded is not None:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/ascend_install.info").write_text(INSTALL_INFO.format(recorded))
    (tmp_path / folder / "driver").mkdir(parents=True)
    (tmp_path / folder / "driver/version.info").write_text(content)
    assert driver_version(tmp_path) == found


def test_an_interrupt_that_a_finaliser_swallows_still_ends_the_work() -> None:
    code = """
import os, signal
from qwen2vl_tc.artifacts.host.vendor import no_lost_interrupt

class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two of these, and Python drops what it raises here
            pass

before = signal.getsignal(signal.SIGINT)
try:
    with no_lost_interrupt():
        Finalised()
        print("went on")
except KeyboardInterrupt:
    print("interrupted")
print(signal.getsignal(signal.SIGINT) is before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n") == ["went on", "interrupted", "True", ""]
