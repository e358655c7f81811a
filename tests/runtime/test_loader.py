"""load(): what it needs, what it refuses, and that nothing unchecked gets out."""

import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.errors import (
    ArtifactError,
    MissingDependencyError,
    RequestError,
    TargetError,
    ToolchainError,
)
from qwen2vl_tc.artifacts.store import Artifact
from qwen2vl_tc.runtime import Model, load, loader
from qwen2vl_tc.runtime.backends.base import Backend
from qwen2vl_tc.toolchain.build.compile import CompileOptions, compile_config

QUESTION = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def artifact(build: Any) -> Path:
    _, path = build("gqa2_tied", tiny_config(tie_word_embeddings=True), stored_head=True)
    assert isinstance(path, Path)
    return path


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    return load(artifact)


def copied(artifact: Path, folder: Path) -> Path:
    return Path(copytree(artifact, folder / "moved.artifact"))


def test_a_moved_artifact_gives_the_same_answer(model: Model, artifact: Path, tmp_path: Path) -> None:
    moved = load(copied(artifact, tmp_path))
    assert moved.generate(QUESTION, max_new_tokens=8).token_ids == model.generate(QUESTION, max_new_tokens=8).token_ids


# All that loading and answering may import from outside the standard library; torch brings the last four.
PACKAGES = {"PIL", "blake3", "google", "jinja2", "markupsafe", "numpy", "tokenizers", "torch"}
PACKAGES |= {"mpmath", "torchgen", "tqdm", "typing_extensions"}
OF_ONNXRUNTIME = {"onnxruntime", "flatbuffers", "packaging"}
NOT_OF_TORCH = ("torch._dynamo", "torch._inductor", "torch.onnx", "sympy")
GE = ("bound", "checks")
BACKENDS = {
    "reference": {"base", "ge", "model", "reference", "weights", *(f"ge.{name}" for name in (*GE, "executor"))},
    "npu": {"base", "ge", "model", "npu", "weights", *(f"ge.{name}" for name in GE)},
    "onnxruntime": {"base", "onnx_check", "onnx_proto", "onnxruntime"},
}


def imported(code: str, *words: str) -> tuple[set[str], set[str], list[str]]:
    """What a fresh process imports: packages from outside, modules of runtime.backends, what is unwanted of torch."""
    script = f"""
import sys
before = {{name.partition(".")[0] for name in sys.modules}}
{code}
import json
names = [name for name, module in sys.modules.items() if module is not None]
print(json.dumps([sorted({{name.partition(".")[0] for name in names}} - before - sys.stdlib_module_names), names]))
"""
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    packages, names = json.loads(done.stdout)
    prefix = "qwen2vl_tc.runtime.backends."
    own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return set(packages) - {"qwen2vl_tc", "__mp_main__"}, own, [name for name in NOT_OF_TORCH if name in names]


def test_answering_on_the_cpu_imports_these_modules_and_no_others(artifact: Path) -> None:
    code = """
from PIL import Image
from qwen2vl_tc.runtime import load
content = [{"type": "image", "image": Image.new("RGB", (56, 56))}, {"type": "text", "text": "Hello"}]
load(sys.argv[1], "reference").generate([{"role": "user", "content": content}], max_new_tokens=4)
"""
    packages, own, of_torch = imported(code, str(artifact))
    assert packages <= PACKAGES, "no transformers, torchvision, torch_npu, torchair"
    assert own == BACKENDS["reference"]
    assert of_torch == []


def test_the_npu_backend_brings_no_module_of_another_and_the_vendors_only_when_it_is_made() -> None:
    code = """
from qwen2vl_tc.artifacts.host.process import prepare_process
prepare_process()
import qwen2vl_tc.runtime.backends.npu
"""
    packages, own, of_torch = imported(code)
    assert packages <= PACKAGES
    assert own == BACKENDS["npu"]
    assert of_torch == []


