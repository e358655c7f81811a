"""`demo` takes a newcomer the whole way in one command, with nothing but what it makes itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qwen2vl_tc.artifacts.errors import TargetError, ToolchainError
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.toolchain.build import build
from qwen2vl_tc.toolchain.demo import demo
from qwen2vl_tc.toolchain.demo.pictures import kept_from_training

from .conftest import Run


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the stdout of `qwen2vl-tc demo`, run as a user does."""
    here = tmp_path_factory.mktemp("demo")
    script = Path(sys.executable).parent / "qwen2vl-tc"
    done = subprocess.run([script, "demo"], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return here / demo.DEFAULT_FOLDER, done.stdout


def test_it_builds_a_verified_artifact_from_a_checkpoint_and_a_picture(shown: tuple[Path, str]) -> None:
    folder, _ = shown
    with open_artifact(folder / demo.ARTIFACT) as artifact:
        artifact.check_all()
        assert artifact.manifest.verification == "passed"
    assert (folder / demo.CHECKPOINT / "model.safetensors").is_file()
    with Image.open(folder / demo.PICTURE) as picture:
        assert (picture.format, picture.size) == ("PNG", (224, 224))
    assert (folder / ".gitignore").read_text().splitlines()[-1] == "*", "git ignores all of it"


def test_the_commands_that_it_shows_work_as_they_stand(
    shown: tuple[Path, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    folder, text = shown
    commands = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ ")]
    assert [words[1] for words in commands] == ["build", "generate", "inspect"]
    monkeypatch.chdir(folder.parent)
    answer = run(*commands[1][1:])
    assert answer.exit_code == 0
    assert answer.stdout in text
    assert run(*commands[2][1:]).exit_code == 0


def test_it_describes_its_picture_rightly_and_says_so(shown: tuple[Path, str]) -> None:
    right = "A red circle at the top left, a blue square at the top right, a yellow triangle at the bottom right."
    assert f"\n{right}\nThe picture shows just that.\n" in shown[1]


def test_its_picture_was_never_trained_on() -> None:
    assert all(kept_from_training(thing) for thing in demo.SCENE.things)


def test_its_summary_says_what_was_real_what_was_measured_and_what_is_next(shown: tuple[Path, str]) -> None:
    summary = shown[1].partition("\nSummary\n")[2]
    for said in (
        *("coloured shapes", "GE graphs", "transformers", "largest error", "per layer", "recipe at 7B"),
        *(str(demo.DEFAULT_FOLDER), "qwen2vl-tc build --src"),
    ):
        assert said in summary


def test_it_runs_again_over_an_earlier_demo_and_over_nothing_else(tmp_path: Path) -> None:
    demo.prepare(tmp_path / "demo")
    demo.prepare(tmp_path / "demo")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    # another .gitignore, in another encoding
    for ignored in (None, b"\xff\xfe*"):
        if ignored:
            (tmp_path / "mine" / ".gitignore").write_bytes(ignored)
        with pytest.raises(ToolchainError, match="holds something else than a demo"):
            demo.prepare(tmp_path / "mine")


def test_no_keep_deletes_what_it_made_and_nothing_that_a_user_added(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise TargetError("no compiler")

    monkeypatch.setattr(build, "build", refuse)
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--no-keep")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: no compiler"
    assert not out.exists()
    run("demo", "--out", out, "--keep")
    assert json.loads((out / demo.CHECKPOINT / "config.json").read_text())["model_type"] == "qwen2_vl"
    (out / "mine.txt").touch()
    run("demo", "--out", out, "--no-keep")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
