"""Every way in which a file of an artifact can be other than its manifest says."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.integrity import hash_bytes
from qwen2vl_tc.artifacts.manifest import FileEntry, empty_manifest
from qwen2vl_tc.artifacts.store import Artifact, open_artifact
from qwen2vl_tc.runtime.models import config_from_hf, to_plain

DATA = bytes(range(256)) * 40


def artifact_of(folder: Path, *entries: FileEntry) -> Path:
    manifest = dataclasses.replace(
        empty_manifest("test", to_plain(config_from_hf(tiny_config()))), processor=tuple(entries)
    )
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return folder


def good(folder: Path, path: str = "processor/file") -> FileEntry:
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_bytes(DATA)
    return FileEntry(path, len(DATA), hash_bytes(DATA))


def use(path: Path) -> None:
    """What a loader does: open, then read or map each file."""
    with open_artifact(path) as artifact:
        for entry in artifact.manifest.files():
            artifact.read(entry)
            artifact.map(entry)


def test_bytes_and_mapping_are_those_of_the_file(tmp_path: Path) -> None:
    entry = good(tmp_path)
    with open_artifact(artifact_of(tmp_path, entry)) as artifact:
        assert artifact.read(entry) == DATA
        mapping = artifact.map(entry)
        artifact.check_all()
        assert artifact.manifest_hash == hash_bytes((tmp_path / "manifest.json").read_bytes())
    assert mapping[:] == DATA  # outlives the artifact


def test_the_hash_is_blake3() -> None:
    # https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json, input_len 0
    assert hash_bytes(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert hash_bytes(bytearray(DATA * 8000)) == hash_bytes(memoryview(DATA * 8000))


@pytest.mark.parametrize("access", [Artifact.read, Artifact.map, Artifact.check])
def test_an_altered_byte_is_found(tmp_path: Path, access: Callable[[Artifact, FileEntry], object]) -> None:
    entry = good(tmp_path)
    (tmp_path / entry.path).write_bytes(DATA[:-1] + b"!")
    refused = pytest.raises(ArtifactError, match=r"processor/file: blake3 .* altered or damaged")
    with open_artifact(artifact_of(tmp_path, entry)) as artifact, refused:
        access(artifact, entry)


def test_a_file_swapped_after_opening_is_not_used(tmp_path: Path) -> None:
    entry = good(tmp_path)
    with open_artifact(artifact_of(tmp_path, entry)) as artifact:
        (tmp_path / "other").write_bytes(b"evil" + DATA[4:])
        os.replace(tmp_path / "other", tmp_path / entry.path)
        assert artifact.read(entry) == DATA


@pytest.mark.parametrize("change", [1, -1])
def test_a_size_that_lies_is_found_on_opening(tmp_path: Path, change: int) -> None:
    entry = good(tmp_path)
    artifact_of(tmp_path, dataclasses.replace(entry, bytes=entry.bytes + change))
    with pytest.raises(ArtifactError, match=rf"got {len(DATA)} bytes, the manifest says {len(DATA) + change}"):
        open_artifact(tmp_path)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "processor/../../secret", "processor//file", "./file", "a\\b", "", "a\0b"]
)
def test_a_path_that_escapes_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(DATA)
    artifact_of(tmp_path / "artifact", FileEntry(path, len(DATA), hash_bytes(DATA)))
    with pytest.raises(ArtifactError, match="plain relative path"):
        use(tmp_path / "artifact")


def test_links_out_of_the_artifact_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    outside = good(tmp_path, "outside/file")
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "outside/file")
    (folder / "folder").symlink_to(tmp_path / "outside")
    for path in ("link", "folder/file"):
        artifact_of(folder, dataclasses.replace(outside, path=path))
        with pytest.raises(ArtifactError, match="symbolic link"):
            use(folder)


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in ("pipe", "folder"):
        artifact_of(tmp_path, FileEntry(path, 0, ""))
        with pytest.raises(ArtifactError, match="not a regular file"):
            use(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    artifact_of(tmp_path, FileEntry("processor/tokenizer.json", 1, ""))
    with pytest.raises(ArtifactError, match=r"processor/tokenizer.json is missing"):
        use(tmp_path)


def test_an_artifact_can_be_moved(tmp_path: Path) -> None:
    entry = good(tmp_path / "a")
    artifact_of(tmp_path / "a", entry)
    (tmp_path / "a").rename(tmp_path / "b")
    use(tmp_path / "b")


def test_no_file_stays_open_after_a_refusal(tmp_path: Path) -> None:
    entry = good(tmp_path)
    artifact_of(tmp_path, entry, FileEntry("absent", 1, ""))
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(ArtifactError):
            open_artifact(tmp_path)
    assert len(os.listdir("/dev/fd")) == before


def test_a_forked_process_can_hash_too() -> None:
    code = """
import os, signal
from qwen2vl_tc.artifacts.integrity import hash_bytes
data = bytes(8 << 20)
before = hash_bytes(data)
if (pid := os.fork()) == 0:
    signal.alarm(20)  # ends the child if it waits for threads that it does not have
    os._exit(0 if hash_bytes(data) == before else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
