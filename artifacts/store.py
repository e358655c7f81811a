"""Reading an artifact: one consistent set of open files, whatever a build does to the folder meanwhile."""

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ArtifactError
from .host.process import current_folder
from .integrity import OpenedFile, hash_bytes, open_inside
from .manifest import MANIFEST_NAME, FileEntry, GePart, Manifest, OnnxPart, manifest_from_bytes
from .signing import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, Signed, check_signature, describe_signature, public_keys

# 72B with ten batch sizes has 0.5 MB; JSON grows twentyfold when it is parsed
_MAX_MANIFEST_BYTES = 8 << 20
_REPLACED_TRIES = 5


def real_path(path: "Path | str") -> Path:
    """Absolute, with links resolved: what stands beside the artifact must be on its file system.

    Raises TargetError for a relative path where the current folder is deleted.
    """
    return Path(os.path.realpath(path if os.path.isabs(path) else current_folder() / path))


def leftover(path: Path) -> Path:
    """Where the old artifact stands for an instant while a build replaces it without an atomic exchange."""
    return path.parent / f".{path.name}.old"


def _open_folder(path: Path) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError as error:
        try:
            return os.open(leftover(path), flags | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise ArtifactError(
                f"{path}: no such folder; make an artifact with `qwen2vl-tc build --src <hf_dir> --out {path}`"
            ) from error
    except NotADirectoryError as error:
        raise ArtifactError(f"{path}: is a file, expected an artifact's folder") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot open: {error.strerror}") from error


def _read_small(folder_fd: int, path: Path, name: str, most: int) -> bytes:
    fd = open_inside(folder_fd, name, str(path))
    with open(fd, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ArtifactError(f"{path}/{name}: larger than {most} bytes; not an artifact's")
    return data


def _read_manifest_bytes(folder_fd: int, path: Path) -> bytes:
    return _read_small(folder_fd, path, MANIFEST_NAME, _MAX_MANIFEST_BYTES)


def _read_signature(folder_fd: int, path: Path) -> bytes | None:
    try:
        return _read_small(folder_fd, path, SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
    except ArtifactError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def read_signed(path: "Path | str", trusted_keys: "Sequence[str | Path] | None" = None) -> Signed | None:
    """Who signed an artifact, and whether that holds; None where nobody did. Raises ArtifactError, TargetError."""
    resolved = real_path(path)
    trusted = None if trusted_keys is None else public_keys(trusted_keys)
    folder_fd = _open_folder(resolved)
    try:
        signature = _read_signature(folder_fd, resolved)
        if signature is None:
            return None
        return describe_signature(_read_manifest_bytes(folder_fd, resolved), signature, trusted, str(resolved))
    finally:
        os.close(folder_fd)


def is_signed(path: "Path | str") -> bool:
    """Whether a signature lies beside the manifest, whoever's and of whatever."""
    return (real_path(path) / SIGNATURE_NAME).is_file()


class Artifact:
    """An open artifact. Every file of the manifest is held open, so that it stays whole while a build replaces it.

    `manifest_hash` names this artifact's exact content, for caches.
    """

    def __init__(self, path: Path, manifest: Manifest, manifest_hash: str, files: dict[str, OpenedFile]) -> None:
        self.path = path
        self.manifest = manifest
        self.manifest_hash = manifest_hash
        self._files = files

    def open(self, entry: FileEntry) -> OpenedFile:
        """The open file of an entry of this manifest."""
        return self._files[entry.path]

    def read(self, entry: FileEntry) -> bytes:
        """The checked bytes of a small file. Raises ArtifactError if size or hash differ."""
        return self.open(entry).read()

    def map(self, entry: FileEntry, check: bool = True) -> mmap.mmap:
        """The file as a mapping. With `check=False`, call `check(entry)` later, for instance in another thread."""
        mapping = self.open(entry).map()
        if check:
            self.check(entry)
        return mapping

    def check(self, entry: FileEntry) -> None:
        """Hash a file, or the mapping of it that `map` gave out. Raises ArtifactError if the manifest says another."""
        self.open(entry).check()

    def check_in_place(self, entry: FileEntry) -> None:
        """That the file's name still leads to the one that is open here, for readers that open files by name.

        Raises ArtifactError if a build has replaced the artifact meanwhile.
        """
        if not self.open(entry).is_at(self.path / entry.path):
            raise ArtifactError(f"{self.path}: was replaced while it was being loaded; load it again")

    def check_all(self) -> None:
        """Hash every file. Raises ArtifactError for the first that differs."""
        for entry in self.manifest.files():
            self.check(entry)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Artifact":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _open_all(folder_fd: int, path: Path, trusted: Mapping[str, str] | None) -> Artifact:
    data = _read_manifest_bytes(folder_fd, path)
    if trusted is not None:
        check_signature(data, _read_signature(folder_fd, path), trusted, str(path))
    manifest = manifest_from_bytes(data, f"{path}/{MANIFEST_NAME}")
    files: dict[str, OpenedFile] = {}
    try:
        for entry in manifest.files():
            files[entry.path] = OpenedFile(folder_fd, entry, str(path))
    except ArtifactError:
        for file in files.values():
            file.close()
        raise
    return Artifact(path, manifest, hash_bytes(data), files)


def open_artifact(path: "Path | str", trusted_keys: "Sequence[str | Path] | None" = None) -> Artifact:
    """Open an artifact: manifest parsed, every file present with the right size; hashes are checked on use.

    trusted_keys: PEM files of public keys, one of which must have signed the artifact; None asks for no signature.
    Raises ArtifactError: no artifact, another schema, a file that is missing, has a wrong size, or is no plain file;
    not signed, altered since, or signed by another. TargetError for a key that cannot be read.
    """
    resolved = real_path(path)
    trusted = None if trusted_keys is None else public_keys(trusted_keys)
    for _ in range(_REPLACED_TRIES):
        folder_fd = _open_folder(resolved)
        try:
            return _open_all(folder_fd, resolved, trusted)
        except ArtifactError:
            # a build may have put a new artifact there and be deleting the one that is open here
            if not _was_replaced(folder_fd, resolved):
                raise
        finally:
            os.close(folder_fd)
    raise ArtifactError(f"{resolved}: replaced {_REPLACED_TRIES} times while being opened; wait for the build to end")


def _was_replaced(folder_fd: int, path: Path) -> bool:
    try:
        now_fd = _open_folder(path)
    except ArtifactError:
        return False
    here, now = os.fstat(folder_fd), os.fstat(now_fd)
    os.close(now_fd)
    return (now.st_dev, now.st_ino) != (here.st_dev, here.st_ino)


def read_manifest(path: "Path | str") -> Manifest:
    """Only the manifest, for tools that say what is in an artifact. Raises ArtifactError."""
    resolved = real_path(path)
    folder_fd = _open_folder(resolved)
    try:
        return manifest_from_bytes(_read_manifest_bytes(folder_fd, resolved), f"{resolved}/{MANIFEST_NAME}")
    finally:
        os.close(folder_fd)


def ge_part(manifest: Manifest, path: Path) -> GePart:
    """The GE graphs of the artifact at `path`. Raises ArtifactError if it has none, or none for its weights."""
    part = manifest.ge
    if part is None:
        raise ArtifactError(f"{path}: has no GE graphs; run `qwen2vl-tc compile {path}`")
    if manifest.weights is not None and manifest.weights.dtype != part.dtype:
        raise ArtifactError(
            f"{path}: weights are {manifest.weights.dtype}, graphs {part.dtype}; run `qwen2vl-tc compile {path}`"
        )
    expected = ["visual", "prefill", *(f"decode_b{batch}" for batch in part.batches)]
    if (names := [graph.name for graph in part.graphs]) != expected:
        raise ArtifactError(
            f"{path}: {MANIFEST_NAME}: has the graphs {', '.join(names)}, expected {', '.join(expected)}; run "
            f"`qwen2vl-tc compile {path}`"
        )
    return part


def onnx_part(manifest: Manifest, path: Path) -> OnnxPart:
    """The ONNX models of the artifact at `path`. Raises ArtifactError if it has none."""
    if manifest.onnx is None:
        raise ArtifactError(f"{path}: has no ONNX models; run `qwen2vl-tc compile {path} --mode onnx`")
    return manifest.onnx
