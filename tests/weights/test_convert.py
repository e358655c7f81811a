"""Conversion: every tensor recomputed here from the checkpoint, in every form that checkpoints come in."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.synthetic import tiny_config, write_checkpoint
from helpers.synthetic_tokenizer import CHAT_TEMPLATE
from safetensors import safe_open

from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError, WeightError
from qwen2vl_tc.artifacts.manifest import FileEntry, GePart, Graph
from qwen2vl_tc.artifacts.staging import stage
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.runtime.models.qwen2_vl import weights
from qwen2vl_tc.toolchain.weights import convert as convert_module
from qwen2vl_tc.toolchain.weights import stream
from qwen2vl_tc.toolchain.weights.convert import convert, convert_planned, plan_conversion

NUMPY = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
SMALL_SHARDS = 100_000


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read by the safetensors library."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.offset_keys():
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def recompute(source: dict[str, np.ndarray], tied: bool, dtype: str) -> dict[str, np.ndarray]:
    """The artifact's tensors from a checkpoint with legacy names, written independently of the converter."""
    to = NUMPY[dtype]
    made: dict[str, np.ndarray] = {}
    for name, value in source.items():
        if any(
            part in name for part in (".q_proj.", ".k_proj.", ".v_proj.", ".gate_proj.", ".up_proj.", "patch_embed")
        ):
            continue
        if not (tied and name == "lm_head.weight"):
            made[name] = value.astype(np.float32).astype(to)
    for name in source:
        if ".q_proj." in name:
            parts = [source[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            made[name.replace("q_proj", "qkv_proj")] = np.concatenate(parts).astype(np.float32).astype(to)
        if ".gate_proj." in name:
            parts = [source[name], source[name.replace("gate_proj", "up_proj")]]
            made[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(parts).astype(np.float32).astype(to)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    kernel = source["visual.patch_embed.proj.weight"].astype(np.float64)
    weight = np.stack([kernel[:, c] * ((1 / 255) / std[c]) for c in range(3)], axis=1).astype(to)
    bias = -sum(weight[:, c].astype(np.float64).sum(axis=(1, 2, 3)) * mean[c] * 255 for c in range(3))
    made["visual.patch_embed.weight"] = weight.reshape(len(weight), -1)
    made["visual.patch_embed.bias"] = np.asarray(bias)
    # the biases of linear layers are fp32 whatever the artifact's dtype is; those of norms are not
    exact = {
        name: source[name] for name in source if name.endswith(".bias") and "norm" not in name and "ln_q" not in name
    }
    for name in [name for name in exact if name in made]:
        made[name] = exact[name].astype(np.float32)
    for name in [name for name in exact if ".q_proj." in name]:
        parts = [source[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
        made[name.replace("q_proj", "qkv_proj")] = np.concatenate(parts).astype(np.float32)
    return made


def assert_converted(artifact: Path, wanted: dict[str, np.ndarray]) -> None:
    got = read_all(artifact / "weights")
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        if name == "visual.patch_embed.bias":
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, wanted[name], rtol=1e-6, atol=1e-6)
        else:
            assert value.dtype == wanted[name].dtype, name
            assert value.tobytes() == wanted[name].tobytes(), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> Path:
    return write_checkpoint(folder, config or tiny_config(), **{"tokenizer": True, **options})


@pytest.mark.parametrize(("source", "target"), list(itertools.product(NUMPY, [None, *NUMPY])))
def test_every_tensor_is_bit_equal_to_a_recomputation(tmp_path: Path, source: str, target: str | None) -> None:
    checkpoint(tmp_path / "hf", dtype=source)
    convert(tmp_path / "hf", tmp_path / "out", target, sync=False)
    with open_artifact(tmp_path / "out") as artifact:
        artifact.check_all()
        assert artifact.manifest.weights is not None
        assert artifact.manifest.weights.dtype == (target or source)
    assert_converted(tmp_path / "out", recompute(read_all(tmp_path / "hf"), False, target or source))


@pytest.mark.parametrize(
    "shape",
    [
        {"tie_word_embeddings": True},
        {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112},
        {"num_key_value_heads": 4, "num_hidden_layers": 3, "vision": {"depth": 1, "embed_dim": 48, "mlp_ratio": 4}},
    ],
)
def test_other_shapes(tmp_path: Path, shape: dict[str, Any]) -> None:
    config = tiny_config(**shape)
    checkpoint(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "out", sync=False)
    assert_converted(tmp_path / "out", recompute(read_all(tmp_path / "hf"), config["tie_word_embeddings"], "bf16"))


def test_every_form_of_one_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    results = []
    forms = list(itertools.product(("flat", "nested"), ("legacy", "new"), (1, 3), (False, True)))
    for number, (layout, names, shards, stored_head) in enumerate(forms):
        source = tmp_path / str(number) / "hf"
        checkpoint(
            source,
            tiny_config(tie_word_embeddings=True),
            layout=layout,
            names=names,
            shards=shards,
            stored_head=stored_head,
        )
        convert(source, tmp_path / "out", sync=False)
        results.append(files_of(tmp_path / "out"))
    assert all(result == results[0] for result in results[1:])


def test_shards_follow_load_order_aligned_and_whole(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    result = convert(tmp_path / "hf", tmp_path / "out", sync=False, shard_bytes=SMALL_SHARDS)
    names: list[str] = []
    for entry in result.weights.files:
        path = tmp_path / "out" / entry.path
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0
        with safe_open(path, framework="numpy") as file:
            stored = file.offset_keys()
        assert entry.bytes <= SMALL_SHARDS + 4096 or len(stored) == 1
        names += stored
    count = len(result.weights.files)
    assert [e.path for e in result.weights.files] == [
        f"weights/model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
    ]
    assert count > 2
    assert names == [p.name for p in weights(config_from_hf(tiny_config()))]


def test_folding_is_exact_at_the_mean_colour(tmp_path: Path) -> None:
    """Folded bf16 weights on uint8 patches against the fp64 image processor and the bf16-rounded original kernel."""
    checkpoint(tmp_path / "hf", dtype="fp32")
    convert(tmp_path / "hf", tmp_path / "out", "bf16", sync=False)
    got = read_all(tmp_path / "out" / "weights")
    kernel = read_all(tmp_path / "hf")["visual.patch_embed.proj.weight"].astype(np.float64)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    random = np.random.default_rng(0)
    pixels = np.clip(random.normal(mean[None, :, None] * 255, 20, (64, 3, 2 * 14 * 14)), 0, 255).round()
    normalized = (pixels / 255 - mean[None, :, None]) / std[None, :, None]
    exact = normalized.reshape(64, -1) @ kernel.reshape(len(kernel), -1).T
    rounded = kernel.astype(ml_dtypes.bfloat16).astype(np.float64).reshape(len(kernel), -1)
    usual = normalized.reshape(64, -1) @ rounded.T
    weight = got["visual.patch_embed.weight"].astype(np.float64)
    folded = pixels.reshape(64, -1) @ weight.T + got["visual.patch_embed.bias"]
    assert np.abs(folded - exact).max() < 2 * np.abs(usual - exact).max()
    naive = pixels.reshape(64, -1) @ weight.T + got["visual.patch_embed.bias"].astype(ml_dtypes.bfloat16)
    assert np.abs(naive - exact).max() > np.abs(folded - exact).max()


@pytest.mark.parametrize(
    ("settings", "folding"),
    [
        ({"image_mean": None, "image_std": None}, (1 / 255, (0.48145466, 0.4578275, 0.40821073))),
        ({"do_rescale": False}, (1.0, (0.48145466, 0.4578275, 0.40821073))),
        ({"do_normalize": False}, (1 / 255, (0.0, 0.0, 0.0))),
        ({"rescale_factor": 0.5, "image_mean": [0, 0.5, 1]}, (0.5, (0.0, 0.5, 1.0))),
    ],
)
def test_the_manifest_records_what_was_folded(
    tmp_path: Path, settings: dict[str, Any], folding: tuple[float, Any]
) -> None:
    path = checkpoint(tmp_path / "hf") / "preprocessor_config.json"
    changed = {**json.loads(path.read_text()), **settings}
    # None: left out
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
    weights = convert(tmp_path / "hf", tmp_path / "out", sync=False).weights
    assert (weights.folding.rescale_factor, weights.folding.image_mean) == folding
    assert weights.folding.image_std == (
        (1.0,) * 3 if "do_normalize" in settings else (0.26862954, 0.26130258, 0.27577711)
    )


def test_processor_files_are_copied(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.json").unlink()
    (tmp_path / "hf" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    convert(tmp_path / "hf", tmp_path / "out", sync=False)
    copied = files_of(tmp_path / "out" / "processor")
    assert copied.keys() == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "generation_config.json",
    }
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert copied[name] == (tmp_path / "hf" / name).read_bytes()


def test_an_image_processor_inside_processor_config_is_found(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    path = tmp_path / "hf" / "preprocessor_config.json"
    settings = {**json.loads(path.read_text()), "image_std": [0.5, 0.5, 0.5]}
    path.unlink()
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert convert(tmp_path / "hf", tmp_path / "out", sync=False).weights.folding.image_std == (0.5, 0.5, 0.5)
    assert json.loads((tmp_path / "out/processor/preprocessor_config.json").read_text()) == settings


def test_generation_config_and_separate_template_may_be_absent(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    for name in ("generation_config.json", "chat_template.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    convert(tmp_path / "hf", tmp_path / "out", sync=False)
    files = files_of(tmp_path / "out" / "processor")
    assert files.keys() == {"tokenizer.json", "preprocessor_config.json", "tokenizer_config.json"}
    # what transformers' Qwen2Tokenizer takes where nothing names them
    assert json.loads(files["tokenizer_config.json"]) == dict.fromkeys(
        ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"
    )


def test_progress_ends_at_the_bytes_written(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    seen: list[tuple[int, int]] = []
    result = convert(
        tmp_path / "hf", tmp_path / "out", sync=False, progress=lambda done, total: seen.append((done, total))
    )
    headers = sum(
        8 + int.from_bytes((tmp_path / "out" / e.path).read_bytes()[:8], "little") for e in result.weights.files
    )
    assert {total for _, total in seen} == {result.bytes}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] in (result.bytes, result.bytes - headers)


def test_where_the_kernel_cannot_copy_ranges_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a", sync=False)
    monkeypatch.setattr(stream, "_copy_range", lambda source, begin, count, fd: False)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1000)
    convert(tmp_path / "hf", tmp_path / "b", sync=False)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


KILLED = """
import os, signal, sys
from pathlib import Path
from qwen2vl_tc.toolchain.weights.convert import convert
source, out, fraction = sys.argv[1:]
def die(done, total):
    if done >= float(fraction) * total:
        os.kill(os.getpid(), signal.SIGKILL)
convert(Path(source), Path(out), sync=False, shard_bytes={shard_bytes}, progress=die)
"""


def kill_at(fraction: float, source: Path, out: Path) -> None:
    code = KILLED.format(shard_bytes=SMALL_SHARDS)
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out), str(fraction)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("fraction", [0, 0.5, 0.95])
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(tmp_path: Path, fraction: float) -> None:
    source, out = checkpoint(tmp_path / "hf"), tmp_path / "out"
    convert(source, tmp_path / "undisturbed", sync=False, shard_bytes=SMALL_SHARDS)
    kill_at(fraction, source, out)
    assert not out.exists()
    result = convert(source, out, sync=False, shard_bytes=SMALL_SHARDS)
    assert (result.resumed_shards > 0) == (fraction > 0)
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("change", ["source", "dtype", "damaged shard"])
def test_a_resumed_run_takes_nothing_over_that_does_not_fit(tmp_path: Path, change: str) -> None:
    source, out = checkpoint(tmp_path / "hf"), tmp_path / "out"
    kill_at(0.9, source, out)
    dtype = None
    if change == "source":
        checkpoint(source, seed=1)
    elif change == "dtype":
        dtype = "fp16"
    else:
        first = min((tmp_path / ".out.staging" / "weights").iterdir())
        first.write_bytes(first.read_bytes()[:-1] + b"!")
    result = convert(source, out, dtype, sync=False, shard_bytes=SMALL_SHARDS)
    assert result.resumed_shards == 0
    convert(source, tmp_path / "undisturbed", dtype, sync=False, shard_bytes=SMALL_SHARDS)
    assert files_of(out) == files_of(tmp_path / "undisturbed")


def with_graphs(out: Path, dtype: str = "bf16") -> GePart:
    """Give an artifact a ge part, as compile does."""
    with stage(out, sync=False) as staging:
        base = staging.base
        assert base is not None and base.weights is not None
        part = GePart(
            soc="Ascend910B2",
            operators="fused",
            visual_attention="segments",
            dtype=dtype,
            max_length=64,
            batches=(1,),
            passes=(),
            versions={},
            limits=(),
            operator_notes=(),
            admitted=(),
            constants=staging.add("graphs/ge/constants", b"constants"),
            graphs=(
                Graph(
                    name="visual",
                    graph=staging.add("graphs/ge/graph", b"g"),
                    binding=staging.add("graphs/ge/b", b"b"),
                    readable=None,
                    inputs=(),
                    outputs=(),
                    ops={},
                ),
            ),
        )
        report = staging.add("reports/verify.json", b"{}")
        staging.commit(dataclasses.replace(base, ge=part, reports=(report,), verification="passed"))
    return part


def test_graphs_that_fit_are_kept_and_their_verification_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(checkpoint(tmp_path / "hf"), out, sync=False)
    part = with_graphs(out)
    convert(checkpoint(tmp_path / "tuned", seed=7), out, sync=False)
    with open_artifact(out) as artifact:
        artifact.check_all()
        assert artifact.manifest.ge == part
        assert (artifact.manifest.name, artifact.manifest.verification) == ("tuned", "none")
        assert artifact.manifest.reports == ()
    assert_converted(out, recompute(read_all(tmp_path / "tuned"), False, "bf16"))


@pytest.mark.parametrize(("change", "said"), [({"rope_theta": 1e4}, "other constants"), ({}, "dtype bf16")])
def test_graphs_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    out = tmp_path / "out"
    convert(checkpoint(tmp_path / "hf"), out, sync=False)
    with_graphs(out)
    before = files_of(out)
    other = checkpoint(tmp_path / "other", tiny_config(**change), dtype="bf16" if change else "fp16")
    with pytest.raises(ArtifactError, match=rf"{said}.*use another --out, or rebuild with qwen2vl-tc build"):
        convert(other, out, sync=False)
    assert files_of(out) == before
    assert not (tmp_path / ".out.staging").exists()


def test_a_build_converts_into_its_own_staging(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    with plan_conversion(source) as plan, stage(tmp_path / "out", sync=False) as staging:
        result = convert_planned(plan, staging)
        assert isinstance(result.weights.files[0], FileEntry)
        assert (staging.path / result.weights.files[0].path).stat().st_size == result.weights.files[0].bytes
    # no commit: kept, so that the next build resumes
    with plan_conversion(source) as plan, stage(tmp_path / "out", sync=False) as staging:
        assert convert_planned(plan, staging).resumed_shards == 1


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "hf")

    def no_room(folder: Path, needed: int, purpose: str) -> None:
        assert needed > 100_000 and not list((folder / "weights").glob("*"))
        raise TargetError("needs more room")

    monkeypatch.setattr(convert_module, "require_disk", no_room)
    with pytest.raises(TargetError, match="more room"):
        convert(tmp_path / "hf", tmp_path / "out", sync=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_disk_that_fills_up_is_one_error_and_the_next_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "hf")
    write = stream.write_shard
    calls = []

    def fill_up(*arguments: Any) -> tuple[int, str]:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, os.strerror(28))
        return write(*arguments)

    monkeypatch.setattr(convert_module, "write_shard", fill_up)
    with pytest.raises(TargetError, match="disk is full"):
        convert(tmp_path / "hf", tmp_path / "out", sync=False, shard_bytes=SMALL_SHARDS)
    monkeypatch.setattr(convert_module, "write_shard", write)
    assert convert(tmp_path / "hf", tmp_path / "out", sync=False, shard_bytes=SMALL_SHARDS).resumed_shards == 2


def test_nan_found_in_the_middle_names_the_tensor(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf", dtype="fp32")
    tensors = read_all(tmp_path / "hf")
    assert all(np.isfinite(value).all() for value in tensors.values())
    data = (tmp_path / "hf/model.safetensors").read_bytes()
    needle = tensors["model.layers.1.mlp.up_proj.weight"].tobytes()
    at = data.index(needle) + len(needle) // 8 * 4
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        bad = data[:at] + np.float32(value).tobytes() + data[at + 4 :]
        (tmp_path / "hf/model.safetensors").write_bytes(bad)
        for dtype in ("fp32", "bf16"):
            with pytest.raises(WeightError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
                convert(tmp_path / "hf", tmp_path / "out", dtype, sync=False)
