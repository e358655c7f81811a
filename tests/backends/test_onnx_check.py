"""ONNX models that the exporter did not write: refused before onnxruntime sees them, or an error of ours."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import onnx_artifact
from helpers.synthetic import tiny_config, tiny_windowed, write_checkpoint
from onnx import TensorProto, helper
from typer.testing import CliRunner

from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError
from qwen2vl_tc.artifacts.integrity import hash_bytes
from qwen2vl_tc.artifacts.onnx_ops import OPERATORS, RELEASED
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.backends.onnx_check import check_model
from qwen2vl_tc.runtime.models import config_of
from qwen2vl_tc.toolchain.build.onnx import WEIGHTS, OnnxOptions, export_onnx
from qwen2vl_tc.toolchain.cli.main import app

Change = Callable[[Any], object]


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    source = write_checkpoint(folder / "hf", tiny_config(tie_word_embeddings=True), dtype="fp32", tokenizer=True)
    assert run("convert", "--src", source, "--out", folder / "artifact", "--no-sync").exit_code == 0
    export_onnx(folder / "artifact", OnnxOptions("int8", False, 128), sync=False)
    return folder / "artifact"


def altered(artifact: Path, out: Path, change: "Change | bytes", name: str = "text") -> Path:
    """A copy whose model is changed, or has bytes added, and whose hashes are right."""
    shutil.copytree(artifact, out)
    path = out / f"graphs/onnx/{name}.onnx"
    if isinstance(change, bytes):
        path.write_bytes(path.read_bytes() + change)
    else:
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())
    manifest = json.loads((out / "manifest.json").read_text())
    (entry,) = [each["model"] for each in manifest["onnx"]["graphs"] if each["name"] == name]
    entry.update(bytes=path.stat().st_size, hash=hash_bytes(path.read_bytes()))
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def node(model: Any, op: str) -> Any:
    return next(each for each in model.graph.node if each.op_type == op)


def tensor(model: Any, end: str) -> Any:
    return next(each for each in model.graph.initializer if each.name.endswith(end))


def made(model: Any, output: str) -> Any:
    return next(each for each in model.graph.node if output in each.output)


def integers(name: str, *values: int) -> Any:
    return onnx.numpy_helper.from_array(np.array(values, np.int64), name)


def place(model: Any, key: str, value: str) -> None:
    stored = next(each for each in model.graph.initializer if each.external_data)
    next(entry for entry in stored.external_data if entry.key == key).value = value


def attribute(op: str, name: str, value: Any) -> Change:
    def change(model: Any) -> None:
        found = node(model, op)
        kept = [each for each in found.attribute if each.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def _renamed(model: Any) -> None:
    node(model, "ReduceSum").output[0] = node(model, "Mul").output[0]


def _cycle(model: Any) -> None:
    first, last = node(model, "Mul"), model.graph.node[-1]
    first.input[0] = last.output[0]


def _swapped_scales(model: Any) -> None:
    products = [each for each in model.graph.node if each.op_type == "MatMulNBits"]
    products[0].input[2] = products[-1].input[2]


def _second_opset(model: Any) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))


def _input_of(dtype: int) -> Change:
    return lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", dtype)


_BODY = helper.make_graph([], "body", [], [])
REFUSED: dict[str, tuple["Change | bytes", str]] = {
    "a loop": (lambda m: m.graph.node.append(helper.make_node("Loop", ["", ""], ["x"], body=_BODY)), "subgraphs"),
    "a branch": (
        lambda m: m.graph.node.append(helper.make_node("If", ["last"], ["x"], then_branch=_BODY, else_branch=_BODY)),
        "subgraphs",
    ),
    "a scan without a body": (lambda m: m.graph.node.append(helper.make_node("Scan", ["last"], ["x"])), "Scan .*no op"),
    "a function": (lambda m: m.functions.add(name="f", domain="x"), "functions"),
    "a sparse tensor": (lambda m: m.graph.sparse_initializer.add(), "sparse"),
    "training": (lambda m: m.training_info.add(), "fields that no model"),
    "an unknown field": (b"\xfa\x07\x01x", "fields that no model"),
    "bytes that are no message": (b"\xff", "not an ONNX model"),
    "other operators": (_second_opset, "uses the operators of 'ai.onnx.ml'"),
    "another domain": (lambda m: setattr(node(m, "Mul"), "domain", "ai.onnx.ml"), "no operator of ai.onnx.ml"),
    "an operator that fills memory": (
        lambda m: m.graph.node.append(helper.make_node("ConstantOfShape", ["last"], ["x"])),
        "ConstantOfShape .*no operator of the standard",
    ),
    "too many inputs": (lambda m: node(m, "ArgMax").input.append("last"), "ArgMax .*has 2 inputs"),
    "an unknown attribute": (attribute("ArgMax", "select_last_index", 1), "attribute 'select_last_index'"),
    "a tensor as attribute": (attribute("Cast", "value", helper.make_tensor("t", 1, [1], [1.0])), "fields that no"),
    "an axis out of range": (attribute("ArgMax", "axis", 7), "axis is 7, expected"),
    "an infinite epsilon": (attribute("RMSNormalization", "epsilon", float("inf")), "epsilon is inf"),
    "an epsilon that is no number": (attribute("RMSNormalization", "epsilon", float("nan")), "epsilon is nan"),
    "a float for an integer": (attribute("ArgMax", "axis", -1.0), "'axis', which it may not have like that"),
    "more heads": (attribute("GroupQueryAttention", "num_heads", 64), "num_heads.*64.* and the model \\[2, 4\\] heads"),
    "a larger K": (attribute("MatMulNBits", "K", 1 << 20), "does not fit its weight"),
    "a larger N": (attribute("MatMulNBits", "N", 1 << 20), "does not fit its weight"),
    "other bits": (attribute("MatMulNBits", "bits", 4), "does not fit its weight"),
    "another block": (attribute("MatMulNBits", "block_size", 16), "does not fit its weight"),
    "scales of another weight": (_swapped_scales, "does not fit its weight"),
    "text for an integer": (attribute("ArgMax", "axis", "last"), "'axis', which it may not have like that"),
    "another length of the cache": (
        lambda m: node(m, "GroupQueryAttention").input.__setitem__(5, "longest.int32"),
        "takes",
    ),
    "a length that is no length": (
        lambda m: made(m, "last_position").input.__setitem__(0, "token_ids"),
        "reads .*token_ids",
    ),
    "a length of another sum": (
        lambda m: tensor(m, "one_int").CopyFrom(integers("one_int", -9)),
        "another number|shape",
    ),
    "a cycle": (_cycle, "which nothing before it makes"),
    "a value made twice": (_renamed, "two values are called"),
    "a tensor twice": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two tensors are called"),
    "a tensor with an input's name": (
        lambda m: m.graph.initializer.append(integers("last", 0)),
        "two values are called 'last'",
    ),
    "another file": (lambda m: place(m, "location", "../../../etc/passwd"), "reads '../../../etc/passwd'"),
    "an offset behind the file": (lambda m: place(m, "offset", "4294967296"), "in a file of"),
    "a negative offset": (lambda m: place(m, "offset", "-4096"), "at '-4096'"),
    "another length": (lambda m: place(m, "length", "1"), "'1' bytes"),
    "a huge tensor": (lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 62), "shape"),
    "a negative size": (lambda m: tensor(m, "scales").dims.__setitem__(0, -1), "shape"),
    "a tensor of another shape": (lambda m: tensor(m, "layernorm.weight").dims.append(1), "that of the model"),
    "a tensor of no parameter": (lambda m: setattr(tensor(m, "norm.weight"), "name", "mine"), "belongs to no|nothing"),
    "a table of integers": (
        lambda m: setattr(tensor(m, "constants.text_rope_axes.0.0.8"), "data_type", 7),
        "shape|bytes|belongs",
    ),
    "a constant of another size": (
        lambda m: tensor(m, "ints.0.-1").CopyFrom(integers("ints.0.-1", -1, 1 << 40)),
        "larger than any size",
    ),
    "an unknown type": (lambda m: setattr(tensor(m, "ints.0.-1"), "data_type", 8), "of type 8"),
    "another input": (_input_of(TensorProto.FLOAT), "inputs: the model has token_ids fp32"),
    "no output": (lambda m: m.graph.output.pop(), "outputs: the model has nothing"),
    "an output too many": (lambda m: m.graph.output.append(m.graph.input[0]), "outputs: the model has token_ids"),
    "thousands of operators": (
        lambda m: m.graph.node.extend(helper.make_node("Abs", ["rope.cos"], [f"x{i}"]) for i in range(5000)),
        "operators for 2 layers",
    ),
    "more axes than the model has": (
        lambda m: m.graph.node.extend(
            helper.make_node("Unsqueeze", ["rope.cos", "column"], [f"x{i}"]) for i in range(9)
        ),
        "more than 2 of these",
    ),
    "a table that is no tensor": (lambda m: node(m, "Gather").input.__setitem__(0, "image_embeds"), "no matrix of the"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_the_exporter_does_not_write_is_refused(
    change: "Change | bytes", said: str, artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=rf"text\.onnx: .*{said}.*compile"):
        load(altered(artifact, tmp_path / "artifact", change))


def _mask(name: str) -> Change:
    return lambda model: node(model, "MultiHeadAttention").input.__setitem__(4, name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_mask("window_lengths"), "takes 'window_lengths' for 'window_lengths.int32'"),
        (_mask("keys"), "takes 'keys' for"),
        (lambda m: made(m, "window_lengths.int32").input.__setitem__(0, "keys"), "reads .*keys"),
        (
            lambda m: m.graph.node.extend(
                helper.make_node("Gather", ["rope.cos", "keys"], [f"x{i}"], axis=0) for i in range(17)
            ),
            "more than 16 of these",
        ),
    ],
    ids=["lengths in int64", "keys for lengths", "keys cast to lengths", "gathers without end"],
)
def test_lengths_are_those_that_the_caller_gives(change: Change, said: str, build: Any, tmp_path: Path) -> None:
    _, artifact = build("onnx_windows", tiny_windowed(tie_word_embeddings=True))
    copy = onnx_artifact.exported(artifact, tmp_path / "made", OnnxOptions("int8", False, 64))
    with pytest.raises(ArtifactError, match=rf"visual\.onnx: .*{said}.*compile"):
        load(altered(copy, tmp_path / "artifact", change, "visual"))


def test_every_form_that_is_exported_passes_and_uses_no_other_operators(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    # traced once, and not for each of them
    assert run("compile", copy).exit_code == 0
    used: set[tuple[str, str]] = set()
    for weights in WEIGHTS:
        for standard in (False, True):
            part = export_onnx(copy, OnnxOptions(weights, standard, 64), sync=False).onnx
            assert part
            for graph in part.graphs:
                data = (copy / graph.model.path).read_bytes()
                check_model(data, graph, config_of(read_manifest(copy)), standard, graph.name)
                used |= {(each.domain, each.op_type) for each in onnx.ModelProto.FromString(data).graph.node}
    assert used == set(OPERATORS) - RELEASED


def test_a_standard_model_may_not_have_other_operators(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest.onnx
    graph = next(each for each in manifest.onnx.graphs if each.name == "visual")
    with pytest.raises(ArtifactError, match=r"uses the operators of 'com\.microsoft'"):
        check_model((artifact / graph.model.path).read_bytes(), graph, config_of(manifest), True, "visual")


def test_a_model_that_fails_while_it_runs_is_an_error_of_ours(artifact: Path, tmp_path: Path) -> None:
    def swap(model: Any) -> None:
        # the first row behind the last one
        rows = [each for each in model.graph.node if each.op_type == "Gather" and each.attribute]
        rows[0].input[1] = "kv_lengths"

    copy = altered(artifact, tmp_path / "text", swap)
    result = run("generate", copy, "--prompt", "a", "--max-new-tokens", "2")
    assert result.exit_code == 2
    assert re.search(r"text: the text model fails on \d+ token\(s\) of 1 row\(s\): .*compile the", result.stderr)


class _Session:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def run_with_iobinding(self, binding: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [MemoryError("std::bad_alloc"), RuntimeError("bad allocation"), ValueError("Failed to allocate memory")]
)
def test_memory_that_runs_out_in_mid_run_is_not_the_artifact_s_fault(
    error: Exception, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(artifact)
    session: Any = model.backend._text  # type: ignore[attr-defined]
    monkeypatch.setattr(
        model.backend, "_text", type("", (_Session,), {"io_binding": lambda self: session.io_binding()})(error)
    )
    with pytest.raises(TargetError, match="not enough memory"):
        model.generate("a", max_new_tokens=1)


def test_a_folder_whose_name_is_not_utf_8_is_no_matter(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, os.fsdecode(bytes(tmp_path) + b"/caf\xe9")))
    assert load(copy).generate("a", max_new_tokens=1).token_ids
