"""Staging, committing and opening artifacts, with the failures that a machine or a person can cause."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts import staging as staging_module
from qwen2vl_tc.artifacts.disk import exchange, require_disk
from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError, WeightError
from qwen2vl_tc.artifacts.manifest import Manifest, empty_manifest
from qwen2vl_tc.artifacts.staging import Staging, amend, stage, staging_path
from qwen2vl_tc.artifacts.store import leftover, open_artifact, read_manifest
from qwen2vl_tc.runtime.models import config_from_hf, to_plain

MODEL = to_plain(config_from_hf(tiny_config()))


def fill(staging: Staging, text: str, files: int = 3) -> Manifest:
    """Stage a few files whose bytes all say which build they are of."""
    entries = tuple(staging.add(f"processor/{i}.json", f"{text} {i}".encode()) for i in range(files))
    return dataclasses.replace(empty_manifest(text, MODEL), processor=entries)


def build(path: Path, text: str) -> None:
    with stage(path, sync=False) as staging:
        staging.commit(fill(staging, text))


def contents(path: Path) -> set[str]:
    with open_artifact(path) as artifact:
        return {artifact.manifest.name} | {artifact.read(e).decode().split()[0] for e in artifact.manifest.files()}


def hidden(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name.startswith("."))


@pytest.mark.parametrize("sync", [True, False])
def test_a_commit_makes_the_artifact_and_leaves_nothing_beside_it(tmp_path: Path, sync: bool) -> None:
    target = tmp_path / "deep" / "artifact"
    for text in ("old", "new"):
        with stage(target, sync=sync) as staging:
            assert (staging.base is None) == (text == "old")
            staging.commit(fill(staging, text))
        assert contents(target) == {text}
    assert hidden(target) == []
    assert sorted(p.name for p in target.iterdir()) == ["manifest.json", "processor"]


def test_where_folders_cannot_be_exchanged_two_renames_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    monkeypatch.setattr(staging_module, "exchange", lambda first, second: False)
    build(target, "new")
    assert contents(target) == {"new"} and hidden(target) == []


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "was_a").touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no RENAME_EXCHANGE")
    assert (tmp_path / "b" / "was_a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "absent")


def test_an_error_leaves_the_present_artifact_and_no_staging(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    with pytest.raises(WeightError), stage(target) as staging:
        fill(staging, "new")
        staging.journal["weights"] = "something to resume from"
        staging.save_journal()
        raise WeightError("bad tensor")
    assert contents(target) == {"old"} and hidden(target) == []


def test_what_can_be_resumed_survives_an_unrelated_error(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(TargetError), stage(target) as staging:
        fill(staging, "new")
        staging.journal["weights"] = "done"
        staging.save_journal()
        raise TargetError("no compiler")
    with stage(target) as staging:
        assert staging.journal == {"weights": "done"}
        assert (staging.path / "processor/0.json").read_text() == "new 0"
        staging.commit(fill(staging, "newer", files=1))
    assert sorted(p.name for p in (target / "processor").iterdir()) == ["0.json"]


def test_a_command_that_resumes_nothing_leaves_what_another_may_resume_from(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    build(target, "old")

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt), stage(target, sync=False) as staging:
            fill(staging, "half")
            staging.journal["weights"] = "done"
            staging.save_journal()
            raise KeyboardInterrupt

    def journal() -> object:
        with stage(target, sync=False) as staging:
            return staging.journal.get("weights")

    interrupted()
    with stage(target, sync=False, resumes=False) as staging:
        assert staging.journal == {} and not (staging.path / "processor").exists()
        staging.commit(fill(staging, "new"))
    assert contents(target) == {"new"} and journal() == "done"
    with pytest.raises(TargetError), stage(target, sync=False, resumes=False) as staging:
        raise TargetError("no compiler")
    assert journal() == "done"
    with pytest.raises(WeightError), stage(target, sync=False) as staging:
        raise WeightError("the source is refused: there is nothing to resume")
    assert hidden(target) == []


def test_what_is_set_aside_when_a_command_is_killed_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(KeyboardInterrupt), stage(target, sync=False) as staging:
        staging.journal["weights"] = "done"
        staging.save_journal()
        raise KeyboardInterrupt
    # as a kill leaves them: one tree aside, the other command's own half done
    staging_path(target).rename(tmp_path / ".artifact.resume")
    staging_path(target).mkdir()
    (staging_path(target) / "staging.json").write_bytes(b"{}")
    with stage(target, sync=False) as staging:
        assert staging.journal == {"weights": "done"}
        staging.commit(fill(staging, "new"))
    assert contents(target) == {"new"} and hidden(target) == []


def test_an_incomplete_tree_is_not_committed(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    with pytest.raises(ArtifactError, match=r"processor/1.json is missing"), stage(target) as staging:
        manifest = fill(staging, "new")
        (staging.path / "processor/1.json").unlink()
        staging.commit(manifest)
    assert contents(target) == {"old"}


def test_what_is_not_staged_anew_is_kept_as_a_link(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    inode = (target / "processor/1.json").stat().st_ino
    with stage(target) as staging:
        assert staging.base is not None
        first, *rest = staging.base.processor
        assert first.path == "processor/0.json"
        changed = (staging.add(first.path, b"new"), *rest)
        assert (target / first.path).read_bytes() == b"old 0"
        staging.commit(dataclasses.replace(staging.base, processor=changed))
    assert (target / first.path).read_bytes() == b"new"
    assert (target / rest[0].path).stat().st_ino == inode


def test_a_file_that_stays_must_be_whole_in_the_present_artifact_unless_it_is_staged_anew(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    (target / "processor/1.json").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"processor/1.json is missing or not 5 bytes"), amend(target) as change:
        staging, present = change
        staging.commit(dataclasses.replace(present, name="new"))
    with amend(target) as (staging, present):
        assert staging.add("processor/1.json", b"old 1") in present.processor
        staging.commit(present)
    assert contents(target) == {"old"}


def test_what_a_killed_run_left_counts_only_after_it_was_checked(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(KeyboardInterrupt), stage(target, sync=False) as staging:
        staging.journal["weights"] = "half"
        staging.save_journal()
        manifest = fill(staging, "new")
        raise KeyboardInterrupt
    with pytest.raises(ArtifactError, match=r"processor/1.json is missing"), stage(target, sync=False) as staging:
        staging.take_up(manifest.processor[0])
        staging.commit(manifest)
    (staging.path / "processor/2.json").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"processor/2.json"), stage(target, sync=False) as staging:
        staging.take_up(manifest.processor[2])


def test_a_change_asks_for_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent: no artifact there; make one"), amend(tmp_path / "absent"):
        pass


def test_without_hard_links_kept_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "artifact"
    build(target, "old")

    def refuse(source: Path, path: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    with stage(target) as staging:
        assert staging.base is not None
        staging.commit(staging.base)
    assert contents(target) == {"old"}


def test_a_second_build_into_the_same_artifact_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with stage(target) as staging:
        with pytest.raises(ArtifactError, match="another build"), stage(target):
            pass
        staging.commit(fill(staging, "first"))
    assert contents(target) == {"first"} and hidden(target) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_an_artifact_is_refused_and_not_deleted(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "thesis"
    if kind == "file":
        target.write_text("years of work")
    else:
        target.mkdir()
        (target / "chapter1").write_text("years of work")
    with pytest.raises(ArtifactError, match="not an artifact"), stage(target, whole=True):
        pass
    assert (target if kind == "file" else target / "chapter1").read_text() == "years of work"
    assert hidden(target) == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    build(target, "new")
    assert contents(target) == {"new"}


def test_only_a_whole_build_replaces_an_artifact_of_another_schema(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    (target / "manifest.json").write_text('{"schema": 0}')
    with pytest.raises(ArtifactError, match=r"schema 0.*qwen2vl-tc build"), stage(target):
        pass
    with stage(target, whole=True) as staging:
        staging.commit(fill(staging, "new"))
    assert contents(target) == {"new"}


KILLED = """
import os, signal, sys
from pathlib import Path
from qwen2vl_tc.artifacts import staging as module
sys.path[:0] = {tests!r}
from test_store import build
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
{patch}
build(Path({target!r}), "new")
"""


@pytest.mark.parametrize(
    ("patch", "left"),
    [
        ("module.Staging.commit = die", "old"),
        ("module.Staging._replace = die", "old"),
        ("module.remove_tree = die", "new"),  # exchanged, old tree not deleted
        ("module.exchange = lambda *a: False; module.remove_tree = die", "new"),
        # dies between the two renames
        (
            "module.exchange = lambda *a: False; rename = os.rename; count = []\n"
            "def second(a, b): count.append(1); die() if len(count) == 2 else rename(a, b)\n"
            "module.os.rename = second",
            "old",
        ),
    ],
)
def test_a_build_killed_at_any_point_leaves_a_whole_artifact_and_the_next_one_cleans_up(
    tmp_path: Path, patch: str, left: str
) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    code = KILLED.format(tests=[str(path) for path in Path(__file__).parents[:2]], patch=patch, target=str(target))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(target) == {left}
    build(target, "next")
    assert contents(target) == {"next"} and hidden(target) == []


def test_a_leftover_without_manifest_is_not_taken_for_an_artifact(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    leftover(target).mkdir()
    (leftover(target) / "half").touch()
    with stage(target) as staging:
        assert staging.base is None
        staging.commit(fill(staging, "new"))
    assert hidden(target) == []


def test_a_damaged_journal_starts_the_staging_afresh(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    staging_path(target).mkdir()
    (staging_path(target) / "staging.json").write_bytes(b"")
    build(target, "new")
    assert contents(target) == {"new"}


@pytest.mark.parametrize("atomic", [True, False])
def test_a_reader_sees_one_whole_artifact_while_builds_replace_it(
    tmp_path: Path, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "artifact"
    build(target, "0")
    if not atomic:
        monkeypatch.setattr(staging_module, "exchange", lambda first, second: False)
    stop = threading.Event()

    def rebuild() -> None:
        for i in range(1, 200):
            build(target, str(i))
            if stop.is_set():
                return

    writer = threading.Thread(target=rebuild)
    writer.start()
    try:
        seen = [contents(target) for _ in range(100)]
    finally:
        stop.set()
        writer.join()
    assert all(len(names) == 1 for names in seen)


def test_a_link_to_an_artifact_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("artifact")
    build(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "artifact") == {"new"}


def test_a_folder_that_cannot_be_written_is_an_error_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot write there"), stage(tmp_path / "file" / "artifact"):
        pass


def test_opening_says_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such folder; make an artifact"):
        open_artifact(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="is a file"):
        read_manifest(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"manifest.json is missing"):
        read_manifest(tmp_path)


def test_free_disk_is_required(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"conversion needs .* GB free"):
        require_disk(tmp_path, 1 << 60, "conversion")


def test_a_path_that_escapes_cannot_be_staged(tmp_path: Path) -> None:
    with stage(tmp_path / "artifact") as staging:
        for path in ("../x", "/x", "a//b", "a\\b", ""):
            with pytest.raises(ArtifactError, match="plain relative path"):
                staging.add(path, b"")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("readable", [True, False])
def test_a_file_of_the_users_inside_an_artifact_is_not_lost(tmp_path: Path, whole: bool, readable: bool) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    (target / "NOTES.txt").write_text("mine")
    if not readable:
        (target / "manifest.json").write_text('{"schema": 999}')
    message = r"NOTES\.txt is not part of the artifact" if readable or whole else "schema 999"
    with pytest.raises(ArtifactError, match=message), stage(target, whole=whole):
        pytest.fail("the build must not begin")
    assert (target / "NOTES.txt").read_text() == "mine"


def test_a_file_put_into_the_artifact_during_a_build_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    with pytest.raises(ArtifactError, match=r"NOTES\.txt is not part of"), stage(target, sync=False) as staging:
        manifest = fill(staging, "new")
        (target / "NOTES.txt").write_text("mine")
        staging.commit(manifest)
    assert (target / "NOTES.txt").read_text() == "mine"


def test_what_appears_at_the_target_during_a_build_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(ArtifactError, match="changed while this was being built"), stage(target, sync=False) as staging:
        manifest = fill(staging, "new")
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        staging.commit(manifest)
    assert (target / "thesis.txt").read_text() == "mine"
