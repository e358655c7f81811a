"""Files that are opened once, by a path that cannot escape, and checked against their size and hash before use."""

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from blake3 import blake3

from .errors import ArtifactError, TargetError
from .manifest import FileEntry

Buffer = bytes | bytearray | memoryview | mmap.mmap
# below this, starting threads costs more than they save
_PARALLEL_BYTES = 1 << 20
_CHUNK_BYTES = 32 << 20
_READ_BYTES = 4 << 20
# The largest file that is read and not mapped is tokenizer.json, 7 MB; what is parsed grows to 20 or 40 times its size.
_MAX_READ_BYTES = 16 << 20
# Hashing goes on beside imports and prefill and leaves them half of the cores; more than 16 only wait for memory.
_most_threads = max(min((os.cpu_count() or 1) // 2, 16), 1)


def hash_without_threads() -> None:
    """From now on. blake3's pool does not survive a fork: a child would wait for it for ever; where the pool cannot be
    made, blake3 panics."""
    global _most_threads
    _most_threads = 1


os.register_at_fork(after_in_child=hash_without_threads)


def _hash_all(pieces: Callable[[], Iterable[Buffer]], threads: int) -> str:
    try:
        hasher = blake3(max_threads=threads)
        for piece in pieces():
            hasher.update(piece)
    except BaseException as error:
        # what Rust panics with is no Exception; its class has no name to import
        if type(error).__name__ != "PanicException":
            raise
        if threads == 1:
            raise TargetError(f"hashing failed, blake3 panicked: {error}; is it installed rightly?") from error
        hash_without_threads()
        return _hash_all(pieces, 1)
    return hasher.hexdigest()


def hash_bytes(data: Buffer) -> str:
    """The blake3 hash of a buffer as 64 hex digits."""
    with memoryview(data) as view:
        size = view.nbytes

        def pieces() -> Iterator[memoryview]:
            for begin in range(0, size, _CHUNK_BYTES):
                with view[begin : begin + _CHUNK_BYTES] as piece:
                    yield piece

        return _hash_all(pieces, _most_threads if size > _PARALLEL_BYTES else 1)


def check_relative(path: str, where: str) -> tuple[str, ...]:
    """The parts of a path that stays inside its folder.

    Raises ArtifactError for an absolute path, `..`, `.`, an empty part, a backslash and a NUL.
    """
    parts = tuple(path.split("/"))
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ArtifactError(
            f"{where}: file path {path!r} is not a plain relative path; the artifact is damaged or hostile: rebuild it"
        )
    return parts


def open_inside(folder_fd: int, path: str, where: str) -> int:
    """Open a regular file for reading below an open folder, following no symbolic link. Returns a file descriptor.

    Raises ArtifactError naming `where` and the path; a missing file is an ArtifactError caused by FileNotFoundError.
    """
    parts = check_relative(path, where)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    current = os.dup(folder_fd)
    try:
        for part in parts[:-1]:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=current)
            os.close(current)
            current = inner
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        fd = os.open(parts[-1], flags | os.O_NONBLOCK, dir_fd=current)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{where}: {path} is missing; the artifact is incomplete: copy or build it again"
        ) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ArtifactError(
                f"{where}: {path} is, or lies below, a symbolic link or a file; an artifact holds only plain files: "
                "copy it with links resolved (`cp -rL`) or rebuild it"
            ) from error
        raise ArtifactError(f"{where}: cannot open {path}: {error.strerror}") from error
    finally:
        os.close(current)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ArtifactError(f"{where}: {path} is not a regular file; rebuild the artifact")
    return fd


def is_same_file(fd: int, path: Path) -> bool:
    """Whether `path` leads to the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


class OpenedFile:
    """One file of an artifact, opened once; its size is checked here, its hash before the bytes are used.

    `read()` checks and returns the bytes. `map()` returns the mapping at once and `check()` hashes that same mapping,
    now or in another thread. A file that something overwrites in place after the check is not covered: builds never do,
    they replace whole files.
    """

    def __init__(self, folder_fd: int, entry: FileEntry, where: str) -> None:
        self.entry = entry
        self._where = where
        self._map: mmap.mmap | None = None
        self._fd = open_inside(folder_fd, entry.path, where)
        size = os.fstat(self._fd).st_size
        if size != entry.bytes:
            self.close()
            raise ArtifactError(
                f"{where}: {entry.path}: got {size} bytes, the manifest says {entry.bytes}; copy or build it again"
            )

    def read(self) -> bytes:
        """The file's bytes. Raises ArtifactError if they are not those that the manifest vouches for."""
        if self.entry.bytes > _MAX_READ_BYTES:
            raise ArtifactError(
                f"{self._where}: {self.entry.path} has {self.entry.bytes} bytes, more than any such file; rebuild the "
                "artifact"
            )
        chunks, offset = [], 0
        while chunk := os.pread(self._fd, self.entry.bytes - offset, offset):
            chunks.append(chunk)
            offset += len(chunk)
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._compare(hash_bytes(data))
        return data

    def map(self) -> mmap.mmap:
        """The file as a read-only mapping, not hashed yet: call `check()` before trusting what it leads to."""
        if self._map is None:
            if self.entry.bytes == 0:
                raise ArtifactError(f"{self._where}: {self.entry.path} is empty; rebuild the artifact")
            self._map = mmap.mmap(self._fd, self.entry.bytes, prot=mmap.PROT_READ)
        return self._map

    def check(self) -> None:
        """Hash the mapping that `map()` gave out, or else the file. Raises ArtifactError if it is not what the manifest
        vouches for.
        """
        if self._fd >= 0:
            # a mapping alone reads ahead by 128 kB: half the speed from a disk
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_WILLNEED)
        if self._map is not None:
            self._compare(hash_bytes(self._map))
            return
        # read, not mapped: pages of a mapping would count as this process's memory
        self._compare(_hash_all(self._pieces, _most_threads))

    def _pieces(self) -> Iterator[memoryview]:
        offset, buffer = 0, memoryview(bytearray(min(_READ_BYTES, self.entry.bytes)))
        while count := os.preadv(self._fd, [buffer], offset):
            yield buffer[:count]
            offset += count

    def is_at(self, path: Path) -> bool:
        """Whether `path` leads to this file."""
        return is_same_file(self._fd, path)

    def _compare(self, got: str) -> None:
        if got != self.entry.hash:
            raise ArtifactError(
                f"{self._where}: {self.entry.path}: blake3 {got[:16]}..., the manifest says {self.entry.hash[:16]}...; "
                "the file was altered or damaged: copy or build it again"
            )

    def close(self) -> None:
        """Close the file; a mapping that was handed out lives as long as it is referenced elsewhere."""
        self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
