"""What stands where a build is to put its artifact: whose it is, and that one build at a time works on it."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtifactError, TargetError
from .host.process import current_folder
from .integrity import is_same_file
from .manifest import MANIFEST_NAME, Manifest
from .own import check_deletable, check_own
from .schema import parse_json
from .signing import SIGNATURE_NAME
from .store import read_manifest

_OWN_FOLDERS = ("weights", "graphs", "processor", "reports", "selftest")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock beside `target`. Raises ArtifactError where another build does, or where nothing can be written."""
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


def identity(target: Path) -> tuple[int, int, bytes] | None:
    """What stands at `target`: its inode and its manifest; None for nothing or an empty folder."""
    if not target.exists() or (target.is_dir() and not os.listdir(target)):
        return None
    manifest = target / MANIFEST_NAME
    stat = target.stat()
    return stat.st_dev, stat.st_ino, manifest.read_bytes() if manifest.is_file() else b""


def refuse_strangers(target: Path, manifest: Manifest | None) -> None:
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


def present_manifest(target: Path, whole: bool) -> Manifest | None:
    """The manifest of the artifact that stands there; None for nothing, and for one of another schema if `whole`.

    Raises ArtifactError for what is no artifact, or holds files that are not the artifact's.
    """
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
            refuse_strangers(target, None)
            return None
        raise
    refuse_strangers(target, manifest)
    return manifest


@contextmanager
def still_here(target: Path) -> Iterator[None]:
    """A process that stands in the folder that is replaced stands in the new one afterwards, not in a deleted one; its
    shell is told to follow."""
    try:
        here = current_folder()
    except TargetError:
        here = None
    yield
    if here is not None and target in (here, *here.parents):
        os.chdir(here if here.is_dir() else target)
        warn("%s: the current folder was replaced; in a shell, `cd .` before the next command", here)


def warn(message: str, *values: object) -> None:
    """Tell the user, who gets no exception."""
    import logging

    logging.getLogger(__name__).warning(f"warning: {message}", *values)
