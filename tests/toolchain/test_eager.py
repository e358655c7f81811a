"""--execute-mode eager: which operators and engines it takes, and that it is the graphs' own arithmetic.

Its agreement with transformers is measured beside the graphs', in tests/test_parity.py.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.emulated_npu import EmulatedKernels, emulated_npu
from helpers.synthetic import tiny_config
from PIL import Image

from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError
from qwen2vl_tc.artifacts.store import Artifact, open_artifact, read_manifest
from qwen2vl_tc.runtime import Model, load, loader
from qwen2vl_tc.runtime.backends.weights import mapped_bytes
from qwen2vl_tc.runtime.ops import OPERATORS
from qwen2vl_tc.runtime.requests.answer import Timings
from qwen2vl_tc.runtime.requests.generate import prefill_prompt
from qwen2vl_tc.toolchain.eager import eager, npu_ops
from qwen2vl_tc.toolchain.host.execute_mode import engine

from .conftest import Run

QUESTIONS: list[Any] = [
    [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (84, 112), (9, 200, 40))}]}],
    [{"role": "user", "content": "Say something."}],
    [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (56, 56), (90, 0, 0))}] * 2}],
]
MODELS = Path(__file__).parents[2] / "toolchain" / "models"
CALLED = {operator.eager.name for operator in OPERATORS.values() if operator.eager}


def steps(model: Model, count: int) -> list[np.ndarray]:
    """Logits of a batch of unequal prompts: of every row's prefill, then of `count` batched decode steps."""
    backend, prompts = model.backend, [model.processor.prepare(question) for question in QUESTIONS]
    cache = backend.allocate(len(prompts))
    firsts = [
        prefill_prompt(backend, cache, row, prompt, model.processor, Timings()) for row, prompt in enumerate(prompts)
    ]
    found = [backend.logits(first) for first in firsts]
    lengths = np.array([len(prompt.token_ids) for prompt in prompts])
    positions = lengths + np.array([prompt.delta for prompt in prompts])
    step = backend.begin(cache, np.array([int(backend.tokens(first)[0]) for first in firsts]), lengths, positions)
    for made in range(1, count + 1):
        step = backend.decode(cache, step, [int(n) + made for n in lengths])
        found += [backend.logits(step), backend.tokens(step)[None].astype(np.float32)]
    return found


