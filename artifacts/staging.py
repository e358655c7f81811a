"""Writing an artifact: a complete tree is staged beside it, then put in its place in one step.

Beside `artifact` a build uses, all hidden: `.artifact.lock` (one build at a time), `.artifact.staging` (the new tree),
`.artifact.resume` (a killed conversion's tree, while another command stages its own) and, only where the file system
cannot exchange two folders, `.artifact.old` for an instant. What a killed build leaves is used or removed by the next.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ArtifactError, ConfigError, TargetError, WeightError
from .host.process import current_folder
from .integrity import check_relative, hash_bytes, is_same_file, open_inside
from .manifest import MANIFEST_NAME, FileEntry, Manifest
from .naming import naming
from .own import check_deletable, check_own, open_own, own_folder, remove_tree
from .schema import dump_json, parse_json
from .signing import SIGNATURE_NAME, Signer
from .store import Artifact, is_signed, leftover, open_artifact, read_manifest, real_path

# marks a staged tree as unfinished, and holds what a killed build may resume from; removed by the commit
JOURNAL_NAME = "staging.json"
_SPARE_BYTES = 64 << 20
_OWN_FOLDERS = ("weights", "graphs", "processor", "reports", "selftest")
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


class Staging:
    """A tree that is to become the artifact at `target`. Made by `stage`; nothing at `target` changes until `commit`.

    path: the staged folder. base: the manifest of the artifact that is there now, or None.
    journal: plain JSON values that survive a kill, saved by `save_journal`; empty in a fresh tree.
    """

    def __init__(self, target: Path, base: Manifest | None, sync: bool) -> None:
        self.target = target
        self.path = staging_path(target)
        self.base = base
        self.sync = sync
        self.committed = False
        self._found = _state(target)
        self.journal: dict[str, Any] = {}
        self._added: set[str] = set()
        if own_folder(self.path):
            self.journal = _read_journal(self.path) or {}
        else:
            self.path.mkdir()
            self.save_journal()

    def save_journal(self) -> None:
        """Write `journal`, whole or not at all."""
        self._write(JOURNAL_NAME, dump_json(self.journal))

    def file(self, relative: str) -> Path:
        """The path to write a new file to: its folders exist, the file does not."""
        path = self.path.joinpath(*check_relative(relative, str(self.path)))
        path.parent.mkdir(parents=True, exist_ok=True)
        # kept files are hard links into the present artifact: they must be replaced, never overwritten
        path.unlink(missing_ok=True)
        return path

    def _write(self, relative: str, data: bytes) -> None:
        path = self.path.joinpath(*check_relative(relative, str(self.path)))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with naming(path):
            partial.write_bytes(data)
        os.replace(partial, path)

    def add(self, relative: str, data: bytes) -> FileEntry:
        """Write one small file and return its manifest entry."""
        self._write(relative, data)
        self._added.add(relative)
        return FileEntry(relative, len(data), hash_bytes(data))

    def keep(self, entries: Iterable[FileEntry]) -> None:
        """Take files over from the present artifact, as hard links; as copies where there are no hard links.

        What was staged by `add` stays, even if the present artifact has the same: it may be damaged there.
        Raises ArtifactError if one is missing there, TargetError if copies do not fit on the disk.
        """
        for entry in entries:
            if entry.path in self._added:
                continue
            source = self.target.joinpath(*check_relative(entry.path, str(self.target)))
            if source.is_symlink() or not source.is_file() or source.stat().st_size != entry.bytes:
                raise ArtifactError(
                    f"{self.target}: {entry.path} is missing or not {entry.bytes} bytes; the artifact is damaged: "
                    "rebuild it with `qwen2vl-tc build`"
                )
            path = self.file(entry.path)
            try:
                os.link(source, path)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV):
                    raise
                require_disk(self.path, entry.bytes, f"a copy of {entry.path}")
                with naming(path):
                    shutil.copyfile(source, path)

    def write_manifest(self, manifest: Manifest) -> None:
        """Write manifest.json, which makes the staged tree an artifact that `open` reads; not yet the user's."""
        self._write(MANIFEST_NAME, manifest.to_bytes())

    def open(self) -> Artifact:
        """The staged tree as an artifact, for verification before the commit."""
        return open_artifact(self.path)

    def commit(self, manifest: Manifest, sign: Signer | None = None) -> None:
        """Put the staged tree in the target's place: readers see the old artifact or the new one, both whole.

        Files that the manifest does not list are dropped, also the present artifact's signature unless the manifest
        stays as it is; `sign` makes a new one. Raises ArtifactError if a file that the manifest lists is not there.
        """
        self.write_manifest(manifest)
        with self.open():
            pass  # every file is there with its size
        listed = {entry.path for entry in manifest.files()} | {MANIFEST_NAME, JOURNAL_NAME}
        signature = sign(manifest.to_bytes()) if sign else self._still_signed(manifest)
        if signature is not None:
            self._write(SIGNATURE_NAME, signature)
            listed.add(SIGNATURE_NAME)
        self._prune(listed)
        if self.sync:
            for folder, _, names in os.walk(self.path, topdown=False):
                for name in names:
                    sync_path(Path(folder, name))
                sync_path(Path(folder))
        # last, and after the wait: a build killed while the disk writes can still resume
        (self.path / JOURNAL_NAME).unlink()
        if self.sync:
            sync_path(self.path)
        self._check_unchanged()
        with _still_here(self.target):
            self._replace()
        self.committed = True
        # the new artifact is there: whatever fails now is no failure of the build
        try:
            if self.sync:
                sync_path(self.target.parent)
            for old in (self.path, leftover(self.target)):
                if own_folder(old):
                    remove_tree(old, MANIFEST_NAME)
        except (OSError, TargetError) as error:
            _warn("%s is written, but: %s", self.target, error)

    def _still_signed(self, manifest: Manifest) -> bytes | None:
        """The present artifact's signature, where it is also one of the new manifest."""
        if not is_signed(self.target) or (self.target / MANIFEST_NAME).read_bytes() != manifest.to_bytes():
            return None
        return (self.target / SIGNATURE_NAME).read_bytes()

    def _check_unchanged(self) -> None:
        """What stands at the target is deleted by the commit: it must be what stood there at the start."""
        if self.base is not None:
            _refuse_strangers(self.target, self.base)
        check_deletable(self.target)
        if _state(self.target) != self._found:
            raise ArtifactError(
                f"{self.target}: changed while this was being built; it is left alone: run the command again"
            )

    def _prune(self, listed: set[str]) -> None:
        for folder, _, names in os.walk(self.path, topdown=False):
            for name in names:
                path = Path(folder, name)
                if path.relative_to(self.path).as_posix() not in listed:
                    path.unlink()
            if not os.listdir(folder):
                os.rmdir(folder)

    def _replace(self) -> None:
        # os.rename also takes the place of an empty folder
        if not self.target.exists() or not os.listdir(self.target):
            os.rename(self.path, self.target)
        elif not exchange(self.path, self.target):
            # Between these two lines there is no artifact at the target: readers then look at the leftover, and
            # the next build puts it back if this one dies here.
            os.rename(self.target, leftover(self.target))
            os.rename(self.path, self.target)

    def discard(self) -> None:
        """Delete the staged tree; the target stays as it was."""
        remove_tree(self.path, MANIFEST_NAME)


