"""Artifacts of other versions: old ones keep loading, and each other difference has an answer of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.released import ANSWERS, REQUESTS, requests, unpack

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.runtime import load


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return unpack(tmp_path / "artifact")


def edit(artifact: Path, **fields: Any) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**manifest, **fields}))


@pytest.mark.parametrize("schema", sorted(ANSWERS))
def test_an_artifact_of_each_released_schema_still_gives_the_tokens_it_gave_when_it_was_built(
    tmp_path: Path, schema: int
) -> None:
    artifact = unpack(tmp_path / "released", schema)
    assert json.loads((artifact / "manifest.json").read_text())["schema"] == schema
    with open_artifact(artifact) as opened:
        opened.check_all()
    model = load(artifact, "reference")
    for messages, pictures, tokens in requests(schema):
        assert model.generate(messages, pictures, max_new_tokens=len(tokens)).token_ids == tokens


def test_onnx_models_of_a_released_version_still_give_the_tokens_they_gave(tmp_path: Path) -> None:
    model = load(unpack(tmp_path / "released", "3-onnx"), "onnxruntime")
    for messages, pictures, tokens in requests(2):
        assert model.generate(messages, pictures, max_new_tokens=len(tokens)).token_ids == tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 1000}, r"manifest\.json: schema 1000, this version reads .*; update qwen2vl-tc"),
        ({"schema": 0}, r"manifest\.json: schema 0, this version reads .*; rebuild with `qwen2vl-tc build`"),
        ({"schema": "1"}, "no integer field `schema`; not an artifact of qwen2vl-tc"),
        ({"surprise": 1}, r"manifest\.json: unknown field surprise"),
        ({"hash": "md5"}, "hash 'md5', expected 'blake3'"),
    ],
)
def test_another_version_is_refused_with_what_to_do(artifact: Path, fields: dict[str, Any], message: str) -> None:
    edit(artifact, **fields)
    with pytest.raises(ArtifactError, match=message):
        load(artifact)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operators": "foo"}, r"ge\.operators is 'foo', expected one of fused, recipe"),
        ({"visual_attention": "foo"}, r"ge\.visual_attention is 'foo', expected one of segments, tnd, masked"),
        ({"visual_attention": "masked", "admitted": []}, r"ge\.visual_attention is 'masked', expected one of"),
        ({"visual_attention": "tnd", "admitted": ["9.0", "banana"]}, r"ge\.admitted has 'banana', expected releases"),
        ({"visual_attention": "tnd", "admitted": ["9.0\n"]}, r"ge\.admitted has '9\.0\\n', expected releases"),
    ],
)
def test_a_form_or_release_that_no_compile_writes_is_refused(
    artifact: Path, fields: dict[str, Any], message: str
) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    newer = {"schema": 3, "onnx": None, "selftest": None, "weights": {**manifest["weights"], "bias_dtype": None}}
    edit(artifact, **newer, ge={**manifest["ge"], "admitted": None, **fields})
    with pytest.raises(ArtifactError, match=message):
        load(artifact)


def test_a_missing_field_is_named(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["verification"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest\.json: missing field verification"):
        load(artifact)


def test_graphs_of_another_torch_npu_run_on_cpu_where_no_torch_npu_is_asked(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["ge"]["versions"] |= {"torch-npu": "2.99.0", "torch": "2.99.0"}
    edit(artifact, ge=manifest["ge"])
    messages, pictures, tokens = REQUESTS[1]
    model = load(artifact, "reference")
    assert model.generate(messages, pictures, max_new_tokens=2).token_ids == tokens[:2]
