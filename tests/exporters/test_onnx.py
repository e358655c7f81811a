"""The ONNX models as files: what the standard's own tools say of them, and what is in them."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers.synthetic import tiny_config, tiny_windowed, write_checkpoint
from typer.testing import CliRunner

from qwen2vl_tc.artifacts.errors import ArtifactError, MissingDependencyError, TargetError, WeightError
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.exporters.onnx import quantize
from qwen2vl_tc.runtime.models import config_of
from qwen2vl_tc.toolchain.build import onnx as onnx_export
from qwen2vl_tc.toolchain.build.onnx import OnnxOptions, export_onnx
from qwen2vl_tc.toolchain.cli.main import app

LAYERS, BLOCKS = 2, 2
EVERY_FORM = [(weights, standard) for weights in onnx_export.WEIGHTS for standard in (False, True)]

# an embedding of 4.2 million values, the layers have 4.7
WIDE = tiny_config(hidden_size=512, intermediate_size=1024, vocab_size=8192)

Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """traced(config, dtype=...) to an artifact with GE graphs; cached."""
    made: dict[str, Path] = {}

    def make(config: dict[str, Any] | None = None, dtype: str = "bf16") -> Path:
        key = f"{dtype} {config or tiny_config()}"
        if key not in made:
            folder = tmp_path_factory.mktemp("traced")
            source = write_checkpoint(folder / "hf", config or tiny_config(), dtype=dtype, tokenizer=True)
            for words in (["convert", "--src", source, "--no-sync", "--out"], ["compile", "--max-length", "64"]):
                result = CliRunner().invoke(app, [str(word) for word in (*words, folder / "artifact")])
                assert result.exit_code == 0, result.output
            made[key] = folder / "artifact"
        return made[key]

    return make


@pytest.fixture
def convert(tmp_path: Path, traced: Convert) -> Convert:
    """convert(config, dtype=...) to an artifact of the test's own, with GE graphs."""

    def make(config: dict[str, Any] | None = None, dtype: str = "bf16") -> Path:
        out = tmp_path / f"artifact{len(list(tmp_path.iterdir()))}"
        return Path(shutil.copytree(traced(config, dtype), out))

    return make


def models(artifact: Path) -> dict[str, onnx.ModelProto]:
    return {
        name: onnx.load(artifact / f"graphs/onnx/{name}.onnx", load_external_data=False) for name in ("visual", "text")
    }


@pytest.mark.parametrize(
    "config",
    [tiny_config(tie_word_embeddings=True), tiny_config(tie_word_embeddings=False), tiny_windowed()],
    ids=["tied", "untied", "windows"],
)
def test_every_form_passes_the_checker_and_stays_inside_its_operator_set(
    convert: Convert, config: dict[str, Any]
) -> None:
    artifact = convert(config)
    for weights, standard in EVERY_FORM:
        export_onnx(artifact, OnnxOptions(weights, standard, 64), sync=False)
        for name, model in models(artifact).items():
            # by path: that is how external data is checked, too
            onnx.checker.check_model(artifact / f"graphs/onnx/{name}.onnx")
            domains = {each.domain: each.version for each in model.opset_import}
            assert domains[""] == 24
            assert not standard or set(domains) == {""}
            assert {node.domain for node in model.graph.node} <= set(domains)
            names = [node.name for node in model.graph.node]
            assert all(names) and len(set(names)) == len(names)


