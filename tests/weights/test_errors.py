"""Everything that can be wrong with a checkpoint: one clear error each, and the artifact that is there stays."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.synthetic import tiny_config, write_checkpoint

from qwen2vl_tc.artifacts.errors import ConfigError, TargetError, ToolchainError, WeightError
from qwen2vl_tc.toolchain.weights.convert import convert

Header = dict[str, Any]
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
Q_WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(path: Path, change: Callable[[dict[str, tuple[str, list[int], bytes]]], Any]) -> None:
    """Change a safetensors file's tensors, given as name: (dtype, shape, bytes)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {
        name: (e["dtype"], e["shape"], data[8 + length :][slice(*e["data_offsets"])])
        for name, e in json.loads(data[8 : 8 + length]).items()
    }
    change(tensors)
    header, body = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def tensors(change: Callable[[dict[str, tuple[str, list[int], bytes]]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "model.safetensors", change)


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", change)


def preprocessor(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "preprocessor_config.json", lambda plain: plain.update(values))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    (folder / "merges.txt").touch()


def twice_in_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b'"model.layers.0.self_attn.k_proj.bias"', b'"model.layers.0.self_attn.v_proj.bias"', 1)
    )


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_value(name: str, value: float) -> Callable[[dict[str, tuple[str, list[int], bytes]]], None]:
    """Put one fp32 value into a tensor."""

    def change(stored: dict[str, tuple[str, list[int], bytes]]) -> None:
        dtype, shape, content = stored[name]
        stored[name] = (dtype, shape, np.float32(value).tobytes() + content[4:])

    return change


