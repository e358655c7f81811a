"""What the commands say of a checkpoint whose files contradict each other, and the cache's default length."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.errors import TargetError
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.toolchain.build.compile import CompileOptions, cache_length
from qwen2vl_tc.toolchain.build.onnx import OnnxOptions

from .conftest import Run


@pytest.mark.parametrize(("most", "length"), [(64, 64), (8192, 8192), (32768, 8192)])
def test_the_cache_has_8192_positions_or_as_many_as_the_model_was_made_for(most: int, length: int) -> None:
    config = config_from_hf(tiny_config(max_position_embeddings=most))
    assert cache_length(None, config) == length
    assert cache_length(most, config) == most
    CompileOptions().check(config)
    OnnxOptions().check(config)
    for options in (CompileOptions(max_length=most + 1), OnnxOptions(max_length=most + 1)):
        with pytest.raises(TargetError, match=rf"--max-length {most + 1}: expected 2 to {most}, the model's max_pos"):
            options.check(config)


def test_a_model_for_fewer_positions_compiles_without_options(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    result = run("compile", "--config", tmp_path / "config.json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    part = read_manifest(tmp_path / "out").ge
    assert part is not None and part.max_length == 64


def test_convert_says_which_of_two_files_counts(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "hf")
    quiet = run("convert", "--src", source, "--out", tmp_path / "out", "--no-sync")
    assert quiet.exit_code == 0 and "counts" not in quiet.stderr
    (source / "chat_template.jinja").write_text("another")
    said = run("convert", "--src", source, "--out", tmp_path / "out", "--no-sync")
    assert said.exit_code == 0, said.output
    assert "that of chat_template.json counts" in " ".join(said.stderr.split())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rms_norm_eps", "1e-6", "rms_norm_eps is '1e-6', expected a positive number"),
        ("torch_dtype", ["bfloat16"], "torch_dtype is ['bfloat16'], expected one of"),
        ("model_type", {}, "model_type {} is not supported"),
        ("text_config", [], "text_config is [], expected a JSON object"),
    ],
)
def test_a_value_of_a_wrong_type_ends_convert_with_exit_code_2(
    checkpoint: Path, tmp_path: Path, run: Run, name: str, value: object, said: str
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, name: value}))
    result = run("convert", "--src", source, "--out", tmp_path / "out", "--no-sync")
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
