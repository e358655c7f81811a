"""verify fails ONNX models whose files are whole and whose numbers are not: each of its gates, by its sentence."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import onnx_artifact
from helpers.altered import Arrays, altered_onnx
from helpers.synthetic import tiny_config, write_checkpoint
from safetensors.numpy import load_file, save_file

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.runtime import load
from qwen2vl_tc.toolchain.build.onnx import OnnxOptions
from qwen2vl_tc.toolchain.verify.compare import compare, output_departs
from qwen2vl_tc.toolchain.verify.report import VerifyReport
from qwen2vl_tc.toolchain.verify.tolerances import TOLERANCES

from .conftest import Run

# of the two rows of a pair in the output layer: a logit of 15, and one 0.15 below it
SECOND = 0.99
SENTENCE = re.compile(
    r"FAILED: next tokens depart from transformers', KL divergence (\S+) nats \(at most (\S+)\), the same first choice "
    r"in (\d+)% \(at least (\d+)%\)"
)

Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an output layer of its own, tokens in pairs: where one of them leads, the other is second."""
    folder = write_checkpoint(tmp_path_factory.mktemp("gates") / "hf", tiny_config(), dtype="fp32", tokenizer=True)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"][1::2] = SECOND * tensors["lm_head.weight"][::2]
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def exported(source: Path, run: Run) -> Exported:
    """exported(kind of weights) to an artifact; cached."""
    traced = source.parent / "traced"
    for words in (("convert", "--src", source, "--no-sync", "--out", traced), ("compile", traced)):
        assert run(*words).exit_code == 0

    def make(weights: str) -> Path:
        out = source.parent / weights
        return out if out.exists() else onnx_artifact.exported(traced, out, OnnxOptions(weights, max_length=512))

    return make


def verdict(run: Run, artifact: Path, source: Path) -> tuple[int, str]:
    """Exit code and last line of `verify`; the artifact keeps the same verdict."""
    result = run("verify", artifact, "--against", source)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["onnx"]["verification"] == ("failed" if result.exit_code else "passed"), result.output
    return result.exit_code, result.stdout.splitlines()[-1]


def failed_by(run: Run, artifact: Path, source: Path) -> Iterator[float]:
    """What `verify` says as it fails next tokens: divergence and what is allowed, equal first choices and the least."""
    code, line = verdict(run, artifact, source)
    found = SENTENCE.fullmatch(line)
    assert code == 1 and found, line
    return map(float, found.groups())


def off_by_a_little(arrays: Arrays) -> None:
    arrays["lm_head.weight"][5, 7] += 0.01


def second_tokens_fall_behind(weights: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        # less than the errors of its kind that every single output may have
        arrays["lm_head.weight.scales"][1::2] *= {"int8": 0.96, "int4": 0.85}[weights]

    return change


def second_tokens_come_first(arrays: Arrays) -> None:
    scales = arrays["lm_head.weight.scales"]
    scales[::2], scales[1::2] = scales[1::2].copy(), scales[::2].copy()


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_a_right_export_passes(weights: str, exported: Exported, source: Path, run: Run) -> None:
    code, line = verdict(run, exported(weights), source)
    assert code == 0 and line.startswith("verified: "), line


def test_fp32_fails_beyond_its_largest_error(exported: Exported, source: Path, run: Run, tmp_path: Path) -> None:
    artifact = altered_onnx(exported("fp32"), tmp_path / "wrong", "text", off_by_a_little)
    code, line = verdict(run, artifact, source)
    assert code == 1
    found = re.match(
        r"FAILED: (prefill|decode) \(.*\): its output departs \(max error (\S+), expected at most 0\.0001\)", line
    )
    assert found and 1e-4 < float(found[2]) < 0.1, line
    with pytest.raises(ArtifactError, match=r"its verification failed, see reports/verify-onnx\.json"):
        load(artifact)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_models_fail_by_their_divergence_alone(
    weights: str, exported: Exported, source: Path, run: Run, tmp_path: Path
) -> None:
    change = second_tokens_fall_behind(weights)
    artifact = altered_onnx(exported(weights), tmp_path / "wrong", "text", change)
    kl, most, top1, least = failed_by(run, artifact, source)
    assert kl > most and top1 >= least


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_models_fail_by_their_first_choices_alone(
    weights: str, exported: Exported, source: Path, run: Run, tmp_path: Path
) -> None:
    artifact = altered_onnx(exported(weights), tmp_path / "wrong", "text", second_tokens_come_first)
    kl, most, top1, least = failed_by(run, artifact, source)
    assert kl <= most and top1 < least


def embeddings_are_too_small(arrays: Arrays) -> None:
    weight = arrays["visual.merger.mlp.2.weight.quantized"]
    weight[:] = np.rint(0.9 * weight)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_vision_tower_is_held_to_limits_of_its_own(
    weights: str, exported: Exported, source: Path, run: Run, tmp_path: Path
) -> None:
    artifact = altered_onnx(exported(weights), tmp_path / "wrong", "visual", embeddings_are_too_small)
    code, line = verdict(run, artifact, source)
    assert code == 1
    found = re.fullmatch(
        r"FAILED: visual \(.*\): its output departs \(relative RMS error (\S+), expected at most 0\.05\)", line
    )
    assert found and 0.05 < float(found[1]) < 0.15, line


def test_a_cosine_that_is_too_small_is_named_and_not_an_error_that_is_allowed() -> None:
    bounds = TOLERANCES["int8"]
    original, across = np.float32([1, 1, -1, -1]), np.float32([1, -1, 1, -1])
    failed = compare("case", "prefill", None, original + 0.146 * across, original, bounds, None)
    departure = output_departs(failed)
    report = VerifyReport(False, "", "", "int8", "", {}, 1, bounds, 0, (), (), (), (failed,), 0, departure)
    assert report.conclusion.endswith("its output departs (cosine 0.98951, expected at least 0.99)")