@pytest.mark.parametrize(("operators", "visual_attention"), [("fused", "segments"), ("recipe", "tnd")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_batch_runs_eagerly_as_its_graphs_do_step_by_step(
    build: Any, dtype: str, operators: str, visual_attention: str
) -> None:
    form = {"operators": operators, "visual_attention": visual_attention}
    _, artifact = build(f"eager_{dtype}_{operators}", tiny_config(), dtype=dtype, batches="1,3", **form)
    graphs, modules = (steps(load(artifact, choice), 8) for choice in ("reference", engine("eager")))
    for ours, theirs in zip(modules, graphs, strict=True):
        # the same kernels in the same order: passes over a graph remove operators, and change no arithmetic
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("operators", "visual_attention"), [("fused", "segments"), ("recipe", "tnd")])
def test_on_an_npu_the_modules_run_there_with_its_operators(
    build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, operators: str, visual_attention: str
) -> None:
    form = {"operators": operators, "visual_attention": visual_attention}
    _, artifact = build(f"eager_bf16_{operators}", tiny_config(), dtype="bf16", batches="1,3", **form)
    expected = steps(load(artifact, "reference"), 8)
    with emulated_npu(monkeypatch, tmp_path):
        monkeypatch.setattr(loader, "npu_problem", lambda: None)
        model = load(artifact, engine("eager", "npu"))
        assert model.backend.device == "npu:0"
        npu_ops.register()
        with EmulatedKernels() as kernels:
            found = steps(model, 8)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    ours = kernels.names.keys() & CALLED
    attention = {name for name in CALLED if "attention" in name}
    assert ours >= CALLED - attention
    # the vision tower attends with the fused operator in every form
    assert len(ours & attention) == (1 if operators == "fused" else 3)


def test_on_an_npu_what_it_cannot_hold_or_compute_is_refused_before_device_memory_is_taken(
    built: Path, build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, artifact = build("eager_bf16_fused", tiny_config(), dtype="bf16", batches="1,3")
    taken: list[Any] = []
    with emulated_npu(monkeypatch, tmp_path):
        import torch_npu

        monkeypatch.setattr(loader, "npu_problem", lambda: None)
        monkeypatch.setattr(eager.EagerBackend, "place", lambda *args: taken.append(args))
        with pytest.raises(TargetError, match="it is fp32, and the NPU's attention takes bf16 and fp16"):
            load(built, engine("eager", "npu"))
        monkeypatch.setattr(torch_npu.npu, "mem_get_info", lambda: (0, 1 << 16))
        with pytest.raises(TargetError, match=r"needs .* GB of device memory"):
            load(artifact, engine("eager", "npu"))
    assert not taken


def test_weights_are_the_mapped_ones(built: Path) -> None:
    model: Any = load(built, engine("eager"))
    modules = model.backend._modules
    entry = model.manifest.weights.files[0]
    begin = mapped_bytes(model.artifact.map(entry), 0, entry.bytes).data_ptr()
    parameters = dict(modules.named_parameters())
    weights = [p for name, p in parameters.items() if not name.startswith("constants.")]
    assert all(begin <= p.data_ptr() < begin + entry.bytes for p in weights)
    assert not any(p.requires_grad or p.is_meta for p in parameters.values())


def test_every_operator_that_the_modules_call_has_a_cpu_kernel() -> None:
    called = {name for file in MODELS.glob("*.py") for name in re.findall(r"torch\.ops\.npu\.(\w+)", file.read_text())}
    assert called == CALLED


def test_a_process_that_runs_eagerly_imports_no_tracer_no_vendor_package_and_no_transformers(built: Path) -> None:
    code = """
import json, sys
from qwen2vl_tc.runtime import load
from qwen2vl_tc.toolchain.host.execute_mode import engine
model = load(sys.argv[1], engine("eager"))
answer = model.generate([{"role": "user", "content": "Hello"}], max_new_tokens=4)
unwanted = ("torch_npu", "torchair", "transformers", "torchvision", "torch._dynamo", "torch._inductor", "onnx")
print(json.dumps([model.backend.name, answer.finish_reason, [name for name in unwanted if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(built)], capture_output=True, text=True, check=True)
    name, reason, loaded = json.loads(done.stdout)
    assert (name, loaded) == ("eager", [])
    assert reason in ("stop", "length")


def test_schemas_are_torch_npu_s_and_one_process_may_use_both(built: Path) -> None:
    """Definitions of ours, then torch_npu with its own, then our kernels beside those: the same tokens throughout."""
    code = """
import json, sys
import torch
from qwen2vl_tc.artifacts.host.process import prepare_process
prepare_process()
from qwen2vl_tc.exporters.torchair.device import open_device
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.ops import OPERATORS
from qwen2vl_tc.toolchain.host.execute_mode import engine

def schemas():
    names = [each.eager.name for each in OPERATORS.values() if each.eager]
    return {name: str(getattr(torch.ops.npu, name).default._schema) for name in names}

def tokens():
    return model.generate([{"role": "user", "content": "Hello"}], max_new_tokens=4).token_ids

model = load(sys.argv[1], engine("eager"))
before, ours = tokens(), schemas()
open_device("Ascend910B2")
theirs, after = schemas(), tokens()
try:
    torch.ops.npu.npu_fast_gelu(torch.ones(2, device="npu"))
    on_npu = "ran"
except RuntimeError as error:
    on_npu = "torch_npu's own"
print(json.dumps([before == after == tokens(), ours, theirs, on_npu]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(built)], capture_output=True, text=True, check=True)
    same, ours, theirs, on_npu = json.loads(done.stdout)
    assert same
    assert ours == theirs
    assert on_npu == "torch_npu's own", "CPU kernels serve CPU tensors only"


@pytest.fixture
def ops() -> Any:
    npu_ops.register()
    return torch.ops.npu


def test_operators_change_what_their_schema_says_and_nothing_else(ops: Any) -> None:
    cache = torch.zeros(2, 5, 3)
    ones = torch.ones(2, 1, 3)
    assert ops.scatter_update_(cache, torch.tensor([4, 1]), ones, 1) is cache
    assert cache[0, 4].eq(1).all() and cache[1, 1].eq(1).all()
    assert cache.count_nonzero() == 6
    rows = torch.zeros(4, 3)
    updated = ops.npu_scatter_nd_update(rows, torch.tensor([[2]]), torch.ones(1, 3))
    assert updated[2].eq(1).all()
    assert not rows.any()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("npu_fused_infer_attention_score", {"block_size": 128}, "block_size is not supported on CPU"),
        ("npu_fused_infer_attention_score", {"softmax_lse_flag": True}, "softmax_lse_flag is not supported"),
        ("npu_fused_infer_attention_score", {"sparse_mode": 4}, "sparse_mode 4"),
        ("npu_fused_infer_attention_score", {"actual_seq_lengths": [1, 2]}, "for a batch of 3"),
        ("npu_prompt_flash_attention", {"actual_seq_lengths": [4]}, r"\[4, 4, 4\] are outside 0 to 3"),
        ("npu_prompt_flash_attention", {"sparse_mode": 12}, "sparse_mode 2"),
        ("npu_prompt_flash_attention", {"pse_shift": torch.zeros(1)}, "pse_shift is not supported on CPU"),
        ("npu_incre_flash_attention", {}, "takes one query token a row, got 3"),
        ("npu_incre_flash_attention", {"kv_padding_size": torch.zeros(1)}, "kv_padding_size is not supported on CPU"),
    ],
)
def test_what_the_references_do_not_compute_is_refused_by_name(
    ops: Any, name: str, given: dict[str, Any], message: str
) -> None:
    x = torch.ones(3, 3, 8)
    with pytest.raises(ArtifactError, match=f"npu::{name}: .*{message}"):
        getattr(ops, name)(x, x, x, num_heads=2, **given)


