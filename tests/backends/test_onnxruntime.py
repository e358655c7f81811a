"""The ONNX models in onnxruntime, through the commands, against transformers on the same weights."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.onnx_artifact import exported
from helpers.synthetic import tiny_config, tiny_windowed
from PIL import Image
from typer.testing import CliRunner

from qwen2vl_tc.artifacts.errors import ArtifactError, MissingDependencyError, RequestError, TargetError
from qwen2vl_tc.artifacts.integrity import hash_bytes
from qwen2vl_tc.runtime import Model, load
from qwen2vl_tc.runtime.backends.onnxruntime import _products_saturate
from qwen2vl_tc.runtime.requests.answer import Timings
from qwen2vl_tc.runtime.requests.generate import prefill_prompt
from qwen2vl_tc.runtime.text.prompt import Prompt
from qwen2vl_tc.toolchain.build.onnx import OnnxOptions
from qwen2vl_tc.toolchain.cli.main import app
from qwen2vl_tc.toolchain.verify.cases import Case
from qwen2vl_tc.toolchain.verify.reference import HfReference, open_reference

# fp32 sums of a few hundred products in another order differ by some 1e-6 of logits of order 5; a wrong operator is
# off by more than 1e-2
TOLERANCE = 1e-4
STEPS = 16
QUESTION = "What is in the pictures? Answer."
SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gqa7": {
        "hidden_size": 112,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "vision": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    },
    "wide_vision": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vision": {"depth": 1, "embed_dim": 160, "num_heads": 2, "mlp_ratio": 4},
    },
}
WINDOWED: dict[str, dict[str, Any]] = {
    "windows": {"tie_word_embeddings": True},
    "windows_last": {"vision": {"depth": 3, "hidden_size": 48, "num_heads": 3, "fullatt_block_indexes": [0, 2]}},
    "windows_of_one": {"vision": {"window_size": 28, "fullatt_block_indexes": [2]}},
    "windows_alone": {"vision": {"depth": 2, "intermediate_size": 128, "fullatt_block_indexes": [], "window_size": 84}},
}
CONFIGS = {
    **{name: tiny_config(**changes) for name, changes in SHAPES.items()},
    **{name: tiny_windowed(**changes) for name, changes in WINDOWED.items()},
}

Export = Callable[..., tuple[Path, Path]]


def run(*words: str | int | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, build: Any) -> Export:
    """export(shape, *compile's options) to (HF folder, artifact with ONNX models alone); cached."""
    made: dict[tuple[Any, ...], tuple[Path, Path]] = {}

    def make(shape: str, *options: str, max_length: int = 512) -> tuple[Path, Path]:
        key = (shape, *options, max_length)
        if key not in made:
            source, traced = build(f"onnx_{shape}", CONFIGS[shape])
            weights, standard = options[options.index("--weights") + 1], "--standard-only" in options
            out = tmp_path_factory.mktemp(shape) / "artifact"
            made[key] = source, exported(traced, out, OnnxOptions(weights, standard, max_length))
        return made[key]

    return make


def picture(height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return Image.fromarray(((ramp + rng.integers(0, 64, ramp.shape)) % 256).astype(np.uint8))


def messages(pictures: list[Image.Image], text: str = QUESTION) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


CASES = {
    "one_image": [picture(112, 140, 0)],
    # a single row; two neighbours of one size run as one call of the visual model
    "three_images": [picture(28, 196, 1), picture(57, 61, 2), picture(57, 61, 3)],
    "text_only": [],
}


def logits(model: Model, prompt: Prompt, tokens: list[int]) -> list[np.ndarray]:
    """Logits of the prompt's last position and of every teacher-forced token."""
    backend = model.backend
    cache = backend.allocate(1)
    step = prefill_prompt(backend, cache, 0, prompt, model.processor, Timings())
    found = [backend.logits(step)[0]]
    for i, token in enumerate(tokens):
        at = np.array([len(prompt.token_ids) + i], np.int64)
        step = backend.decode(cache, backend.begin(cache, np.array([token]), at, at + prompt.delta), [int(at[0]) + 1])
        found.append(backend.logits(step)[0])
    return found


def visual(model: Model, prompt: Prompt) -> np.ndarray:
    embeds = model.backend.embed(model.processor.inputs, prompt.patches, prompt.grids)
    return embeds.in_order(embeds.tensor)


def oracle(source: Path) -> HfReference:
    import torch

    return open_reference(source, torch.float32)


@pytest.mark.parametrize("options", [(), ("--standard-only",)], ids=["default", "standard"])
@pytest.mark.parametrize("shape", CONFIGS)
def test_fp32_models_agree_with_transformers(export: Export, tmp_path: Path, shape: str, options: tuple[str]) -> None:
    source, artifact = export(shape, "--weights", "fp32", *options)
    model, reference = load(artifact), oracle(source)
    assert model.backend.name == "onnxruntime"
    for name, pictures in CASES.items():
        prompt = model.processor.prepare(messages(pictures))
        expected = reference.run(reference.inputs(Case(name, tuple(pictures), prompt)), STEPS)
        if expected.visual is not None:
            assert np.abs(visual(model, prompt) - expected.visual.numpy()).max() < TOLERANCE
        ours = logits(model, prompt, list(expected.tokens[:-1]))
        assert np.abs(np.stack(ours) - expected.logits.numpy()).max() < TOLERANCE
        words = ["generate", artifact, "--prompt", QUESTION, "--max-new-tokens", STEPS + 1, "--json"]
        for i, each in enumerate(pictures):
            each.save(tmp_path / f"{i}.png")
            words += ["--image", tmp_path / f"{i}.png"]
        made = json.loads(run(*words))["token_ids"]
        assert made == list(expected.tokens[: len(made)])


@pytest.mark.parametrize("options", [(), ("--standard-only",)], ids=["default", "standard"])
def test_rows_of_a_batch_decode_as_they_would_alone(export: Export, options: tuple[str]) -> None:
    _, artifact = export("tied", "--weights", "fp32", *options)
    model = load(artifact)
    requests = [
        messages(pictures, text) for pictures, text in zip(CASES.values(), ("Hi.", QUESTION, "So?"), strict=True)
    ]
    alone = [model.generate(request, max_new_tokens=12).token_ids for request in requests]
    assert [each.token_ids for each in model.generate_batch(requests, max_new_tokens=12)] == alone


@pytest.mark.parametrize("options", [(), ("--standard-only",)], ids=["default", "standard"])
def test_a_prompt_in_parts_is_the_prompt(export: Export, options: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a kept cache, and where a long prompt is run in parts, the cut inside a picture."""
    _, artifact = export("tied", "--weights", "fp32", *options)
    model = load(artifact)
    backend = model.backend
    prompt = model.processor.prepare(messages(CASES["one_image"]))
    whole = logits(model, prompt, [])[0]
    monkeypatch.setattr("qwen2vl_tc.runtime.backends.onnxruntime._PREFILL_TOKENS", 7)
    assert np.abs(logits(model, prompt, [])[0] - whole).max() < TOLERANCE
    monkeypatch.undo()
    text = model.processor.prepare(messages([]))
    whole = logits(model, text, [])[0]
    for cut in (1, len(text.token_ids) // 2, len(text.token_ids) - 1):
        cache, none = backend.allocate(1), np.zeros(0, np.int64)
        for begin, end in ((0, cut), (cut, len(text.token_ids))):
            ids, places = text.token_ids[begin:end], text.positions[:, begin:end]
            step = backend.prefill(cache, 0, begin, ids, places, None, none)
        assert np.abs(backend.logits(step)[0] - whole).max() < TOLERANCE


def test_a_step_writes_its_own_position_of_the_cache_and_nothing_else(export: Export) -> None:
    _, artifact = export("tied", "--weights", "int8")
    model = load(artifact)
    backend: Any = model.backend
    cache = backend.allocate(2)
    none = np.zeros(0, np.int64)
    ids, positions = np.arange(5), np.tile(np.arange(5), (3, 1))
    backend.prefill(cache, 1, 0, ids, positions, None, none)
    arrays = {name: (array.ctypes.data, array.copy()) for name, array in cache.arrays.items()}
    at = np.array([0, 5])
    backend.decode(cache, backend.begin(cache, np.array([3, 4]), at, at), [1, 6])
    for name, (address, before) in arrays.items():
        array = cache.arrays[name]
        assert array.ctypes.data == address
        changed = {(row, position) for row, _, position, _ in np.argwhere(array != before).tolist()}
        assert changed == {(0, 0), (1, 5)}, name


CACHE_MEMORY = """
import sys
import numpy as np
from qwen2vl_tc.runtime import load
model = load(sys.argv[1])
backend = model.backend
def anonymous_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
def decode(rows):
    cache, at = backend.allocate(rows), np.zeros(rows, np.int64)
    before = anonymous_bytes()
    backend.decode(cache, backend.begin(cache, at, at, at), [1] * rows)
    return anonymous_bytes() - before, sum(array.nbytes for array in cache.arrays.values())
decode(64)
print(*decode(64))
"""


def test_a_cache_takes_memory_for_the_positions_that_are_written(export: Export, tmp_path: Path) -> None:
    """A step that copied the cache, or huge pages, would take all of it."""
    _, artifact = export("tied", "--weights", "int8", max_length=8192)
    words = [sys.executable, "-c", CACHE_MEMORY, str(artifact)]
    taken, size = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    # a page for each row, head, side and layer is 2 MB
    assert size > 128e6 and taken < size / 16


def test_quantized_models_stay_within_the_bounds_that_verify_states(export: Export) -> None:
    for shape, weights in (
        ("untied", "int8"),
        ("gqa7", "int4"),
        ("tied", "fp16"),
        ("windows", "int8"),
        ("windows", "int4"),
    ):
        source, artifact = export(shape, "--weights", weights)
        report = json.loads(run("verify", artifact, "--against", source, "--json"))
        assert report["passed"] and report["dtype"] == weights and report["backend"] == "onnxruntime"
        decode = [each for each in report["comparisons"] if each["graph"] == "decode"]
        assert len(decode) == 4 * 16 and all(each["kl"] >= 0 for each in decode)


@pytest.mark.parametrize("options", [(), ("--standard-only",)], ids=["default", "standard"])
def test_int8_models_run_where_products_would_saturate(
    export: Export, options: tuple[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """x86-64 without VNNI: onnxruntime makes the weights uint8, which only reorders exact integer sums."""
    _, artifact = export("tied", "--weights", "int8", *options)
    found = []
    # what this machine takes by itself: on one without VNNI, the other way is the wrong one
    for saturate in (_products_saturate(), True):
        monkeypatch.setattr("qwen2vl_tc.runtime.backends.onnxruntime._products_saturate", lambda it=saturate: it)
        model = load(artifact)
        found.append(visual(model, model.processor.prepare(messages(CASES["one_image"]))))
    assert np.abs(found[0] - found[1]).max() < TOLERANCE


def test_standard_operators_compute_what_the_others_do(export: Export) -> None:
    _, fused = export("tied", "--weights", "int8")
    _, standard = export("tied", "--weights", "int8", "--standard-only")
    models = [load(path) for path in (fused, standard)]
    prompt = models[0].processor.prepare(messages(CASES["one_image"]))
    a, b = (np.stack(logits(model, prompt, [1, 2, 3])) for model in models)
    # MatMulNBits rounds activations to 8 bits, DequantizeLinear and MatMul need not
    assert np.abs(a - b).max() < 0.1 * b.std()


NO_TORCH = """
import sys
from qwen2vl_tc.runtime import load
model = load(sys.argv[1])
question = [{"role": "user", "content": [{"type": "image", "image": sys.argv[2]}, {"type": "text", "text": "What?"}]}]
print(model.backend.name, len(model.generate(question, max_new_tokens=3).token_ids))
print(sorted({"torch", "torch_npu", "transformers", "onnx"} & set(sys.modules)))
"""


def test_no_torch_comes_into_the_process(export: Export, tmp_path: Path) -> None:
    _, artifact = export("tied", "--weights", "int8")
    CASES["one_image"][0].save(tmp_path / "picture.png")
    words = [sys.executable, "-c", NO_TORCH, str(artifact), str(tmp_path / "picture.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["onnxruntime 3", "[]"]


def test_the_documented_example_runs_with_onnxruntime_alone(export: Export, tmp_path: Path) -> None:
    """docs/ONNX.md: numpy, onnxruntime and tokenizers, and none of our package."""
    _, artifact = export("tied", "--weights", "int8")
    text = (Path(__file__).parents[2] / "docs" / "ONNX.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "qwen2vl_tc" not in code
    words = [sys.executable, "-c", code, str(artifact), "Hello there"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load(artifact).generate("Hello there", max_new_tokens=8).text.strip()


def altered(artifact: Path, out: Path, relative: str) -> Path:
    shutil.copytree(artifact, out)
    data = bytearray((out / relative).read_bytes())
    data[len(data) // 2] ^= 1
    (out / relative).write_bytes(data)
    return out


def test_altered_and_missing_files_are_refused_by_name(export: Export, tmp_path: Path) -> None:
    _, artifact = export("tied", "--weights", "int8")
    with pytest.raises(ArtifactError, match=r"text\.onnx: blake3"):
        load(altered(artifact, tmp_path / "model", "graphs/onnx/text.onnx"))
    model = load(altered(artifact, tmp_path / "data", "graphs/onnx/text.onnx.data"))
    with pytest.raises(ArtifactError, match=r"text\.onnx\.data: blake3"):
        model.generate("Hello", max_new_tokens=1)
    shutil.copytree(artifact, tmp_path / "missing")
    (tmp_path / "missing/graphs/onnx/visual.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"visual\.onnx\.data is missing"):
        load(tmp_path / "missing")


def test_a_model_that_reads_a_file_which_the_manifest_does_not_name_is_refused(export: Export, tmp_path: Path) -> None:
    import onnx

    _, artifact = export("tied", "--weights", "int8")
    copy = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    path = copy / "graphs/onnx/text.onnx"
    shutil.copy(f"{path}.data", path.with_name("unlisted.bin"))
    model = onnx.load(path, load_external_data=False)
    stored = next(each for each in model.graph.initializer if each.external_data)
    next(entry for entry in stored.external_data if entry.key == "location").value = "unlisted.bin"
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((copy / "manifest.json").read_text())
    (entry,) = [each["model"] for each in manifest["onnx"]["graphs"] if each["name"] == "text"]
    entry.update(bytes=path.stat().st_size, hash=hash_bytes(path.read_bytes()))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"reads 'unlisted\.bin', expected only text\.onnx\.data"):
        load(copy)


def test_what_cannot_run_says_what_to_install(export: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnxruntime

    _, artifact = export("tied", "--weights", "int8")
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.1")
    with pytest.raises(
        MissingDependencyError, match=r"1\.24\.1 is too old.*need 1\.25; pip install 'onnxruntime>=1\.25'"
    ):
        load(artifact)
    monkeypatch.undo()
    with monkeypatch.context() as patch, pytest.raises(MissingDependencyError, match=r"cannot be imported: .*libX"):
        (tmp_path / "onnxruntime.py").write_text("raise ImportError('libX.so: no such file')")
        patch.syspath_prepend(tmp_path)
        patch.delitem(sys.modules, "onnxruntime")
        load(artifact)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(MissingDependencyError, match=r"no CPUExecutionProvider.*pip install onnxruntime"):
        load(artifact)
    monkeypatch.undo()
    for threads in ("many", "0", "2147483648"):
        monkeypatch.setenv("QWEN2VL_TC_THREADS", threads)
        with pytest.raises(TargetError, match=f"QWEN2VL_TC_THREADS is '{threads}'"):
            load(artifact)


def test_load_takes_onnxruntime_before_the_reference_where_an_artifact_has_both(build: Any) -> None:
    _, artifact = build("both", CONFIGS["tied"])
    assert load(artifact).backend.name == "reference"
    run("compile", artifact, "--mode", "onnx", "--max-length", 128)
    model = load(artifact)
    assert (model.backend.name, model.max_length) == ("onnxruntime", 128)
    assert load(artifact, backend="reference").max_length == 256


@pytest.mark.parametrize("options", [(), ("--standard-only",)], ids=["default", "standard"])
def test_more_rows_or_tokens_than_fit_are_refused(export: Export, options: tuple[str]) -> None:
    _, artifact = export("tied", "--weights", "int8", *options)
    model = load(artifact)
    cache, at = model.backend.allocate(1), np.zeros(2, np.int64)
    with pytest.raises(RequestError, match="rows 0 to 1 of a cache that has 1"):
        model.backend.decode(cache, model.backend.begin(cache, at, at, at), [1, 1])
    with pytest.raises(RequestError, match="65 rows"):
        model.backend.allocate(65)
    with pytest.raises(RequestError, match="the artifact has 512"):
        model.generate("Hello", max_new_tokens=513)