def test_the_onnxruntime_backend_brings_neither_torch_nor_another_engine() -> None:
    packages, own, _ = imported(
        "from qwen2vl_tc.runtime.backends.onnxruntime import import_onnxruntime; import_onnxruntime()"
    )
    assert packages <= PACKAGES - {"torch", "torchgen", "tqdm"} | OF_ONNXRUNTIME
    assert own == BACKENDS["onnxruntime"]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_loading_as_before(artifact: Path, enabled: bool) -> None:
    def refuses(opened: Artifact) -> Backend:
        assert not gc.isenabled()
        raise TargetError("no")

    (gc.enable if enabled else gc.disable)()
    try:
        load(artifact)
        assert gc.isenabled() is enabled
        with pytest.raises(TargetError):
            load(artifact, refuses)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_the_runtime_itself_imports_no_engine() -> None:
    code = "from qwen2vl_tc.runtime import load; assert not {'asyncio', 'ssl', 'http'} & sys.modules.keys()"
    packages, own, _ = imported(code)
    assert packages <= PACKAGES - {"torch", "torchgen", "tqdm"}
    assert own == {"base"}


def test_one_part_of_the_runtime_brings_neither_pillow_nor_tokenizers() -> None:
    packages, own, _ = imported("import qwen2vl_tc.runtime.memory, qwen2vl_tc.runtime.requests.settings")
    assert packages <= {"blake3", "numpy"}
    assert own == set()
    with pytest.raises(ImportError, match="cannot import name 'laod'"):
        from qwen2vl_tc.runtime import laod  # noqa: F401


def test_loading_says_where_its_time_went(model: Model) -> None:
    assert list(model.load_ms) == ["manifest", "imports", "weights", "graphs", "device", "processor"]
    assert all(ms >= 0 for ms in model.load_ms.values())


def test_the_model_says_which_backend_it_took_and_why(model: Model) -> None:
    assert model.backend.name == "reference"
    assert model.reason == "no NPU is here; the GE graphs run on CPU"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("npu", "no NPU is here; use --backend reference, or run on an NPU host"),
        ("onnxruntime", "has no ONNX models; run `qwen2vl-tc compile"),
        ("cuda", "backend 'cuda': expected one of reference, onnxruntime, npu"),
    ],
)
def test_backends_that_cannot_run_say_so(artifact: Path, backend: str, message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        load(artifact, backend=backend)


@pytest.mark.parametrize(
    ("has_onnx", "has_npu", "message"),
    [
        (False, False, r"no engine is installed; pip install 'qwen2vl-tc\[reference\]'"),
        (True, False, r"no engine is installed; pip install 'qwen2vl-tc\[onnx\]', the faster one on CPU"),
        (True, True, r"no engine is installed, and an NPU is here; pip install 'qwen2vl-tc\[npu\]'"),
    ],
)
def test_where_no_engine_is_installed_the_best_one_for_the_artifact_is_named(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, has_onnx: bool, has_npu: bool, message: str
) -> None:
    open_it = loader.open_artifact

    def opened(*given: Any) -> Artifact:
        found = open_it(*given)
        if has_onnx:
            found.manifest = dataclasses.replace(found.manifest, onnx=SimpleNamespace(verification="none", graphs=()))
        return found

    monkeypatch.setattr(loader, "open_artifact", opened)
    monkeypatch.setattr(loader, "npu_problem", lambda: None if has_npu else "no NPU is here")
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=message):
        load(artifact)
    with pytest.raises(MissingDependencyError, match=r"backend reference needs torch; .*\[reference\]"):
        load(artifact, "reference")


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "pattern", ["graphs/ge/prefill/graph.pb", "graphs/ge/visual/binding.json", "processor/tokenizer.json"]
)
def test_an_altered_file_is_refused_at_load_by_name(artifact: Path, tmp_path: Path, pattern: str) -> None:
    moved = copied(artifact, tmp_path)
    flip_last_byte(moved / pattern)
    with pytest.raises(ArtifactError, match=f"{pattern}: blake3 .* altered or damaged"):
        load(moved)


