"""Build the stand-ins for CANN's libraries from the installed torch-npu, once a version, into the user's cache folder.

Which libraries and symbols are wanted is read from the wheel itself, so that another version or architecture needs no
change here. `stubs.c` does what must work; everything else returns 0.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from ....artifacts.errors import MissingDependencyError, TargetError
from ....artifacts.host.process import cache_home
from ....artifacts.own import check_own, open_own, own_cache, own_folder
from .elf import SharedLibrary, read_library

HERE = Path(__file__).parent
# Holds every function; the other libraries only answer to their names and point here.
MAIN_LIBRARY = "libascendcl.so"
SOC_LIST = "socs.txt"
# torch-npu looks these up by name when it needs them, so that it can work with an older CANN.
_LOOKED_UP = re.compile(rb"(?:aclrt|aclInit|aclFinalize|aclprof|aclmdl|aclop|acltdt|aclGet|aclSet|Hccl)[A-Za-z0-9]*")
_SOC_NAME = re.compile(rb"Ascend\d{3}[A-Za-z0-9_-]*")
_MENTIONED = re.compile(_LOOKED_UP.pattern + rb"|" + _SOC_NAME.pattern)
# Every library of the system carries its ABI's number (libc.so.6), none of CANN's does.
_CANN_SONAME = re.compile(r"lib\w+\.so")
_SYSTEM_SONAME = re.compile(r"\.so\.\d+$")
_C_NAME = re.compile(r"[A-Za-z_]\w*")
_DEFINED_IN_C = re.compile(r"^(?:const char \*|int |size_t )(\w+)\(", re.MULTILINE)
# What is in the folder runs in this process.
_OTHERS_MAY_NOT = stat.S_IWGRP | stat.S_IWOTH
# Operators of Ascend Transformer Boost, a library of its own that is loaded on request only.
_OPTIONAL_LIBRARY = "libop_plugin_atb.so"


def build_stubs() -> Path:
    """The folder with the libraries, built first if the cache does not have it; safe when two processes build at once.

    Raises MissingDependencyError without torch-npu or a C compiler, TargetError on another system than Linux or when
    the cache folder cannot be written.
    """
    if sys.platform != "linux":
        raise TargetError(f"compiling for the NPU works on Linux (x86-64, aarch64) only, this is {sys.platform}")
    site = _site_packages()
    folder = stubs_folder()
    own_cache(folder.parent.name)
    if own_folder(folder, _OTHERS_MAY_NOT):
        _check_files(folder)
        return folder
    compiler = find_compiler()
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise TargetError(
            f"{folder.parent}: cannot write ({error}); set XDG_CACHE_HOME to a writable folder"
        ) from error
    try:
        _compile_into(work, site, compiler)
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _check_files(folder)
    return folder


def _check_files(folder: Path) -> None:
    """What is in there runs in this process: only this user, or root, may have put it there, or could."""
    folder_fd = open_own(folder, _OTHERS_MAY_NOT)
    try:
        for name in os.listdir(folder_fd):
            status = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
            check_own(status, folder / name, stat.S_IFREG)
    finally:
        os.close(folder_fd)


def stubs_folder() -> Path:
    """Where the libraries for the installed torch-npu are or will be: named by a hash of all they depend on.

    Raises MissingDependencyError without torch and torch-npu, TargetError without a home folder.
    """
    site = _site_packages()
    libraries = _wheel_libraries(site)
    try:
        version, torch = importlib.metadata.version("torch-npu"), importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(f"{error.name} is not installed; pip install 'qwen2vl-tc[compile]'") from error
    parts = [platform.machine(), version, torch]
    # names and sizes stand for the symbols in them: reading those takes seconds, and this runs at every start
    parts += [f"{path.relative_to(site)} {path.stat().st_size}" for path in libraries]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in ("stubs.c", "build.py", "elf.py"):
        digest.update((HERE / source).read_bytes())
    return cache_folder() / f"{version}-{platform.machine()}-{digest.hexdigest()[:16]}"


def known_socs(folder: Path) -> list[str]:
    """SoC names that the torch-npu for which `folder` was built knows."""
    return (folder / SOC_LIST).read_text(encoding="ascii").split()


def cache_folder() -> Path:
    """Where the stubs of all versions live. Raises TargetError when there is no home folder."""
    return cache_home() / "cann-stubs"


def find_compiler() -> list[str]:
    """The C compiler's command: $CC, else cc, gcc or clang. Raises MissingDependencyError when there is none."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen and not shutil.which(chosen[0]):
        raise MissingDependencyError(f"CC={os.environ['CC']}: no such compiler; unset CC or install it")
    for command in [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise MissingDependencyError(
        "compiling without CANN needs a C compiler (cc, gcc or clang); install one, such as with `apt install gcc`"
    )


def _site_packages() -> Path:
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("torch-npu is not installed; pip install 'qwen2vl-tc[compile]'")
    return Path(spec.origin).parents[1]


def _wheel_libraries(site: Path) -> list[Path]:
    libraries = sorted(p for p in (site / "torch_npu").rglob("*.so") if p.name != _OPTIONAL_LIBRARY)
    if not libraries:
        raise MissingDependencyError(f"{site / 'torch_npu'}: no libraries in it; reinstall torch-npu")
    return libraries


def _compile_into(work: Path, site: Path, compiler: list[str]) -> None:
    ours = {path.name: read_library(path, _MENTIONED) for path in _wheel_libraries(site)}
    torch_paths = [p for folder in ("torch/lib", "torch.libs", "torch_npu.libs") for p in (site / folder).glob("*.so*")]
    torch = {path.name: read_library(path) for path in torch_paths}
    stubs = (HERE / "stubs.c").read_text(encoding="utf-8")
    rest = sorted(stub_symbols(ours, torch) - set(_DEFINED_IN_C.findall(stubs)))
    source, shell = work / "cann.c", work / "shell.c"
    source.write_text(stubs + "".join(f"int64_t {name}(void) {{ return 0; }}\n" for name in rest), encoding="utf-8")
    shell.write_text("extern const int qwen2vl_tc_emulated_npu;\n", encoding="utf-8")
    _compile(compiler, source, work / MAIN_LIBRARY, [])
    # linked to the main library: a symbol looked up in any of them is found there
    link = ["-Wl,--no-as-needed", f"-L{work}", f"-l:{MAIN_LIBRARY}"]
    for name in sorted(cann_sonames(ours, torch) - {MAIN_LIBRARY}):
        _compile(compiler, shell, work / name, link)
    mentioned = set().union(*(library.mentioned for library in ours.values()))
    socs = sorted(name for name in mentioned if _SOC_NAME.fullmatch(name.encode()))
    (work / SOC_LIST).write_text("\n".join(socs) + "\n", encoding="ascii")


def stub_symbols(ours: dict[str, SharedLibrary], torch: dict[str, SharedLibrary]) -> set[str]:
    """Every function that torch-npu's libraries want and only CANN has, by symbol table or by name at run time."""
    wanted = set().union(*(library.wanted for library in ours.values()))
    supplied = set().union(*(library.defined for library in (*ours.values(), *torch.values())))
    looked_up = {name for library in ours.values() for name in library.mentioned if _LOOKED_UP.fullmatch(name.encode())}
    candidates = {name for name in (wanted - supplied) | looked_up if _C_NAME.fullmatch(name)}
    needed = {name for library in ours.values() for name in library.needed}
    system = [_open(name) for name in sorted(needed) if _SYSTEM_SONAME.search(name)]
    return {
        name
        for name in candidates
        # a stand-in for a function of the system or of Python would be taken by the whole process
        if not name.startswith(("Py", "_Py")) and not any(hasattr(library, name) for library in system)
    }


def _open(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None  # torch itself could not be imported then, and will say so better


def cann_sonames(ours: dict[str, SharedLibrary], torch: dict[str, SharedLibrary]) -> set[str]:
    """The libraries that torch-npu's are linked to and neither it, torch nor the system brings along."""
    needed = {name for library in ours.values() for name in library.needed}
    return {name for name in needed - ours.keys() - torch.keys() if _CANN_SONAME.fullmatch(name)}


def _compile(compiler: list[str], source: Path, library: Path, extra: list[str]) -> None:
    # -w: emulated functions ignore most of their parameters
    flags = ["-shared", "-fPIC", "-O1", "-w", "-pthread", f"-Wl,-soname,{library.name}"]
    command = [*compiler, *flags, "-o", str(library), str(source), *extra]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise MissingDependencyError(f"cannot run the C compiler {compiler[0]}: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = "\n".join(str(error.stderr).splitlines()[:10])
        raise MissingDependencyError(
            f"{shlex.join(compiler)} cannot build {library.name}; install a working C compiler with its libc headers, "
            f"or name one in CC:\n{lines}"
        ) from error


def _publish(work: Path, folder: Path) -> None:
    try:
        work.rename(folder)
    except OSError:
        # another process was faster; what it built is the same
        if not folder.is_dir():
            raise
