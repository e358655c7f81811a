"""An artifact's files in the kernel's page cache: bringing them in, putting them out, and looking what is there."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_READ_BYTES = 16 << 20


def warm(files: Iterable[Path]) -> None:
    """Read every file once."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass


def drop(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the files' pages. It keeps what is not written back yet or mapped by a process."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(files: Iterable[Path]) -> float:
    """The share of the files' pages that are in memory, by mincore(2).

    The kernel answers 1 for the files of another user that this one may not write.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    here = total = 0
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                continue
            mapping = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(path))
        here += int((pages & 1).sum())
        total += len(pages)
    return here / max(total, 1)