def _warn(message: str, *values: object) -> None:
    import logging

    logging.getLogger(__name__).warning(f"warning: {message}", *values)


@contextmanager
def _still_here(target: Path) -> Iterator[None]:
    """A process that stands in the folder that is replaced stands in the new one afterwards, not in a deleted one; its
    shell is told to follow."""
    try:
        here = current_folder()
    except TargetError:
        here = None
    yield
    if here is not None and target in (here, *here.parents):
        os.chdir(here if here.is_dir() else target)
        _warn("%s: the current folder was replaced; in a shell, `cd .` before the next command", here)


def _state(target: Path) -> tuple[int, int, bytes] | None:
    """What stands at `target`: its inode and its manifest; None for nothing or an empty folder."""
    if not target.exists() or (target.is_dir() and not os.listdir(target)):
        return None
    manifest = target / MANIFEST_NAME
    stat = target.stat()
    return stat.st_dev, stat.st_ino, manifest.read_bytes() if manifest.is_file() else b""


def _refuse_strangers(target: Path, manifest: Manifest | None) -> None:
    """A build replaces the folder as a whole: what is not the artifact's would be lost.

    Without a manifest that can be read, everything in an artifact's own folders counts as its own.
    """
    listed = {MANIFEST_NAME, SIGNATURE_NAME, *(entry.path for entry in (manifest.files() if manifest else ()))}
    for folder, _, names in os.walk(target):
        for name in names:
            relative = Path(folder, name).relative_to(target).as_posix()
            if relative not in listed and (manifest or relative.partition("/")[0] not in _OWN_FOLDERS):
                raise ArtifactError(
                    f"{target}: {relative} is not part of the artifact, and would be lost; move it away first"
                )


