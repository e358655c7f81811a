"""Preparing the process before torch is imported: torch-npu may be installed where neither CANN nor an NPU is.

torch imports every installed device backend by itself; torch-npu then misses CANN's libraries and `import torch` fails.
Whoever imports torch on our behalf calls `prepare_process()` first: `main()`, `load()` and the tests' conftest.
"""

import ctypes
import importlib.util
import os
import re
import sys
from pathlib import Path

from ..errors import TargetError

AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# The two libraries of CANN that `import torch_npu` needs first.
CANN_LIBRARIES = ("libascendcl.so", "libhccl.so")
# Exported by our stand-ins for CANN and by nothing else.
STUB_MARKER = "qwen2vl_tc_emulated_npu"


def prepare_process() -> None:
    """Keep `import torch` working where torch-npu is installed without a usable NPU.

    Sets TORCH_DEVICE_BACKEND_AUTOLOAD=0 for this process and its children. Does nothing where the NPU is usable, where
    torch-npu is absent, and once torch is imported: then it either worked or has already failed.
    """
    if "torch" in sys.modules or importlib.util.find_spec("torch_npu") is None or npu_usable():
        return
    os.environ[AUTOLOAD_VARIABLE] = "0"


def npu_usable() -> bool:
    """Whether a real NPU can be opened here: its device nodes exist and CANN loads. Our stubs never count."""
    return npu_problem() is None


def npu_problem() -> str | None:
    """Why no NPU can be used here; None where one can."""
    if not npu_count():
        return "no NPU is here"
    problem = cann_problem()
    return None if problem is None else f"an NPU is here, but CANN does not load ({problem})"


def npu_count(devices: Path = Path("/dev")) -> int:
    """NPUs that the driver shows, whether or not CANN is installed."""
    return sum(node.name.removeprefix("davinci").isdigit() for node in devices.glob("davinci*"))


def cann_problem() -> str | None:
    """Why CANN cannot be loaded, in the loader's words; None when it can."""
    if sys.platform != "linux":
        return f"CANN exists for Linux only, this is {sys.platform}"
    for name in CANN_LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            return str(error)
        # the loader matches by SONAME: once loaded, our stand-in answers to this name
        if hasattr(library, STUB_MARKER):
            return f"{name} is the emulated one"
    return None


def driver_version(root: Path = Path("/")) -> str | None:
    """The NPU driver's version, as its installer records it; None where that cannot be read.

    /etc/ascend_install.info says where the driver is (Driver_Install_Path_Param, /usr/local/Ascend by default), and
    driver/version.info there says Version=... Containers for Ascend have both files mounted.
    """
    where = _recorded(root / "etc/ascend_install.info", "Driver_Install_Path_Param", r"/\S+") or "/usr/local/Ascend"
    return _recorded(root / where.lstrip("/") / "driver/version.info", "Version", r"[\w.+-]+")


def _recorded(file: Path, key: str, value: str) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(rf"(?m)^{key}=({value})\s*$", text)
    return match[1] if match else None


def emulated() -> bool:
    """Whether this process has loaded our stand-ins for CANN: its "npu" device then is host memory without kernels."""
    return hasattr(ctypes.CDLL(None), STUB_MARKER)


def current_folder() -> Path:
    """Where relative paths begin. Raises TargetError where that folder is deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise TargetError(
            "the current folder is deleted; `cd .` goes to the one that took its place, if one did, as when an "
            "artifact was written into it; otherwise cd to another"
        ) from error


def cache_home() -> Path:
    """Our folder in the user's cache. Raises TargetError when there is no home folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification: a relative path is invalid and to be ignored
    if not os.path.isabs(base):
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise TargetError("no home folder to keep compiled files in; set XDG_CACHE_HOME to a folder") from error
    return Path(base) / "qwen2vl-tc"


def release(version: str) -> tuple[int, ...]:
    """The release numbers that torch and torch-npu have in common: 2.13.0 of "2.13.0+cpu" and of "2.13.0.post1"."""
    numbers = version.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in number if c.isdigit()) or 0) for number in numbers)
