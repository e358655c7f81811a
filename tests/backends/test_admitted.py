"""The NPU backend and CANN's version: what the manifest admits, what is newer than the rules, what is refused."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.emulated_npu import emulated_npu
from helpers.released import unpack
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.cann import CannWarning, cann_release, is_newer
from qwen2vl_tc.artifacts.errors import TargetError
from qwen2vl_tc.artifacts.store import Artifact, open_artifact
from qwen2vl_tc.runtime.backends import npu


@pytest.fixture(scope="module")
def path(build: Any) -> Path:
    _, path = build("admitted", tiny_config(), dtype="bf16", max_length=256)
    assert isinstance(path, Path)
    return path


class Placed(Exception):
    """Raised where the backend would take device memory."""


@pytest.fixture
def start(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """start(cann, admitted): the backend on a device whose CANN says so, up to where it takes memory."""

    def place(*arguments: Any) -> None:
        raise Placed

    def run(cann: str | None, admitted: tuple[str, ...] | None) -> None:
        artifact = open_artifact(path)
        part = artifact.manifest.ge
        assert part is not None
        manifest = dataclasses.replace(artifact.manifest, ge=dataclasses.replace(part, admitted=admitted))
        vendor = npu.vendor_modules()
        with monkeypatch.context() as patch:
            patch.setattr(npu.NpuBackend, "place", place)
            if cann is not None:
                patch.setattr(npu, "emulated", lambda: False)
                patch.setattr(npu, "missing_operators", lambda part: {})
                patch.setattr(vendor.npu.utils, "get_cann_version", lambda *module: cann)
            npu.NpuBackend(Artifact(artifact.path, manifest, artifact.manifest_hash, artifact._files))

    with emulated_npu(monkeypatch, tmp_path):
        yield run


@pytest.mark.parametrize("cann", ["8.5.0", "9.0.RC1", "9.0.0", "8.5.0.alpha002"])
def test_an_admitted_release_is_taken_without_a_word(start: Any, cann: str) -> None:
    with warnings.catch_warnings(), pytest.raises(Placed):
        warnings.simplefilter("error", CannWarning)
        start(cann, ("8.5", "9.0"))


@pytest.mark.parametrize("cann", ["8.1.RC1", "8.3.0", "9.1.0", "7.0.0"])
def test_a_release_that_is_not_admitted_is_refused_by_name_before_memory_is_taken(start: Any, cann: str) -> None:
    with pytest.raises(TargetError, match=rf"CANN {re.escape(cann)} does not admit its graphs, admitted by: 8.5, 9.0"):
        start(cann, ("8.5", "9.0"))


def test_graphs_that_no_release_admits_are_refused(start: Any) -> None:
    with pytest.raises(TargetError, match=r"CANN 9.1.0 does not admit its graphs, admitted by: none"):
        start("9.1.0", ())


@pytest.mark.parametrize("cann", ["9.2.0", "9.10.0", "10.0.RC1"])
def test_a_release_newer_than_the_rules_passes_with_one_line(start: Any, cann: str) -> None:
    with pytest.warns(CannWarning, match=f"CANN {cann} is newer than the rules") as said, pytest.raises(Placed):
        start(cann, ("9.0", "9.1"))
    (warning,) = (each for each in said if issubclass(each.category, CannWarning))
    assert "\n" not in str(warning.message)


@pytest.mark.parametrize("cann", ["", "unknown"])
def test_a_cann_that_does_not_say_its_version_is_refused(start: Any, cann: str) -> None:
    with pytest.raises(TargetError, match="CANN reports the version"):
        start(cann, ("9.0", "9.1"))


@pytest.mark.parametrize("cann", [None, "9.1.0"])
def test_graphs_of_an_earlier_schema_are_refused_by_name(start: Any, cann: str | None) -> None:
    with pytest.raises(TargetError, match=r"an earlier release of qwen2vl-tc compiled its graphs.* compile .* again"):
        start(cann, None)


@pytest.mark.parametrize("schema", [1, 2])
def test_a_released_schemas_graphs_are_refused_on_an_npu(
    schema: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = open_artifact(unpack(tmp_path / "a", schema))
    with emulated_npu(monkeypatch, tmp_path), pytest.raises(TargetError, match="compiled its graphs"):
        npu.NpuBackend(artifact)


def test_the_emulated_device_has_no_cann_to_ask(start: Any) -> None:
    with pytest.raises(Placed):
        start(None, ())


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("8.5.0", "8.5"),
        ("9.0.RC1", "9.0"),
        ("V9.0.0-beta.2", "9.0"),
        (" 8.1.RC1.alpha001\n", "8.1"),
        ("CANN-9.1", "9.1"),
        ("10.0.0", "10.0"),
        ("9", None),
        ("", None),
        ("none", None),
    ],
)
def test_a_version_belongs_to_a_release(version: str, expected: str | None) -> None:
    assert cann_release(version) == expected


def test_releases_are_compared_as_numbers() -> None:
    assert is_newer("9.10") and is_newer("10.0") and is_newer("9.2")
    assert not is_newer("9.1") and not is_newer("8.5") and not is_newer("7.9")