def staging_path(target: Path) -> Path:
    """Where the next artifact for `target` is staged."""
    return target.parent / f".{target.name}.staging"


def _set_aside(target: Path) -> Path:
    """Where a tree to resume from waits while a command that does not resume stages its own."""
    return target.parent / f".{target.name}.resume"


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    path = target.parent / f".{target.name}.lock"
    while True:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if os.path.lexists(path):
                check_own(path.lstat(), path, stat.S_IFREG)
            raise ArtifactError(f"{target.parent}: cannot write there: {error.strerror}; use another --out") from error
        try:
            check_own(os.fstat(fd), path, stat.S_IFREG)
        except TargetError:
            os.close(fd)
            raise
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise ArtifactError(
                f"{target}: another build is writing it; wait for that one, or use another --out"
            ) from error
        if is_same_file(fd, path):
            break
        os.close(fd)  # the build before us removed its lock between our two calls
    try:
        yield
    finally:
        path.unlink()
        os.close(fd)


def _read_journal(staged: Path) -> dict[str, Any] | None:
    """The journal of a staged tree; None if there is none, or if a power cut left it damaged."""
    path = staged / JOURNAL_NAME
    try:
        folder_fd = open_own(staged)
        try:
            with open(open_inside(folder_fd, JOURNAL_NAME, str(staged)), "rb") as file:
                journal = parse_json(file.read(), str(path))
        finally:
            os.close(folder_fd)
    except (FileNotFoundError, ArtifactError):
        return None
    return journal if isinstance(journal, dict) else None


def _recover(target: Path) -> None:
    """Finish or undo what a killed build left. Called with the lock held."""
    old, staged, aside = leftover(target), staging_path(target), _set_aside(target)
    if own_folder(old):
        if not target.exists() and (old / MANIFEST_NAME).exists():
            os.rename(old, target)
        else:
            remove_tree(old, MANIFEST_NAME)
    # without a journal it is an old artifact that was swapped out and not deleted to the end
    if own_folder(staged) and _read_journal(staged) is None:
        remove_tree(staged, MANIFEST_NAME)
    if own_folder(aside):
        if own_folder(staged):
            remove_tree(staged, MANIFEST_NAME)
        os.rename(aside, staged)


def _present(target: Path, whole: bool) -> Manifest | None:
    if not target.exists() or (target.is_dir() and not os.listdir(target)):
        return None
    if not (target / MANIFEST_NAME).is_file():
        raise ArtifactError(
            f"{target}: exists and is not an artifact (no {MANIFEST_NAME}); it is left alone: use another --out"
        )
    check_deletable(target)
    try:
        manifest = read_manifest(target)
    except ArtifactError:
        # a whole build replaces any artifact of ours, also one of another schema; the rest is said as it is
        data = parse_json((target / MANIFEST_NAME).read_bytes(), str(target / MANIFEST_NAME))
        if whole and isinstance(data, dict) and type(data.get("schema")) is int:
            _refuse_strangers(target, None)
            return None
        raise
    _refuse_strangers(target, manifest)
    return manifest


@contextmanager
def stage(out: "Path | str", *, sync: bool = True, whole: bool = False, resumes: bool = True) -> Iterator[Staging]:
    """Stage the next artifact for `out`: fill it, then `commit(manifest)` once.

    sync: wait until everything is on the disk before the commit. whole: every part is replaced, so that the present
    artifact need not be readable. resumes: go on with what a killed build left; otherwise that is set aside meanwhile.
    Leaving without a commit keeps the staged tree if its journal has something to resume from, and deletes it
    otherwise; it is always deleted when the source was refused (ConfigError, WeightError). The present artifact stays.
    Raises ArtifactError if `out` is something else than an artifact, or if another build holds it.
    """
    if os.path.islink(out):
        check_own(os.lstat(out), out, stat.S_IFLNK)
    target = real_path(out)
    with _locked(target):
        _recover(target)
        base = _present(target, whole)
        staged, aside = staging_path(target), _set_aside(target)
        if not resumes and own_folder(staged) and _read_journal(staged):
            os.rename(staged, aside)
        refused = False
        try:
            staging = Staging(target, base, sync)
            try:
                yield staging
            except (ConfigError, WeightError):
                refused = True
                raise
            finally:
                if not staging.committed and (refused or not staging.journal):
                    staging.discard()
        finally:
            if own_folder(aside) and not own_folder(staged):
                os.rename(aside, staged)
