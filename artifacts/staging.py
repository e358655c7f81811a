"""Writing an artifact: a complete tree is staged beside it, then put in its place in one step.

Beside `artifact` a build uses, all hidden: `.artifact.lock` (one build at a time), `.artifact.staging` (the new tree),
`.artifact.resume` (a killed conversion's tree, while another command stages its own) and, only where the file system
cannot exchange two folders, `.artifact.old` for an instant. What a killed build leaves is used or removed by the next.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .disk import exchange, require_disk, sync_path
from .errors import ArtifactError, ConfigError, TargetError, WeightError
from .integrity import OpenedFile, check_relative, hash_bytes, open_inside
from .manifest import MANIFEST_NAME, FileEntry, Manifest
from .naming import naming
from .own import check_deletable, check_own, open_own, own_folder, remove_tree
from .schema import dump_json, parse_json
from .signing import SIGNATURE_NAME, Signer
from .store import Artifact, is_signed, leftover, open_artifact, real_path
from .target import identity, locked, present_manifest, refuse_strangers, still_here, warn

# marks a staged tree as unfinished, and holds what a killed build may resume from; removed by the commit
JOURNAL_NAME = "staging.json"


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
        self._at_start = identity(target)
        self.journal: dict[str, Any] = {}
        # by this run: what an earlier one left in the tree counts only once `take_up` has checked it
        self._staged: set[str] = set()
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
        self._staged.add(relative)
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
        self._staged.add(relative)
        return FileEntry(relative, len(data), hash_bytes(data))

    def take_up(self, entry: FileEntry) -> None:
        """Count a file of a killed run as staged by this one. Raises ArtifactError unless it is there and whole."""
        folder_fd = os.open(self.path, os.O_RDONLY)
        try:
            with closing(OpenedFile(folder_fd, entry, str(self.path))) as file:
                file.check()
        finally:
            os.close(folder_fd)
        self._staged.add(entry.path)

    def _keep(self, manifest: Manifest) -> None:
        """Take the files that stay from the present artifact, as hard links; as copies where there are no hard links.

        What was staged stays, even if the present artifact has the same: it may be damaged there.
        Raises ArtifactError if one is missing there, TargetError if copies do not fit on the disk.
        """
        present = set(self.base.files()) if self.base else set()
        for entry in manifest.files():
            if entry.path in self._staged:
                continue
            # whatever an earlier run left there is none of this artifact's
            path = self.file(entry.path)
            if entry not in present:
                continue
            source = self.target.joinpath(*check_relative(entry.path, str(self.target)))
            if source.is_symlink() or not source.is_file() or source.stat().st_size != entry.bytes:
                raise ArtifactError(
                    f"{self.target}: {entry.path} is missing or not {entry.bytes} bytes; the artifact is damaged: "
                    "rebuild it with `qwen2vl-tc build`"
                )
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

        A file that the manifest lists and this run did not stage is taken from the present artifact, if it lists the
        same. Files that the manifest does not list are dropped, also the present artifact's signature unless the
        manifest stays as it is; `sign` makes a new one. Raises ArtifactError if a file that the manifest lists is
        neither staged nor there.
        """
        self._keep(manifest)
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
        with still_here(self.target):
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
            warn("%s is written, but: %s", self.target, error)

    def _still_signed(self, manifest: Manifest) -> bytes | None:
        """The present artifact's signature, where it is also one of the new manifest."""
        if not is_signed(self.target) or (self.target / MANIFEST_NAME).read_bytes() != manifest.to_bytes():
            return None
        return (self.target / SIGNATURE_NAME).read_bytes()

    def _check_unchanged(self) -> None:
        """What stands at the target is deleted by the commit: it must be what stood there at the start."""
        if self.base is not None:
            refuse_strangers(self.target, self.base)
        check_deletable(self.target)
        if identity(self.target) != self._at_start:
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


def staging_path(target: Path) -> Path:
    """Where the next artifact for `target` is staged."""
    return target.parent / f".{target.name}.staging"


def _set_aside(target: Path) -> Path:
    """Where a tree to resume from waits while a command that does not resume stages its own."""
    return target.parent / f".{target.name}.resume"


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
    with locked(target):
        _recover(target)
        base = present_manifest(target, whole)
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


@contextmanager
def amend(path: "Path | str", *, sync: bool = True) -> Iterator[tuple[Staging, Manifest]]:
    """Stage a change of the artifact that is at `path`: as `stage` without resuming, with the manifest to change.

    Raises ArtifactError where there is no artifact.
    """
    with stage(path, sync=sync, resumes=False) as staging:
        if staging.base is None:
            raise ArtifactError(
                f"{path}: no artifact there; make one with `qwen2vl-tc build --src <hf_dir> --out {path}`"
            )
        yield staging, staging.base
