"""What a user installs: wheel and sdist hold every file, under one import package, and work without the source tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("artifacts", "runtime", "exporters", "toolchain")
# setuptools rewrites sys.argv while it works
BUILD = """
import sys, setuptools.build_meta as backend
out = sys.argv[1]
backend.build_wheel(out)
backend.build_sdist(out)
"""


def package_files() -> set[str]:
    files = (
        p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    )
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy: setuptools leaves its work beside the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True)
    return out


def test_the_wheel_holds_every_file_and_nothing_at_top_level(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"qwen2vl_tc/{file}" for file in package_files()}
    assert "qwen2vl_tc/exporters/torchair/cann_stubs/stubs.c" in names


def test_the_sdist_holds_every_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert package_files() | {"pyproject.toml", "README.md"} <= names


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
