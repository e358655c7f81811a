"""The device that graphs are traced on: a real NPU where there is one, else an emulated one that runs no kernels."""

import ctypes
import difflib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ...artifacts.errors import MissingDependencyError, TargetError
from ...artifacts.host.process import emulated, npu_usable, prepare_process, release
from ...artifacts.host.vendor import vendor_import
from .cann_stubs.build import MAIN_LIBRARY, build_stubs, known_socs

INSTALL = "pip install 'qwen2vl-tc[compile]'"


@dataclass(frozen=True)
class DeviceInfo:
    """An open device. `cann_version` is None on the emulated one."""

    emulated: bool
    soc: str
    cann_version: str | None
    torch: str
    torch_npu: str


def open_device(soc: str) -> DeviceInfo:
    """Import torch, torch-npu and torchair and open NPU 0, so that tensors can be made on device "npu".

    Without a usable NPU this device is host memory: allocation, and copies of contiguous tensors, work there; every
    kernel raises RuntimeError. One process has one device: further calls return the same.

    Raises MissingDependencyError when torch, torch-npu or a C compiler is missing or the first two do not match, and
    TargetError for an unknown SoC, a SoC other than the one already open or present, and a device that does not open.
    """
    versions = _matching_versions()
    prepare_process()
    if not emulated() and not npu_usable():
        if "torch_npu" in sys.modules:
            raise TargetError(
                "torch_npu was imported before the device was opened, without an NPU; open the device first"
            )
        _preload_stubs(soc)
    actual, cann_version = _import_and_open()
    if actual != soc:
        raise TargetError(
            f"--soc {soc}: this process runs on {actual}; "
            + ("use a new process for another SoC" if emulated() else f"compile here with --soc {actual}")
        )
    return DeviceInfo(emulated(), actual, None if emulated() else cann_version, *versions)


def _matching_versions() -> tuple[str, str]:
    """Versions of torch and torch-npu, which are built for each other."""
    versions = []
    for name in ("torch", "torch-npu"):
        try:
            versions.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingDependencyError(f"{name} is not installed; {INSTALL}") from error
    torch, torch_npu = versions
    if release(torch) != release(torch_npu):
        wanted = ".".join(map(str, release(torch_npu)))
        raise MissingDependencyError(
            f"torch {torch} and torch-npu {torch_npu} do not match; pip install torch=={wanted}, or {INSTALL}"
        )
    return torch, torch_npu


def _preload_stubs(soc: str) -> None:
    """Load the stand-ins before anything asks for CANN: the loader then takes them, by SONAME, for the real ones."""
    folder = build_stubs()
    socs = known_socs(folder)
    if soc not in socs:
        near = difflib.get_close_matches(soc, socs, n=8, cutoff=0.5) or socs
        raise TargetError(f"--soc {soc}: torch-npu does not know this SoC; it knows, among others, {', '.join(near)}")
    main = _load(folder / MAIN_LIBRARY)
    for path in sorted(folder.glob("*.so")):
        _load(path)
    main.qwen2vl_tc_set_soc_name.argtypes = [ctypes.c_char_p]
    if not main.qwen2vl_tc_set_soc_name(soc.encode()):
        raise TargetError(f"--soc {soc}: the name is too long")
    # a CANN that does not load is not to be looked into: torch-npu refuses to import when its folders are incomplete
    os.environ.pop("ASCEND_HOME_PATH", None)
    # kernels queued on another thread would fail unseen, and copies return what they should have computed
    os.environ["TASK_QUEUE_ENABLE"] = "0"


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(
            f"{path}: cannot be loaded ({error}); delete the folder {path.parent} and try again"
        ) from error


def _import_and_open() -> tuple[str, str]:
    """Import the vendor packages and make the first allocation; returns the names of the SoC and of CANN's version."""
    try:
        with vendor_import():
            import torch
            import torch_npu
            import torchair  # noqa: F401  # registers the "npu" backend of torch.compile

            # the first allocation initialises the device
            torch.empty(1, device="npu")
            return str(torch_npu.npu.get_device_name(0)), str(torch_npu.npu.utils.get_cann_version())
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"torch-npu needs {error.name}, which is not installed; {INSTALL}") from error
    except Exception as error:  # torch-npu raises Exception itself when it finds CANN's folders wanting
        where = "emulated NPU" if emulated() else "NPU"
        raise TargetError(f"the {where} does not open: {error}") from error