WRONG: dict[str, tuple[Callable[[Path], Any], type[ToolchainError], str]] = {
    "no config": (drop("config.json"), ConfigError, r"no config.json there; --src wants"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ConfigError, r"config.json: not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ConfigError, r"expected a JSON object"),
    "model type": (
        config(lambda c: c.update(model_type="qwen3_vl")),
        ConfigError,
        r"model_type 'qwen3_vl' is not supported; supported: qwen2_vl, qwen2_5_vl",
    ),
    "quantized by config": (
        config(lambda c: c.update(quantization_config={"quant_method": "awq"})),
        ConfigError,
        r"\(awq\) are not supported yet",
    ),
    "dtype of the config": (
        config(lambda c: c.update(torch_dtype="float64")),
        ConfigError,
        r"torch_dtype is 'float64'.*--dtype",
    ),
    "no dtype": (config(lambda c: c.pop("torch_dtype")), ConfigError, r"no torch_dtype there; choose one with --dtype"),
    "missing": (tensors(lambda t: t.pop(Q_BIAS)), WeightError, rf"missing tensors: {Q_BIAS}; download"),
    "missing head": (
        tensors(lambda t: t.pop("lm_head.weight")),
        WeightError,
        r"missing tensors: lm_head.weight.*tie_word_embeddings",
    ),
    "many missing": (
        config(lambda c: c.update(num_hidden_layers=9)),
        WeightError,
        r"missing tensors: model.layers.2.input.* and 78 more",
    ),
    "unused": (
        tensors(lambda t: t.update({"model.layers.0.lora_A": t[Q_BIAS]})),
        WeightError,
        r"no parameter of the model uses: model.layers.0.lora_A",
    ),
    "unused layers": (
        config(lambda c: c.update(num_hidden_layers=1)),
        WeightError,
        r"uses: model.layers.1.*and 6 more",
    ),
    "wrong shape": (
        tensors(lambda t: t.update({Q_BIAS: ("F32", [2, 32], t[Q_BIAS][2])})),
        WeightError,
        rf"{Q_BIAS}: got shape \[2, 32\], config.json wants \[64\]",
    ),
    "integers": (
        tensors(lambda t: t.update({Q_BIAS: ("I32", [64], t[Q_BIAS][2])})),
        WeightError,
        rf"{Q_BIAS}: got dtype I32, expected one of BF16, F16, F32",
    ),
    "GPTQ": (
        tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": ("I32", [1], b"0000")})),
        WeightError,
        r"up_proj.qweight\); GPTQ, AWQ and other quantized checkpoints are not supported yet",
    ),
    "twice under both names": (
        tensors(lambda t: t.update({Q_BIAS.replace("model.", "model.language_model."): t[Q_BIAS]})),
        WeightError,
        r"q_proj.bias is stored twice",
    ),
    "twice in the header": (twice_in_header, WeightError, r"v_proj.bias' appears twice"),
    "truncated": (truncate, WeightError, r"model.safetensors: got \d+ bytes, the header describes \d+: truncated"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), WeightError, r"0 bytes, truncated"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"),
        WeightError,
        r"not a safetensors file: copy or download",
    ),
    "pickled": (pickled, WeightError, r"pytorch_model.bin, a pickle.*convert it to safetensors"),
    "no weights": (drop("model.safetensors"), WeightError, r"neither model.safetensors nor model.safetensors.index"),
    "NaN": (tensors(set_value(Q_BIAS, np.nan)), WeightError, rf"{Q_BIAS} holds NaN or infinity"),
    "NaN in the patch embedding": (
        tensors(set_value("visual.patch_embed.proj.weight", -np.inf)),
        WeightError,
        r"patch_embed.proj.weight holds NaN",
    ),
    "no tokenizer": (drop("tokenizer.json"), ConfigError, r"tokenizer.json is missing; download"),
    "slow tokenizer only": (only_vocabulary, ConfigError, r"only vocab.json and merges.txt.*AutoTokenizer"),
    "no preprocessor": (drop("preprocessor_config.json"), ConfigError, r"preprocessor_config.json is missing"),
    "zero std": (
        preprocessor(image_std=[0.2, 0, 0.2]),
        ConfigError,
        r"image_std is \[0.2, 0.0, 0.2\], expected positive",
    ),
    "two means": (
        preprocessor(image_mean=[0.2, 0.1]),
        ConfigError,
        r"image_mean is \[0.2, 0.1\], expected three numbers",
    ),
    "text mean": (preprocessor(image_mean=["a", 0, 0]), ConfigError, r"image_mean is 'a', expected a finite number"),
    "zero rescale": (preprocessor(rescale_factor=0), ConfigError, r"rescale_factor is 0.0, expected a positive"),
    "flag": (preprocessor(do_rescale="yes"), ConfigError, r"do_rescale is 'yes', expected true or false"),
    "patch size": (preprocessor(patch_size=16), ConfigError, r"patch_size is 16, config.json says 14"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and an artifact made of it beside it."""
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(folder / "hf", tiny_config(), dtype="fp32", tokenizer=True)
    convert(folder / "hf", folder / "out", sync=False)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_checkpoint_is_one_clear_error_and_changes_nothing(good: Path, tmp_path: Path, case: str) -> None:
    damage, error, message = WRONG[case]
    shutil.copytree(good, tmp_path / "copy")
    before = contents(tmp_path / "copy" / "out")
    damage(tmp_path / "copy" / "hf")
    with pytest.raises(error, match=message):
        convert(tmp_path / "copy" / "hf", tmp_path / "copy" / "out", sync=False)
    assert contents(tmp_path / "copy" / "out") == before
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["hf", "out"]


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [(7e4, "fp16", False), (7e4, "bf16", True), (3.4e38, "bf16", False), (-7e4, "fp16", False)],
)
def test_a_value_that_overflows_the_new_dtype_names_its_tensor(
    good: Path, tmp_path: Path, value: float, dtype: str, fits: bool
) -> None:
    shutil.copytree(good / "hf", tmp_path / "hf")
    rewrite(tmp_path / "hf/model.safetensors", set_value(Q_WEIGHT, value))
    if fits:
        convert(tmp_path / "hf", tmp_path / "out", dtype, sync=False)
        return
    with pytest.raises(WeightError, match=rf"{Q_WEIGHT} holds values of F32 that .* cannot represent"):
        convert(tmp_path / "hf", tmp_path / "out", dtype, sync=False)
    assert not (tmp_path / "out").exists()


def test_an_unknown_dtype_names_the_known_ones(good: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"--dtype int8: expected one of bf16, fp16, fp32"):
        convert(good / "hf", tmp_path / "out", "int8")


def test_a_missing_tensor_is_named_as_the_checkpoint_names_things(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(), names="new", tokenizer=True)
    rewrite(tmp_path / "hf/model.safetensors", lambda t: t.pop("model.visual.merger.ln_q.bias"))
    with pytest.raises(WeightError, match=r"missing tensors: model.visual.merger.ln_q.bias"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_rotary_buffers_of_old_checkpoints_are_ignored(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "hf", tmp_path / "hf")
    buffer = ("F32", [8], bytes(32))
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq")
    rewrite(tmp_path / "hf/model.safetensors", lambda t: t.update(dict.fromkeys(names, buffer)))
    result = convert(tmp_path / "hf", tmp_path / "out", sync=False)
    for entry in result.weights.files:
        assert (tmp_path / "out" / entry.path).read_bytes() == (good / "out" / entry.path).read_bytes()


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config(tie_word_embeddings=True), stored_head=True, tokenizer=True)

    def change(stored: dict[str, tuple[str, list[int], bytes]]) -> None:
        dtype, shape, content = stored["lm_head.weight"]
        stored["lm_head.weight"] = (dtype, shape, content[:-2] + b"\0\0")

    rewrite(tmp_path / "hf/model.safetensors", change)
    with pytest.raises(
        WeightError, match=r"lm_head.weight differs from model.embed_tokens.weight, but config.json ties"
    ):
        convert(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_tied_head_may_be_of_another_dtype_if_it_has_the_same_values(tmp_path: Path, dtype: str, layout: str) -> None:
    config = tiny_config(tie_word_embeddings=True)
    write_checkpoint(tmp_path / "hf", config, dtype=dtype, layout=layout, stored_head=True, tokenizer=True)
    convert(tmp_path / "hf", tmp_path / "same", sync=False)
    numpy = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[dtype]

    def widen(stored: dict[str, tuple[str, list[int], bytes]], change: float = 0.0) -> None:
        _, shape, content = stored["model.embed_tokens.weight"]
        values = np.frombuffer(content, numpy).astype(np.float32)
        values[-1] += change
        stored["lm_head.weight"] = ("F32", shape, values.tobytes())

    rewrite(tmp_path / "hf/model.safetensors", widen)
    convert(tmp_path / "hf", tmp_path / "out", sync=False)
    for path in (tmp_path / "same/weights").iterdir():
        assert (tmp_path / "out/weights" / path.name).read_bytes() == path.read_bytes()
    # less than a bf16 or fp16 could tell
    rewrite(tmp_path / "hf/model.safetensors", lambda stored: widen(stored, 1e-4))
    with pytest.raises(WeightError, match=r"lm_head.weight differs from model.embed_tokens.weight.*set tie_word"):
        convert(tmp_path / "hf", tmp_path / "out", sync=False)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("files", [["adapter_config.json", "adapter_model.safetensors"], ["adapter_config.json"]])
@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_called_one(good: Path, tmp_path: Path, files: list[str], whole: bool, with_config: bool) -> None:
    shutil.copytree(good / "hf", tmp_path / "hf")
    for name in files:
        (tmp_path / "hf" / name).write_text("{}")
    if not whole:
        (tmp_path / "hf" / "model.safetensors").unlink()
    if not with_config:
        (tmp_path / "hf" / "config.json").unlink()
    said = (
        "a whole model and an adapter .*merge" if whole else r"an adapter \(LoRA\), not a model; merge it into its base"
    )
    with pytest.raises(WeightError, match=said):
        convert(tmp_path / "hf", tmp_path / "out", sync=False)


def sharded(folder: Path) -> Path:
    write_checkpoint(folder / "hf", tiny_config(), shards=3, tokenizer=True)
    return folder / "hf"


def test_an_index_that_names_an_absent_file_is_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightError, match=r"absent: model-00002-of-00003.safetensors; download"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_an_index_that_contradicts_the_shards_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path) / "model.safetensors.index.json"
    edit_json(index, lambda plain: plain["weight_map"].update({Q_BIAS: "model-00003-of-00003.safetensors"}))
    with pytest.raises(WeightError, match=rf"{Q_BIAS} is in model-00003.*but it is in model-0000"):
        convert(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ""])
def test_an_index_cannot_lead_out_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    index = sharded(tmp_path) / "model.safetensors.index.json"
    edit_json(index, lambda plain: plain["weight_map"].update({Q_BIAS: name}))
    with pytest.raises(WeightError, match="not the name of a file beside it"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    stored: dict[str, Any] = {}
    rewrite(folder / "model-00002-of-00003.safetensors", stored.update)
    name = next(iter(stored))
    rewrite(folder / "model-00003-of-00003.safetensors", lambda t: t.update({name: stored[name]}))
    with pytest.raises(WeightError, match=rf"{name} is stored twice: in .*00002-of.* and in .*00003-of"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_weights_that_are_no_file_are_refused_without_waiting(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    folder = sharded(tmp_path)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(WeightError, match=rf"{name}: is not a regular file"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]
)
def test_weights_that_are_a_link_to_nothing_are_not_passed_over(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("absent")
    with pytest.raises(WeightError, match=name):
        convert(folder, tmp_path / "out")


def test_weights_may_be_links_to_files_elsewhere(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "hf", tmp_path / "hf")
    shutil.move(tmp_path / "hf/model.safetensors", tmp_path / "elsewhere")
    (tmp_path / "hf/model.safetensors").symlink_to("../elsewhere")
    convert(tmp_path / "hf", tmp_path / "out", sync=False)


@pytest.mark.parametrize("most", [1000, 60_000])
def test_a_limit_on_the_size_of_files_is_told_with_the_file(good: Path, tmp_path: Path, most: int) -> None:
    program = (
        "import resource, sys\nfrom qwen2vl_tc.toolchain.cli.main import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
        f"sys.argv = ['qwen2vl-tc', 'convert', '--src', {str(good / 'hf')!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.search(r"/weights/model-\S+: cannot be written as large as it must be; raise .*ulimit -f", done.stderr)
    assert not (tmp_path / "out").exists()
