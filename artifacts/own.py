"""Whose a file is. In a folder that several users write to, links and folders may lie in wait beside an artifact: what
is not this user's own, or root's, is refused wherever a build or a cache would go on from it."""

import fcntl
import os
import shutil
import stat
import struct
from pathlib import Path

from .errors import ArtifactError, TargetError
from .host.process import cache_home

# linux/fs.h; statx would say the same
_GET_FLAGS, _IMMUTABLE, _APPEND_ONLY = 0x80086601, 0x10, 0x20


def trusted_users() -> set[int]:
    """Whose files may be used as if they were ours."""
    return {os.geteuid(), 0}


def check_own(status: os.stat_result, where: "Path | str", kind: int = stat.S_IFDIR, others_may_not: int = 0) -> None:
    """Raises TargetError unless this is a file of that kind, nobody else's, without these bits of its mode."""
    what = {stat.S_IFDIR: "folder", stat.S_IFREG: "file", stat.S_IFLNK: "link"}[kind]
    if stat.S_IFMT(status.st_mode) != kind:
        problem = "is a symbolic link" if stat.S_ISLNK(status.st_mode) else f"is no {what}"
    elif status.st_uid not in trusted_users():
        problem = f"belongs to user {status.st_uid}"
    elif status.st_mode & others_may_not:
        problem = f"has mode {stat.S_IMODE(status.st_mode):o}"
    else:
        return
    raise TargetError(
        f"{where}: {problem}, expected a {what} of user {os.geteuid()}'s own, since others could have put it there; "
        "delete it, or use another place"
    )


def open_own(path: Path, others_may_not: int = 0) -> int:
    """A descriptor of a folder of our own; its name is not looked up again. FileNotFoundError where there is nothing.

    Raises TargetError for a link, a file, and for what belongs to others.
    """
    check_own(os.lstat(path), path, others_may_not=others_may_not)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        check_own(os.fstat(fd), path, others_may_not=others_may_not)
    except TargetError:
        os.close(fd)
        raise
    return fd


def own_folder(path: Path, others_may_not: int = 0) -> bool:
    """Whether there is a folder. Raises TargetError for a link, a file, and for what belongs to others."""
    try:
        fd = open_own(path, others_may_not)
    except FileNotFoundError:
        return False
    os.close(fd)
    return True


def make_own(path: Path) -> None:
    """Make a folder, or take one that is our own."""
    try:
        os.mkdir(path)
    except FileExistsError:
        own_folder(path)


def own_cache(*parts: str) -> Path:
    """A folder below ours in the user's cache, made where it is missing: none on the way is another user's.

    Raises TargetError where others may, or where it cannot be made.
    """
    folder = cache_home()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for part in ("", *parts):
            folder = folder / part
            if not own_folder(folder, others_may_not=stat.S_IWOTH):
                # another process may be doing the same
                folder.mkdir(mode=0o700, exist_ok=True)
                own_folder(folder, others_may_not=stat.S_IWOTH)
    except OSError as error:
        raise TargetError(f"{folder}: cannot write ({error}); set XDG_CACHE_HOME to a writable folder") from error
    return folder


def remove_tree(path: Path, first: str) -> None:
    """Delete a folder of our own, `first` of all a file that says what it is, so that what an interruption leaves is
    not taken for it. What is read-only in there is deleted too."""
    fd = open_own(path)
    try:
        for _, _, _, folder_fd in os.fwalk(".", dir_fd=fd):
            if not os.fstat(folder_fd).st_mode & stat.S_IWUSR:
                os.fchmod(folder_fd, stat.S_IRWXU)
        if first in os.listdir(fd):
            os.unlink(first, dir_fd=fd)
    finally:
        os.close(fd)
    shutil.rmtree(path)


def check_deletable(path: Path) -> None:
    """Raises ArtifactError if something keeps what is in a folder from being deleted: modes, or immutable files."""
    if not path.is_dir():
        return
    for folder, _, names, folder_fd in os.fwalk(path):
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder_fd) or not os.fstat(folder_fd).st_mode & stat.S_IWUSR:
            raise ArtifactError(
                f"{path}: {os.path.relpath(folder, path)} is read-only, so that the artifact cannot be replaced; make "
                f"it writable with `chmod -R u+w {path}`, or use another --out"
            )
        for name in (".", *names):
            if _is_immutable(name, folder_fd):
                raise ArtifactError(
                    f"{path}: {os.path.relpath(os.path.join(folder, name), path)} is immutable, so that the artifact "
                    f"cannot be replaced; see `lsattr -R {path}`, or use another --out"
                )


def _is_immutable(name: str, folder_fd: int) -> bool:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder_fd)
    except OSError:
        return False  # not to be read by this user: whether it can be read is asked elsewhere
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(fd, _GET_FLAGS, struct.pack("l", 0)))
    except OSError:
        return False  # this file system has no such flags
    finally:
        os.close(fd)
    return bool(flags & (_IMMUTABLE | _APPEND_ONLY))