def test_operators_are_those_of_the_npu_graphs_one_by_one(convert: Convert) -> None:
    artifact = convert()
    export_onnx(artifact, OnnxOptions("int8", False, 64), sync=False)
    text, visual = models(artifact)["text"].graph, models(artifact)["visual"].graph
    ops = Counter(node.op_type for node in text.node)
    # a layer: two norms, four products, one attention over the cache, one rotation each of q and k
    assert ops["RMSNormalization"] == 1 and ops["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
    assert ops["MatMulNBits"] == 4 * LAYERS + 1
    assert ops["GroupQueryAttention"] == LAYERS and ops["RotaryEmbedding"] == 2 * LAYERS
    assert "Transpose" not in ops and "Concat" in ops
    ops = Counter(node.op_type for node in visual.node)
    assert ops["LayerNormalization"] == 1 and ops["SkipLayerNormalization"] == 2 * BLOCKS
    assert ops["MatMulIntegerToFloat"] == 4 * BLOCKS + 2 and ops["Gemm"] == 1
    assert ops["MultiHeadAttention"] == BLOCKS and "Transpose" not in ops
    # without a zero point of their own, onnxruntime aborts or refuses them where it makes weights uint8
    zeros = [node.input[5] for node in visual.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(set(zeros)) == len(zeros)
    values = {each.name: onnx.numpy_helper.to_array(each) for each in visual.initializer if each.name in zeros}
    assert len(values) == len(zeros) and all(each.dtype == np.int8 and each == 0 for each in values.values())
    # products are called as their weights, all else as in the GE graph
    names = {node.name for node in text.node}
    assert {
        "model.layers.1.self_attn.qkv_proj",
        "FusedInferAttentionScore_1",
        "SwiGlu_1",
        "logits",
        "next_token",
    } <= names


def test_windows_have_lengths_and_whole_segments_are_of_one(convert: Convert) -> None:
    artifact = convert(tiny_windowed())
    export_onnx(artifact, OnnxOptions("int8", False, 64), sync=False)
    visual = models(artifact)["visual"].graph
    assert [each.name for each in visual.input] == ["patches", "positions", "keys", "window_lengths"]
    # blocks 1 and 3 attend to the segment: without lengths, which would keep all of its scores in memory
    lengths = [node.input[3:] for node in visual.node if node.op_type == "MultiHeadAttention"]
    assert lengths == [["", "window_lengths.int32"], []] * 2
    # the angles are computed once for both forms
    ops = Counter(node.op_type for node in visual.node)
    assert ops["ReduceSum"] == 2 and ops["RotaryEmbedding"] == 8 and ops["Gather"] == 2 + 2 * 2


def test_two_exports_are_equal_byte_by_byte_and_carry_the_hash_of_what_they_were_made_from(convert: Convert) -> None:
    artifact = convert()
    first = export_onnx(artifact, OnnxOptions("int4", False, 64), sync=False)
    again = export_onnx(artifact, OnnxOptions("int4", False, 64), sync=False)
    assert first == again and first.onnx is not None
    for model in models(artifact).values():
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata == {"manifest_hash": first.onnx.source, "weights": "int4"}
        # wherever the folder is moved to
        external = [entry for each in model.graph.initializer for entry in each.external_data]
        places = {entry.value for entry in external if entry.key == "location"}
        assert places == {f"{model.graph.name}.onnx.data"}


def test_a_tied_embedding_is_stored_once(convert: Convert) -> None:
    sizes = {}
    for tied in (True, False):
        artifact = convert(WIDE | {"tie_word_embeddings": tied})
        part = export_onnx(artifact, OnnxOptions("int8", False, 64), sync=False).onnx
        assert part is not None
        sizes[tied] = next(graph.data.bytes for graph in part.graphs if graph.name == "text")
    assert sizes[False] - sizes[True] == pytest.approx(8192 * 512 * (1 + 4 / 256), rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_the_disk_that_is_asked_for_is_what_the_models_take(convert: Convert, tied: bool) -> None:
    artifact = convert(WIDE | {"tie_word_embeddings": tied})
    for weights, standard in EVERY_FORM:
        part = export_onnx(artifact, OnnxOptions(weights, standard, 64), sync=False).onnx
        assert part is not None
        taken = sum(graph.data.bytes + graph.model.bytes for graph in part.graphs)
        # what is small stands in the models, or begins on a page of its own
        padding = sum(4096 * len(model.graph.initializer) for model in models(artifact).values())
        planned = onnx_export.planned_bytes(config_of(read_manifest(artifact)), weights, standard)
        assert 0.97 * planned < taken < 1.03 * planned + padding, (weights, standard)


def test_other_parts_of_an_artifact_stay_and_new_weights_drop_the_models(build: Any, tmp_path: Path) -> None:
    source, artifact = build("onnx_parts", tiny_config())
    before = read_manifest(artifact)
    after = export_onnx(artifact, OnnxOptions(max_length=64), sync=False)
    assert (after.ge, after.weights, after.processor) == (before.ge, before.weights, before.processor)
    assert read_manifest(artifact) == after
    assert all((artifact / entry.path).stat().st_size == entry.bytes for entry in after.files())
    result = CliRunner().invoke(app, ["convert", "--src", str(source), "--out", str(artifact), "--no-sync"])
    assert result.exit_code == 0, result.output
    assert read_manifest(artifact).onnx is None and not (artifact / "graphs/onnx").exists()


def test_what_cannot_be_exported_says_why(convert: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artifact = convert()

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["compile", str(artifact), "--mode", "onnx", *words])
        assert result.exit_code == 2
        return " ".join(result.stderr.split())

    assert "--weights int3: expected one of int8, int4, fp32, fp16" in said("--weights", "int3")
    assert "--max-length 1: expected 2 to 32768" in said("--max-length", "1")
    assert "nothing else" in said("--batch", "4")
    result = CliRunner().invoke(app, ["compile", str(artifact), "--weights", "int4"])
    assert result.exit_code == 2 and "are for --mode onnx" in result.stderr
    monkeypatch.setattr(onnx_export, "planned_bytes", lambda *what: 1 << 60)
    with pytest.raises(TargetError, match=r"fp32 ONNX needs .* GB free"):
        export_onnx(artifact, OnnxOptions("fp32"))
    assert not (artifact / "graphs/onnx").exists()
    for package, extra in (("onnx", "onnx"), ("torch", "compile")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingDependencyError, match=rf"{package}; pip install 'qwen2vl-tc\[{extra}\]'"):
                export_onnx(artifact, OnnxOptions())


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    from qwen2vl_tc.exporters.onnx.writer import DataFile

    data = DataFile(tmp_path / "text.onnx.data")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, data._fd)
    with pytest.raises(OSError, match=r"No space left.*text\.onnx\.data"):
        data.write([np.ones(8)])
    data.close()
    os.close(full)


def test_values_that_fp16_cannot_hold_are_refused(convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = convert()
    from qwen2vl_tc.exporters.onnx.source import Weights

    chunks = Weights.chunks
    monkeypatch.setattr(
        Weights, "chunks", lambda self, name: ((i, rows * np.float32(1e6)) for i, rows in chunks(self, name))
    )
    with pytest.raises(WeightError, match="holds values that fp16 cannot represent"):
        export_onnx(artifact, OnnxOptions("fp16"))


@pytest.mark.parametrize(("bits", "bound"), [(8, 1 / 254), (4, 1 / 7)])
def test_quantized_blocks_are_as_near_as_their_steps_allow(bits: int, bound: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 96), dtype=np.float32)
    rows[3, 10:20] *= 100
    rows[5] = 0
    q, scale = quantize.quantize_blocks(rows, bits, 32)
    back = ((q.astype(np.float32) - 2 ** (bits - 1)).reshape(6, 3, 32) * scale[..., None]).reshape(6, 96)
    largest = np.repeat(np.abs(rows).reshape(6, 3, 32).max(-1), 32, 1)
    # int4 may cut off a sixth of the largest value where that serves the others
    assert (np.abs(back - rows) <= largest * (bound if bits == 8 else 1 / 6) + 1e-7).all()
    assert (back[5] == 0).all()
    if bits == 4:
        packed = quantize.pack_int4(q)
        assert (packed & 15 == q[:, 0::2]).all() and (packed >> 4 == q[:, 1::2]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [8, 4, "rows"])
@pytest.mark.parametrize("largest", [1e-45, 3e-44, 1e-39, 1.4e-36, 2e-36, 1e-3, 1.0, 1e30], ids="{:.0e}".format)
def test_every_value_becomes_the_nearest_step_of_its_scale_however_small(bits: int | str, largest: float) -> None:
    x = np.random.default_rng(1).uniform(-largest, largest, (8, 64)).astype(np.float32)
    if bits == "rows":
        signed, scale = quantize.quantize_rows(x)
        q, scale, least, most = signed.astype(np.float64), scale[:, None], -127, 127
    else:
        assert isinstance(bits, int)
        middle = 2 ** (bits - 1)
        unsigned, scale = quantize.quantize_blocks(x, bits, 64)
        q, least, most = unsigned.astype(np.float64) - middle, -middle, middle - 1
    # below the normal numbers there is no step to be had: zero, and at most 127 of the smallest normal number is lost
    normal = np.broadcast_to(np.abs(scale) >= np.finfo(np.float32).tiny, x.shape)
    assert (q[~normal] == 0).all() and (normal.all() or largest < 1.5e-36)
    exact = (x.astype(np.float64) / np.where(normal, scale, 1)).clip(least, most)
    # of two neighbours at the same distance, fp32 may choose either
    assert (np.abs(q - exact) <= 0.5 + 1e-4)[normal].all()


MEMORY = """
import sys, resource
from pathlib import Path
from qwen2vl_tc.toolchain.build.onnx import OnnxOptions, export_onnx
import onnx, torch
from qwen2vl_tc.toolchain.models import build
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_onnx(Path(sys.argv[1]), OnnxOptions(sys.argv[2], max_length=64), sync=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_memory_of_an_export_does_not_grow_with_its_tensors(convert: Convert, weights: str) -> None:
    # embedding and output layer of 34 MB each in bf16, 67 MB in fp32
    artifact = convert(tiny_config(vocab_size=262144))
    words = [sys.executable, "-c", MEMORY, str(artifact), weights]
    used = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert used < 40e6


def test_inspect_shows_the_models_and_before_what_they_would_take(convert: Convert) -> None:
    artifact = convert()

    def inspect() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(CliRunner().invoke(app, ["inspect", str(artifact), "--json"]).stdout)
        return found

    planned = inspect()["onnx_planned_bytes"]
    assert inspect()["onnx"] is None
    for weights in onnx_export.WEIGHTS:
        part = export_onnx(artifact, OnnxOptions(weights, False, 64), sync=False).onnx
        assert part is not None
        # tensors start on pages, of which a tiny model has little more than beginnings
        padding = sum(4096 * len(model.graph.initializer) for model in models(artifact).values())
        assert (
            planned[weights] * 0.8 < sum(graph.data.bytes for graph in part.graphs) < planned[weights] * 1.3 + padding
        )
        shown = inspect()["onnx"]
        assert (shown["weights"], shown["max_length"], shown["verification"]) == (weights, 64, "none")
    assert "ONNX models" in CliRunner().invoke(app, ["inspect", str(artifact)]).stdout


def test_an_artifact_of_the_schema_before_these_models_opens_and_takes_them(convert: Convert) -> None:
    artifact = convert()
    plain = json.loads((artifact / "manifest.json").read_text())
    added = ((plain, "onnx"), (plain, "selftest"), (plain["weights"], "bias_dtype"), (plain["ge"], "admitted"))
    for part, field in added:
        part.pop(field)
    (artifact / "manifest.json").write_text(json.dumps({**plain, "schema": 1}))
    assert read_manifest(artifact).onnx is None
    # whose graphs are not those that are translated now
    made = export_onnx(artifact, OnnxOptions(max_length=64), sync=False)
    assert made.schema == 3 and made.ge and made.ge.admitted is None and made.onnx
    (artifact / "manifest.json").write_text(json.dumps({**plain, "schema": 1, "onnx": None}))
    with pytest.raises(ArtifactError, match="field onnx is not of schema 1"):
        read_manifest(artifact)