def test_what_an_operator_cannot_run_on_is_refused_by_its_name(ops: Any) -> None:
    x = torch.ones(2, 8)
    for name, given in (
        ("npu_linear", (x, torch.ones(4, 7))),
        ("npu_rms_norm", (x, torch.ones(7))),
        ("npu_swiglu", (torch.ones(2, 7),)),
        ("npu_gelu", (x.long(),)),
        ("npu_scatter_nd_update", (x, torch.tensor([[-1]]), torch.ones(1, 8))),
        ("scatter_update_", (torch.zeros(2, 4, 8), torch.tensor([4, 0]), torch.ones(2, 1, 8), 1)),
        ("npu_rotary_mul", (torch.ones(1, 2, 1, 8), *[torch.ones(1, 3, 1, 8)] * 2)),
    ):
        with pytest.raises(ArtifactError, match=f"npu::{name}: "):
            getattr(ops, name)(*given)


def test_attention_takes_the_lengths_and_the_exact_mode_that_torch_npu_s_does(ops: Any) -> None:
    q, k, v = torch.randn(3, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    given = {"num_heads": 2, "actual_seq_lengths": [1, 3], "actual_seq_lengths_kv": [4, 2]}
    got = ops.npu_fused_infer_attention_score(q, k, v, scale=0.25, pre_tokens=65535, next_tokens=65535, **given)[0]
    assert not got[0, 1:].any() and not got[1, 3:].any()
    assert got[0, 0].any() and got[1, 2].any()
    alone = ops.npu_fused_infer_attention_score(q[1:, :3], k[1:, :2], v[1:, :2], scale=0.25, num_heads=2)[0]
    assert torch.equal(got[1:, :3], alone)
    for sparse_mode in (0, 10):
        prompt = ops.npu_prompt_flash_attention(q, k, v, scale_value=0.25, sparse_mode=sparse_mode, **given)
        assert torch.equal(prompt, got)


def with_soc(artifact: Path, out: Path, soc: str) -> Path:
    shutil.copytree(artifact, out)
    manifest = read_manifest(out)
    assert manifest.ge
    changed = dataclasses.replace(manifest, ge=dataclasses.replace(manifest.ge, soc=soc))
    (out / "manifest.json").write_bytes(changed.to_bytes())
    return out


def test_graphs_and_modules_compute_what_the_artifact_s_soc_does(build: Any, tmp_path: Path) -> None:
    _, artifact = build("eager_bf16_fused", tiny_config(), dtype="bf16", batches="1,3")
    other = with_soc(artifact, tmp_path / "other", "Ascend950PR_9589")
    found = {}
    for path in (artifact, other):
        graphs, modules = (steps(load(path, choice), 2) for choice in ("reference", engine("eager")))
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(modules, graphs, strict=True))
        found[path] = np.stack(graphs[:1])
    assert not np.array_equal(found[artifact], found[other]), "AddRmsNorm rounds on one of them only"


