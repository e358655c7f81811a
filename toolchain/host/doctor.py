"""What this machine can build and run, and what to install for the rest. Imports no engine: versions are metadata."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...artifacts.cann import RELEASES, cann_release, is_newer
from ...artifacts.errors import ToolchainError
from ...artifacts.host.process import cann_problem, npu_count, npu_usable, release
from ...artifacts.store import ge_part, read_manifest
from ...exporters.torchair.cann_stubs.build import find_compiler, stubs_folder
from .memory import available_bytes

Status = Literal["ok", "missing", "warning"]

BASE = ("blake3", "jinja2", "ml-dtypes", "numpy", "pillow", "protobuf", "rich", "tokenizers", "typer")
# What torch-npu and torchair import without declaring it, by the name of the package and of the module.
TORCH_NPU_IMPORTS = {
    "attrs": "attr",
    "cloudpickle": "cloudpickle",
    "decorator": "decorator",
    "packaging": "packaging",
    "psutil": "psutil",
    "pyyaml": "yaml",
    "scipy": "scipy",
    "tornado": "tornado",
}
# torch-npu and the CANN beside it: what was read of the vendor's tables (Ascend/pytorch, release notes).
VENDOR_PAIRS = {"2.9.0": "8.5.0", "2.10.0": "9.0.0 or 9.1.0", "2.12.0": "9.1.0"}
_NEWEST_PAIR = "torch-npu 2.12.0 with CANN 9.1.0"
TRACING_MEMORY_BYTES = 2 << 30
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One piece: what was found, and what to do about it ("" when nothing needs doing)."""

    piece: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Ability:
    """One thing a user may want to do here; `reason` says how it would work or what it lacks."""

    task: str
    possible: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and what follows from them."""

    findings: tuple[Finding, ...]
    abilities: tuple[Ability, ...]


def diagnose(artifact: Path | None = None) -> Diagnosis:
    """Look at this machine, and at what an artifact asks of it. Whatever is missing or broken on the machine becomes a
    finding, never an exception; raises ArtifactError if `artifact` is not one.
    """
    findings = (
        *(_artifact(artifact) if artifact else ()),
        _python(),
        _platform(),
        _base(),
        _families(),
        _package("torch", "reference", "running graphs on the CPU, compiling and verifying need it"),
        _torch_npu(),
        _torch_npu_imports(),
        _npu(),
        _cann(),
        _pair(),
        _rules(artifact),
        _compiler(),
        _stubs(),
        _package("transformers", "compile", "verifying against the original model needs it"),
        _package("onnx", "onnx", "compiling to ONNX needs it"),
        _package("onnxruntime", "onnx", "the onnxruntime backend needs it"),
        _memory(),
        _disk(),
    )
    return Diagnosis(findings, _abilities({finding.piece: finding.status for finding in findings}))


def _artifact(path: Path) -> tuple[Finding, ...]:
    """Whether the CANN here has the operators that the artifact's graphs use and tracing could not ask for."""
    part = ge_part(read_manifest(path), path)
    limits = tuple(Finding("artifact: limit", "warning", limit) for limit in part.limits)
    names = ", ".join(sorted({note.operator for note in part.operator_notes}))
    piece = "artifact: operators"
    if not names:
        return (Finding(piece, "ok", "none that CANN must be asked for"), *limits)
    if not npu_usable():
        return (Finding(piece, "warning", f"not asked, for want of CANN: {names}", "ask on the NPU host"), *limits)
    from ...runtime.backends.npu import missing_operators, vendor_modules

    try:
        vendor_modules()
    except ToolchainError as error:
        return (Finding(piece, "warning", f"not asked: {names}", str(error)), *limits)
    if missing := missing_operators(part):
        return (Finding(piece, "missing", ", ".join(sorted(missing)), "install a newer CANN"), *limits)
    return (Finding(piece, "ok", f"this CANN has {names}"), *limits)


