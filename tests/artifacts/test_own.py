"""In a folder that others write to, nothing that they left beside an artifact is followed, resumed from or deleted;
and an artifact that cannot be deleted is not replaced."""

import dataclasses
import os
from pathlib import Path

import pytest
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts import own
from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError
from qwen2vl_tc.artifacts.manifest import Manifest, empty_manifest
from qwen2vl_tc.artifacts.own import own_cache, own_folder
from qwen2vl_tc.artifacts.staging import stage
from qwen2vl_tc.artifacts.store import open_artifact, read_manifest
from qwen2vl_tc.runtime.models import config_from_hf, to_plain
from qwen2vl_tc.toolchain.demo.demo import prepare

BESIDE = (".a.staging", ".a.resume", ".a.old", ".a.lock")


def build(target: Path, name: str = "made") -> Manifest:
    with stage(target, sync=False) as staging:
        manifest = empty_manifest(name, to_plain(config_from_hf(tiny_config())))
        manifest = dataclasses.replace(manifest, processor=(staging.add("processor/file", b"data"),))
        staging.commit(manifest)
    return manifest


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared" / "a"


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("there", [True, False], ids=["an artifact there", "nothing there"])
def test_a_link_beside_the_target_is_refused_and_what_it_leads_to_is_left_alone(
    name: str, there: bool, target: Path, tmp_path: Path
) -> None:
    if there:
        build(target)
    victim = tmp_path / "victim"
    build(victim, "victim")
    beside = target.parent / name
    beside.symlink_to(tmp_path / "victim.lock" if name == ".a.lock" else victim)
    with pytest.raises(TargetError, match=rf"{name}: is a symbolic link.*others could have put it there"):
        build(target, "new")
    assert beside.is_symlink() and not (tmp_path / "victim.lock").exists()
    assert read_manifest(victim).name == "victim"
    with open_artifact(victim) as artifact:
        artifact.check_all()
    assert target.exists() == there


@pytest.mark.parametrize("name", BESIDE[:3])
def test_a_file_where_a_folder_belongs_is_refused(name: str, target: Path) -> None:
    (target.parent / name).touch()
    with pytest.raises(TargetError, match=rf"{name}: is no folder"):
        build(target)


def test_a_pipe_as_lock_is_refused_without_waiting(target: Path) -> None:
    os.mkfifo(target.parent / ".a.lock")
    with pytest.raises(TargetError, match=r"\.a\.lock: is no file"):
        build(target)


def test_a_folder_as_lock_is_refused_by_its_name(target: Path) -> None:
    (target.parent / ".a.lock").mkdir()
    with pytest.raises(TargetError, match=r"\.a\.lock: is no file.*delete it"):
        build(target)


def test_what_belongs_to_another_user_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (target.parent / ".a.lock").touch()
    monkeypatch.setattr(own, "trusted_users", lambda: {os.geteuid() + 1})
    with pytest.raises(TargetError, match=rf"\.a\.lock: belongs to user {os.geteuid()}"):
        build(target)
    with pytest.raises(TargetError, match=rf"shared: belongs to user {os.geteuid()}"):
        own_folder(target.parent)
    target.symlink_to("elsewhere")
    with pytest.raises(TargetError, match=rf"shared/a: belongs to user {os.geteuid()}"):
        build(target)


def test_the_cache_is_not_made_through_links_nor_where_everybody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = own_cache("ge", "key")
    assert made == own_cache("ge", "key") and made.stat().st_mode & 0o777 == 0o700
    made.rmdir()
    made.symlink_to(tmp_path)
    with pytest.raises(TargetError, match="ge/key: is a symbolic link"):
        own_cache("ge", "key")
    made.parent.chmod(0o777)
    with pytest.raises(TargetError, match="cache/qwen2vl-tc/ge: has mode 777"):
        own_cache("ge", "key")


@pytest.mark.parametrize("inside", [False, True])
def test_the_demo_does_not_write_through_a_link(inside: bool, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    folder = tmp_path / "demo"
    if inside:
        folder.mkdir()
        (folder / ".gitignore").write_text("# made by qwen2vl-tc demo\n*\n")
    (folder / "tiny-qwen2-vl" if inside else folder).symlink_to(tmp_path / "victim")
    with pytest.raises(TargetError, match="is a symbolic link"):
        prepare(folder)
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.parametrize("which", [".", "processor"])
def test_a_read_only_artifact_is_refused_before_anything_is_written(which: str, target: Path) -> None:
    build(target)
    before = (target / "manifest.json").read_bytes()
    (target / which).chmod(0o555)
    with pytest.raises(ArtifactError, match=r"is read-only.*chmod -R u\+w"):
        build(target, "new")
    assert (target / "manifest.json").read_bytes() == before
    assert list(target.parent.iterdir()) == [target]
    (target / which).chmod(0o755)
    build(target, "new")
    assert read_manifest(target).name == "new"


def test_an_artifact_that_becomes_read_only_meanwhile_is_not_exchanged(target: Path) -> None:
    build(target)
    with pytest.raises(ArtifactError, match="is read-only"), stage(target, sync=False) as staging:
        manifest = dataclasses.replace(
            empty_manifest("new", to_plain(config_from_hf(tiny_config()))),
            processor=(staging.add("processor/file", b"1"),),
        )
        target.chmod(0o555)
        staging.commit(manifest)
    target.chmod(0o755)
    assert read_manifest(target).name == "made"
    build(target, "new")


def test_an_immutable_file_keeps_its_artifact(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(target)
    monkeypatch.setattr(own, "_is_immutable", lambda name, folder_fd: name == "file")
    with pytest.raises(ArtifactError, match=r"processor/file is immutable.*lsattr -R"):
        build(target, "new")


def test_what_fails_after_the_commit_is_a_warning(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(target)

    def fails(path: Path) -> bool:
        raise OSError(5, "Input/output error", str(path))

    with stage(target, sync=False) as staging:
        manifest = empty_manifest("new", to_plain(config_from_hf(tiny_config())))
        monkeypatch.setattr("qwen2vl_tc.artifacts.staging.own_folder", fails)
        staging.commit(manifest)
        monkeypatch.undo()
    assert read_manifest(target).name == "new"
    assert "is written, but: " in caplog.text
    build(target, "newer")  # deletes what was left


def test_what_a_build_left_is_removed_even_if_it_is_read_only(target: Path) -> None:
    build(target)
    target.rename(target.parent / ".a.staging")
    for folder in (target.parent / ".a.staging/processor", target.parent / ".a.staging"):
        folder.chmod(0o555)
    build(target, "new")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("there", [True, False])
def test_who_builds_into_the_current_folder_stands_in_the_new_artifact(
    there: bool, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target.mkdir()
    if there:
        build(target)
    monkeypatch.chdir(target)
    build(Path("."), "new")
    assert read_manifest(".").name == "new"
    (target / "processor").is_dir()
    monkeypatch.chdir(target / "processor")
    build(Path(".."), "newer")
    assert read_manifest("..").name == "newer"
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: {here}: the current folder was replaced; in a shell, `cd .` before the next command"
        for here in (target, target / "processor")
    ]


def test_in_a_folder_that_is_deleted_a_relative_path_is_refused(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    with pytest.raises(TargetError, match="the current folder is deleted"):
        build(Path("."))
    build(target)
    assert read_manifest(target).name == "made"