def test_other_forms_of_an_operator_are_refused(ops: Any) -> None:
    x = torch.ones(1, 3, 2, 8)
    with pytest.raises(ArtifactError, match="npu::npu_rotary_mul: rotary_mode interleave is not supported"):
        ops.npu_rotary_mul(x, x, x, "interleave")
    with pytest.raises(ArtifactError, match="additional_output=True"):
        ops.npu_add_layer_norm(x, x, torch.ones(8), torch.ones(8))


@pytest.mark.parametrize(
    ("words", "variable", "taken"),
    [
        ([], None, "reference"),
        ([], "", "reference"),
        ([], "dynamo", "reference"),
        ([], "eager", "eager"),
        (["--execute-mode", "eager"], None, "eager"),
        (["--execute-mode", "eager", "--backend", "reference"], None, "eager"),
        (["--execute-mode", "dynamo"], "eager", "reference"),
    ],
)
def test_the_option_goes_before_the_variable_and_graphs_are_the_default(
    run: Run, built: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str | None, taken: str
) -> None:
    monkeypatch.delenv("EXE_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("EXE_MODE", variable)
    result = run("generate", built, "--prompt", "x", "--max-new-tokens", "2", *words)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"backend: {taken} (")


@pytest.mark.parametrize(
    ("words", "variable", "said"),
    [
        (["--execute-mode", "jit"], "eager", "--execute-mode jit: expected one of dynamo, eager"),
        ([], "fast", "EXE_MODE=fast: expected one of dynamo, eager"),
        (["--execute-mode", "eager", "--backend", "onnxruntime"], "", "eager runs on --backend reference or npu, not"),
        (["--execute-mode", "eager", "--backend", "npu"], "", "backend npu: no NPU is here"),
    ],
)
def test_modes_that_cannot_run_are_one_line_and_code_2(
    run: Run, built: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str, said: str
) -> None:
    monkeypatch.setenv("EXE_MODE", variable)
    result = run("generate", built, "--prompt", "x", *words)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert said in line


def changed(artifact: Artifact, **fields: Any) -> Artifact:
    manifest = dataclasses.replace(artifact.manifest, **fields)
    return Artifact(artifact.path, manifest, artifact.manifest_hash, artifact._files)


def test_an_artifact_without_compile_options_says_what_to_run(built: Path) -> None:
    with open_artifact(built) as artifact, pytest.raises(ArtifactError, match="has no GE graphs; run `qwen2vl-tc comp"):
        eager.eager_on(changed(artifact, ge=None), "reference")


def test_constants_of_another_length_are_refused_before_anything_is_bound(built: Path) -> None:
    with open_artifact(built) as artifact:
        part = artifact.manifest.ge
        assert part is not None
        longer = changed(artifact, ge=dataclasses.replace(part, max_length=512))
        message = r"constants\.text_rope: got \[257, \d+\] torch\.float32, the modules take \[513, "
        with pytest.raises(ArtifactError, match=message):
            eager.eager_on(longer, "reference")


def test_altered_weights_give_no_token_eagerly_either(built: Path, tmp_path: Path) -> None:
    from shutil import copytree

    moved = Path(copytree(built, tmp_path / "moved"))
    (weights,) = (moved / "weights").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="altered or damaged"):
        load(moved, engine("eager")).generate("x", max_new_tokens=1)


def test_an_observer_is_refused(built: Path) -> None:
    with pytest.raises(TargetError, match="an observer needs --backend reference"):
        load(built, engine("eager"), observer=lambda *args: None)