def test_altered_weights_give_no_token(artifact: Path, tmp_path: Path) -> None:
    moved = copied(artifact, tmp_path)
    (weights,) = (moved / "weights").glob("*.safetensors")
    flip_last_byte(weights)
    tampered = load(moved)
    pieces = tampered.stream(QUESTION, max_new_tokens=4)
    with pytest.raises(ArtifactError, match="altered or damaged"):
        next(pieces)
    with pytest.raises(ArtifactError, match="altered or damaged"):
        tampered.generate(QUESTION, max_new_tokens=4)


def test_graphs_without_weights_say_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    compile_config(tmp_path / "config.json", tmp_path / "bare", CompileOptions(max_length=64), sync=False)
    with pytest.raises(ArtifactError, match=r"has no weights .* run `qwen2vl-tc convert"):
        load(tmp_path / "bare")


def test_what_does_not_fit_the_cache_is_refused_before_any_compute(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(type(model.backend), "run_graph", lambda *args: ran.append(args))
    prompt = len(model.processor.prepare(QUESTION).token_ids)
    needed = prompt + 256 - 1
    with pytest.raises(RequestError, match=f"need a cache of {needed}, the artifact has 256; ask for at most"):
        model.generate(QUESTION, max_new_tokens=256)
    long = [{"role": "user", "content": "word " * 400}]
    with pytest.raises(RequestError, match=r"the prompt has \d+ tokens, the artifact's cache 256"):
        model.generate(long, max_new_tokens=1)
    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        model.generate(QUESTION, max_new_tokens=0)
    assert not ran


def test_the_cache_can_be_filled_to_its_last_position(model: Model) -> None:
    prompt = len(model.processor.prepare(QUESTION).token_ids)
    room = model.max_length - prompt + 1
    answer = model.generate(QUESTION, max_new_tokens=room)
    assert len(answer.token_ids) == room or answer.finish_reason == "stop"


def test_streamed_pieces_join_to_the_generated_text(model: Model) -> None:
    answer = model.generate(QUESTION, max_new_tokens=24)
    assert "".join(model.stream(QUESTION, max_new_tokens=24)) == answer.text
    assert answer.timings_ms["first_token"] > 0


def test_an_artifact_that_failed_its_verification_is_not_served(artifact: Path, tmp_path: Path) -> None:
    moved = copied(artifact, tmp_path)
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "verification": "failed"}))
    with pytest.raises(ArtifactError, match=r"its verification failed, see reports/verify\.json"):
        load(moved)


def test_a_picture_longer_than_the_rotary_table_is_refused_before_any_compute(model: Model) -> None:
    grid = np.array([[1, 2, 4098]])
    patches = np.zeros((2 * 4098, 1176), np.uint8)
    with pytest.raises(RequestError, match="a picture is 4,098 patches long, the visual graph takes 4,096; make it"):
        model.backend.embed(model.processor.inputs, patches, grid)


def test_an_observer_sees_every_intermediate_by_graph_and_name(artifact: Path, model: Model) -> None:
    kept: dict[tuple[str, str], Any] = {}
    watched = load(artifact, observer=lambda graph, name, outputs: kept.update({(graph, name): outputs}))
    assert watched.reason.startswith("an observer was given")
    answer = watched.generate(QUESTION, max_new_tokens=2)
    assert answer.token_ids == model.generate(QUESTION, max_new_tokens=2).token_ids
    assert {graph for graph, _ in kept} == {"prefill", "decode_b1"}
    last = max((key for key in kept if key[0] == "decode_b1" and key[1].startswith("ArgMax")), key=str)
    assert int(kept[last][0][0]) == answer.token_ids[1]


def test_a_weight_check_that_could_not_finish_gives_no_token_either(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(self: Artifact, entry: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Artifact, "check", unreadable)
    with pytest.raises(OSError, match="Input/output error"):
        load(artifact).generate(QUESTION, max_new_tokens=2)
