"""The layout's rules, read off the source: which way imports go, what is packaged, what untrusted files can reach."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "artifacts": {"artifacts"},
    "runtime": {"runtime", "artifacts"},
    "exporters": {"exporters", "runtime", "artifacts"},
    "toolchain": {"toolchain", "exporters", "runtime", "artifacts"},
}
SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
ENGINES = {"torch", "torch_npu", "torchair", "transformers"}


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Every module that `path` imports, by its full name; our own ones start with a folder's name."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level]
            # `from .. import runtime` reaches above the folders
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*base, name]) for name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def run_at_import(tree: ast.Module) -> ast.Module:
    """The module without its functions' bodies and without what only a type checker reads."""

    class Outer(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return None
            return self.generic_visit(node)

    result: ast.Module = Outer().visit(tree)
    return result


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_downwards_only(path: Path) -> None:
    allowed = MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    reached = {module.split(".")[0] for module in imports(path, parse(path))}
    assert reached & set(MAY_IMPORT) <= allowed
    assert "qwen2vl_tc" not in reached, "inside the package, imports are relative"


@pytest.mark.parametrize("path", sorted((ROOT / "artifacts").rglob("*.py")), ids=name)
def test_the_artifact_needs_the_standard_library_and_the_hash_only(path: Path) -> None:
    tree = run_at_import(parse(path)) if path.name == "signing.py" else parse(path)
    reached = {module.split(".")[0] for module in imports(path, tree)}
    # ge/ reads protobuf
    extra = {"google"} if "ge" in path.parts else set()
    assert reached <= set(sys.stdlib_module_names) | {"artifacts", "blake3"} | extra


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").rglob("*.py")), ids=name)
def test_the_runtime_imports_torch_with_its_backends_only_and_transformers_nowhere(path: Path) -> None:
    tree = parse(path)
    assert "transformers" not in {module.split(".")[0] for module in imports(path, tree)}
    # an operator's kernel and a dtype's object import it when they are asked for
    if "backends" not in path.parts:
        assert not {module.split(".")[0] for module in imports(path, run_at_import(tree))} & ENGINES


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_vendor_packages_are_imported_where_they_are_used(path: Path) -> None:
    # without CANN they can be imported only after the device is opened
    reached = {module.split(".")[0] for module in imports(path, run_at_import(parse(path)))}
    assert not reached & {"torch_npu", "torchair", "transformers"}


@pytest.mark.parametrize("path", sorted((ROOT / "toolchain").rglob("*.py")), ids=name)
def test_the_command_line_is_on_top_and_nothing_that_works_imports_it(path: Path) -> None:
    if "cli" not in path.parts and path.name != "__main__.py":
        assert not [module for module in imports(path, parse(path)) if module.startswith("toolchain.cli")]


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, set()).add(name(path))
    shared = {each: sorted(where) for each, where in places.items() if len(where) > 1}
    assert shared == {}


UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "np.load",
    "numpy.load",
}


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                yield f"{node.func.value.id}.{node.func.attr}"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("artifacts", "runtime")], ids=name
)
def test_whatever_reads_an_artifact_cannot_run_code_from_it(path: Path) -> None:
    tree = parse(path)
    assert not {module.split(".")[0] for module in imports(path, tree)} & UNSAFE_MODULES
    assert not set(calls(tree)) & UNSAFE_CALLS


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in SOURCES}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    names = {"qwen2vl_tc." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names | {"qwen2vl_tc"} == set(settings["packages"]), "a package that is not listed is not in the wheel"
    mapped = {f"qwen2vl_tc.{folder}": folder for folder in MAY_IMPORT}
    assert settings["package-dir"] == {"qwen2vl_tc": "package", **mapped}


def test_the_type_checker_sees_every_folder() -> None:
    links = {link.name: link.resolve() for link in (ROOT / ".typing" / "qwen2vl_tc").iterdir()}
    own = ("__init__.py", "__main__.py", "py.typed")
    assert links == {folder: ROOT / folder for folder in MAY_IMPORT} | {name: ROOT / "package" / name for name in own}


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_pinned_versions_satisfy_what_the_package_asks_for(python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for group in project["optional-dependencies"].values() for each in group]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    here = {"python_version": python, "platform_machine": "x86_64"}
    pinned = {canonicalize_name(pin.name): pin for pin in pins if not pin.marker or pin.marker.evaluate(here)}
    for each in map(Requirement, [*project["dependencies"], *extras]):
        pin = pinned.get(canonicalize_name(each.name))
        if pin and (not each.marker or each.marker.evaluate(here)):
            assert all(each.specifier.contains(one.version) for one in pin.specifier), f"{each}, pinned {pin}"


def test_the_readme_holds_no_placeholder_and_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    variables = {"EXE_MODE", "TORCH_DEVICE_BACKEND_AUTOLOAD", "TORCH_INDEX"}
    assert set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)) == variables
    named = re.findall(r"(?:benchmarks|tests|docs|artifacts)/[\w/]+\.(?:py|md)", text)
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
