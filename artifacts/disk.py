"""What a build asks of the file system: room, bytes that are really on the disk, two folders swapped in one step."""

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

from .errors import TargetError

_SPARE_BYTES = 64 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def require_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raise TargetError unless the file system of `folder` has `needed` bytes free, and a little more."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise TargetError(
            f"{folder}: {purpose} needs {(needed + _SPARE_BYTES) / 1e9:.2f} GB free, got {free / 1e9:.2f} GB; "
            "free some space or choose another --out"
        )


def sync_path(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically. False where the kernel, the file system or the C library cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
