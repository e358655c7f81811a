"""What the pages say can be looked up: files that they name exist, figures have a command, a machine and a date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "RELIABILITY.md",
    ROOT / "artifacts" / "FORMAT.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
MEASURED = ROOT / "docs" / "MEASURED.md"
SKIPPED = {".venv", ".git", "build"}
# what follows a colon is of another commit, `git show <commit>:<path>`; a placeholder is <family>.py
PATH = re.compile(
    r"(?<![\w/.:<-])(?:artifacts|benchmarks|docs|exporters|package|runtime|scripts|tests|toolchain)/[\w./-]*\w/?(?![\w<])"
)
PYTHON_FILE = re.compile(r"(?<![\w/.:<-])\w+\.py\b")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_names_only_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    scripts = {path.name for path in ROOT.rglob("*.py") if not SKIPPED & set(path.relative_to(ROOT).parts)}
    assert not set(PYTHON_FILE.findall(text)) - scripts


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_links_to_pages_and_headings_that_exist(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.is_file(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor[1:] in {"-".join(re.findall(r"[\w-]+", each.lower())) for each in headings}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def rows(page: Path) -> list[dict[str, str]]:
    """The rows of all tables of a page, each by the names of its columns."""
    found, columns = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = [cell.strip() for cell in line.strip("|").split("|")]
        elif set(line) - set("|- "):
            found.append(dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return found


@pytest.mark.parametrize("row", rows(MEASURED), ids=lambda row: " ".join(row.values())[:50])
def test_a_figure_has_a_command_a_machine_and_a_date(row: dict[str, str]) -> None:
    assert all(row[column] for column in row if column)
    commands = re.findall(r"`([^`]+)`", row["command"])
    known = r"(?:/usr/bin/time -v )?(?:python|pytest|make|qwen2vl-tc|git show) "
    assert row["command"] == "the same" or commands
    assert all(re.match(known, f"{command} ") for command in commands)
    machine, _, _ = row["machine, date"].partition(",")
    assert machine in ("any", "1 core") or machine.startswith("2 cores")
    assert DATE.search(row["machine, date"])


def test_measure_lists_the_rows_that_are_said_to_be_its_own() -> None:
    command = (sys.executable, ROOT / "benchmarks" / "measure.py", "--list")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = {name: command for name, _, command in (line.split("\t") for line in done.stdout.splitlines())}
    stated = {row[""].strip("`"): row["command"].strip("`") for row in rows(MEASURED) if "" in row}
    assert stated == listed
    assert {speed for _, speed, _ in (line.split("\t") for line in done.stdout.splitlines())} == {"quick", "slow"}


def test_measure_refuses_a_figure_that_there_is_not() -> None:
    command = (sys.executable, ROOT / "benchmarks" / "measure.py", "speed_on_an_npu")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "speed_on_an_npu: there are operators" in done.stderr
