"""What a user installs: wheel and sdist hold every file, under one import package, and work without the source tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from email.message import Message
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("artifacts", "runtime", "exporters", "toolchain")
# what is in the source distribution beside the code
BESIDE = (".ci", "benchmarks", "docs", "tests")
FILES = ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "RELIABILITY.md", "constraints.txt", "pyproject.toml")
TOP = {"__init__.py", "__main__.py", "py.typed"}
# setuptools rewrites sys.argv while it works
BUILD = """
import sys, setuptools.build_meta as backend
out = sys.argv[1]
backend.build_wheel(out)
backend.build_sdist(out)
"""


def files_in(folders: Iterable[str]) -> set[str]:
    files = (p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def package_files() -> set[str]:
    return files_in(FOLDERS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy: setuptools leaves its work beside the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in (*FOLDERS, *BESIDE, "package"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, source)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True)
    return out


def test_the_wheel_holds_every_file_and_nothing_at_top_level(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"qwen2vl_tc/{file}" for file in package_files() | TOP}
    assert {f"qwen2vl_tc/{folder}/py.typed" for folder in FOLDERS} <= names
    assert "qwen2vl_tc/exporters/torchair/cann_stubs/stubs.c" in names


def test_the_sdist_holds_every_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {*package_files(), *files_in((*BESIDE, "package")), *FILES} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def metadata(built: Path) -> Message:
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(archive.read(name))


def test_the_metadata_says_whose_it_is_and_under_which_licence(built: Path) -> None:
    found = metadata(built)
    assert found["License-Expression"] == "Apache-2.0"
    assert found.get_all("License-File") == ["LICENSE"]
    assert "qwen2vl-tc contributors" in found["Author"]
    assert found["Keywords"] and "Typing :: Typed" in found.get_all("Classifier", [])
    text = (ROOT / "LICENSE").read_text(encoding="ascii")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_package_knows_its_version(built: Path) -> None:
    import qwen2vl_tc

    assert qwen2vl_tc.__version__ == metadata(built)["Version"] == version("qwen2vl-tc")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qwen2vl_tc.nothing
    done = subprocess.run([sys.executable, "-m", "qwen2vl_tc", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qwen2vl-tc {version('qwen2vl-tc')}\n"


def test_the_source_distribution_installs_and_runs(built: Path, tmp_path: Path) -> None:
    """Its own dependencies stay those of this environment: only the package itself is new."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    # pip itself, setuptools and all that is imported: links to what is here, but none to this source tree
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "here.pth").write_text("\n".join(paths))
    words = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    words += ["--ignore-installed", "--disable-pip-version-check", source]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(words, check=True, capture_output=True, cwd=tmp_path, env=environment)
    script = (
        "import qwen2vl_tc; from qwen2vl_tc.runtime import load; print(qwen2vl_tc.__file__, qwen2vl_tc.__version__)"
    )
    found = subprocess.run(
        [python, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert found.stdout == f"{site}/qwen2vl_tc/__init__.py {version('qwen2vl-tc')}\n"
    for words in ([home / "bin" / "qwen2vl-tc"], [python, "-m", "qwen2vl_tc"]):
        done = subprocess.run(
            [*words, "--version"], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.stdout == f"qwen2vl-tc {version('qwen2vl-tc')}\n"


def test_an_installed_wheel_imports_without_the_source_tree(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    modules = sorted(
        "qwen2vl_tc." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in package_files()
        if file.endswith(".py") and file.startswith(("artifacts/", "exporters/torchair/cann_stubs"))
    )
    script = f"""
import importlib, importlib.util, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
for name in {modules!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
from qwen2vl_tc.exporters.torchair.cann_stubs.build import HERE
assert (HERE / "stubs.c").is_file()
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