def _rules(path: Path | None) -> Finding:
    """What the rules say of graphs: another statement than the vendor's table of versions."""
    piece = "CANN for the graphs"
    if path is None:
        known = f"there are rules for CANN {RELEASES[0]} to {RELEASES[-1]}, of graphs and whatever torch-npu runs them"
        return Finding(piece, "ok", known, "`qwen2vl-tc check ARTIFACT` holds the graphs against them")
    admitted = ge_part(read_manifest(path), path).admitted
    if not admitted:
        again = "compile" if admitted is None else "check"
        return Finding(piece, "warning", "by the rules none takes them", f"qwen2vl-tc {again} {shlex.quote(str(path))}")
    detail = f"by the rules these take them: {', '.join(admitted)}"
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    here = cann_release(_cann_version(home) or "") if cann_problem() is None else None
    if here is None or here in admitted:
        return Finding(piece, "ok", detail)
    if is_newer(here):
        return Finding(piece, "warning", f"{detail}; {here} is newer than the rules", "nothing is known of it")
    return Finding(piece, "missing", f"{detail}; {here}, which is here, does not", f"install CANN {admitted[-1]}")


def _pair() -> Finding:
    """Which CANN the vendor pairs with the torch-npu here: another statement than what the rules say of graphs."""
    piece = "CANN for torch-npu"
    version = _version("torch-npu")
    if version is None:
        return Finding(piece, "ok", f"the vendor's table ends at {_NEWEST_PAIR}")
    number = ".".join(map(str, release(version)))
    if number in VENDOR_PAIRS:
        return Finding(piece, "ok", f"by the vendor's table {number} goes with CANN {VENDOR_PAIRS[number]}")
    detail = f"{number} is no pair read of the vendor's table, which ends at {_NEWEST_PAIR}"
    return Finding(piece, "warning", detail, "nobody vouches for a pair; take the newest CANN that takes the graphs")


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print both tables."""
    styles: dict[Status, str] = {"ok": "green", "missing": "red", "warning": "yellow"}
    pieces = Table("piece", "status", "found", "what to do", title="This machine", title_justify="left")
    for row in diagnosis.findings:
        pieces.add_row(row.piece, Text(row.status, styles[row.status]), Text(row.detail), Text(row.advice))
    tasks = Table("task", "works", "how, or what is missing", title="What works here", title_justify="left")
    for ability in diagnosis.abilities:
        works = Text("yes", "green") if ability.possible else Text("no", "red")
        tasks.add_row(Text(ability.task), works, Text(ability.reason))
    console.print(pieces)
    console.print(tasks)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    version = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", "ok", version)
    return Finding("Python", "warning", version, "torch-npu has wheels for Python 3.10 to 3.13")


def _platform() -> Finding:
    name = f"{platform.system()} {platform.machine()}"
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        return Finding("platform", "ok", name)
    return Finding("platform", "warning", name, "compiling for the NPU needs Linux on x86-64 or aarch64")


def _base() -> Finding:
    absent = [name for name in BASE if _version(name) is None]
    if absent:
        return Finding("base packages", "missing", f"missing: {', '.join(absent)}", "pip install qwen2vl-tc")
    return Finding("base packages", "ok", ", ".join(f"{name} {_version(name)}" for name in BASE))


def _families() -> Finding:
    from ...runtime.models import FAMILIES

    return Finding("models", "ok", ", ".join(f"{title} ({model_type})" for model_type, title in FAMILIES.items()))


def _package(name: str, extra: str, purpose: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", purpose, _install(extra))
    return Finding(name, "ok", version)


def _install(extra: str) -> str:
    return f"pip install 'qwen2vl-tc[{extra}]'"


def _torch_npu() -> Finding:
    torch, torch_npu = _version("torch"), _version("torch-npu")
    if torch_npu is None:
        return Finding(
            "torch-npu", "missing", "compiling GE graphs and running on the NPU need it", _install("compile")
        )
    if torch is not None and release(torch) != release(torch_npu):
        wanted = ".".join(map(str, release(torch_npu)))
        return Finding("torch-npu", "warning", f"{torch_npu}, but torch is {torch}", f"pip install torch=={wanted}")
    return Finding("torch-npu", "ok", torch_npu)


def _torch_npu_imports() -> Finding:
    absent = [name for name, module in TORCH_NPU_IMPORTS.items() if importlib.util.find_spec(module) is None]
    if absent:
        advice = _install("torch-npu-imports")
        return Finding("torch-npu's imports", "missing", f"missing: {', '.join(absent)}", advice)
    return Finding("torch-npu's imports", "ok", ", ".join(TORCH_NPU_IMPORTS))


def _npu() -> Finding:
    count = npu_count()
    if not count:
        return Finding("NPU", "missing", "no device node /dev/davinci*", "none needed for building; copy the artifact")
    return Finding("NPU", "ok", f"{count} x {_soc_name() or 'unknown SoC'}")


def _soc_name() -> str | None:
    if cann_problem() is not None:
        return None
    ask = ctypes.CDLL("libascendcl.so").aclrtGetSocName
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    return name.decode(errors="replace") if name else None


def _cann() -> Finding:
    problem = cann_problem()
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if problem is None:
        return Finding("CANN", "ok", _cann_version(home) or "found, version unknown")
    if home:
        advice = f"source {shlex.quote(str(Path(home) / 'set_env.sh'))}, and install the NPU driver"
        return Finding("CANN", "warning", f"{home} does not load: {problem}", advice)
    return Finding("CANN", "missing", problem, "none needed for building; on the NPU host install CANN")


def _cann_version(home: str | None) -> str | None:
    for name in ("compiler/version.info", "runtime/version.info", "version.cfg"):
        path = Path(home or "/usr/local/Ascend/ascend-toolkit/latest") / name
        try:
            match = re.search(r"(?im)^(?:version|\w*running_version)\s*=\s*\[?(?:[^:\]]*:)?([\w.]+)", path.read_text())
        except (OSError, UnicodeDecodeError):
            continue
        if match:
            return match[1]
    return None


def _compiler() -> Finding:
    try:
        return Finding("C compiler", "ok", shlex.join(find_compiler()))
    except ToolchainError as error:
        return Finding("C compiler", "missing", str(error), "apt install gcc")


def _stubs() -> Finding:
    try:
        folder = stubs_folder()
    except (ToolchainError, OSError) as error:
        return Finding("CANN stand-ins", "missing", str(error))
    if folder.is_dir():
        return Finding("CANN stand-ins", "ok", f"built: {folder}")
    try:
        find_compiler()
    except ToolchainError:
        return Finding("CANN stand-ins", "missing", "not built yet", "install a C compiler")
    return Finding("CANN stand-ins", "ok", "not built yet; the first compile does it")


def _memory() -> Finding:
    available = available_bytes()
    if available is None:
        return Finding("memory", "warning", "unknown on this system", "compiling takes about 1 GB")
    detail = f"{available / GIB:.1f} GiB available"
    if available < TRACING_MEMORY_BYTES:
        return Finding("memory", "warning", detail, "compiling takes about 1 GB, converting up to 2 GB")
    return Finding("memory", "ok", detail)


def _disk() -> Finding:
    try:
        free = shutil.disk_usage(Path.cwd()).free
    except OSError as error:
        return Finding("disk", "warning", f"unknown: {error}", "run from a folder that exists")
    detail = f"{free / GIB:.1f} GiB free in the current folder"
    # the smallest published model, 2B in bf16
    if free < 5 * GIB:
        return Finding("disk", "warning", detail, "an artifact takes as much as the bf16 checkpoint: 4.5 GB for 2B")
    return Finding("disk", "ok", detail)


def _abilities(status: dict[str, Status]) -> tuple[Ability, ...]:
    def ability(task: str, how: str, *needs: str) -> Ability:
        lacking = [piece for piece in needs if status[piece] != "ok"]
        return Ability(task, not lacking, f"needs {', '.join(lacking)}" if lacking else how)

    tracing = ("base packages", "platform", "torch", "torch-npu", "torch-npu's imports")
    on_device = status["NPU"] == "ok" and status["CANN"] == "ok"
    return (
        ability("convert", "on the CPU", "base packages"),
        ability("compile --mode dynamo", "on the NPU", *tracing)
        if on_device
        else ability("compile --mode dynamo", "on the emulated NPU", *tracing, "CANN stand-ins"),
        ability("compile --mode onnx", "on the CPU, from GE graphs", "base packages", "torch", "onnx"),
        ability("verify", "on the CPU, in fp32", "base packages", "torch", "transformers"),
        ability("generate --backend reference", "on the CPU", "base packages", "torch"),
        ability("generate --backend onnxruntime", "on the CPU", "base packages", "onnxruntime"),
        ability("generate --backend npu", "on the NPU", *tracing, "NPU", "CANN"),
    )
