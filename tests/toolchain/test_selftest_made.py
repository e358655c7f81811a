"""The self-test's making: by verify from transformers, by --make from the reference in fp32; and its file."""

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import published, tiny_config
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError
from qwen2vl_tc.artifacts.integrity import hash_bytes
from qwen2vl_tc.artifacts.manifest import OwnError, SelftestPart
from qwen2vl_tc.artifacts.safetensors import read_header
from qwen2vl_tc.artifacts.schema import from_plain
from qwen2vl_tc.artifacts.staging import stage
from qwen2vl_tc.artifacts.store import Artifact, open_artifact, read_manifest
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.backends.base import Step
from qwen2vl_tc.runtime.backends.reference import ReferenceBackend
from qwen2vl_tc.runtime.models import config_from_hf, config_of
from qwen2vl_tc.runtime.ops import mat_mul
from qwen2vl_tc.toolchain.selftest import inputs as inputs_module
from qwen2vl_tc.toolchain.selftest import wide
from qwen2vl_tc.toolchain.selftest.compare import FLOOR, distance, limit_of
from qwen2vl_tc.toolchain.selftest.file import from_bytes, to_bytes
from qwen2vl_tc.toolchain.selftest.inputs import SCRIPTS, VISUAL_CALLS, make_inputs
from qwen2vl_tc.toolchain.selftest.known import Known, known_of
from qwen2vl_tc.toolchain.selftest.make import SELFTEST_PATH, by_reference, by_transformers
from qwen2vl_tc.toolchain.selftest.observe import KINDS, Observed, _groups, observe
from qwen2vl_tc.toolchain.verify.report import VerifyReport
from qwen2vl_tc.toolchain.verify.verify import store_report, verify, with_selftest

from .conftest import TINY, Run

CONFIG = config_from_hf(TINY)


def silent(step: str, done: int, total: int) -> None:
    pass


def part_of(path: Path) -> SelftestPart:
    part = read_manifest(path).selftest
    assert part is not None
    return part


def stored(path: Path) -> tuple[Known, bytes]:
    with open_artifact(path) as artifact:
        data = artifact.read(part_of(path).file)
        return from_bytes(data, config_of(artifact.manifest), "here"), data


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """The verified fp32 artifact, to change."""
    return Path(copytree(built, tmp_path / "artifact"))


def test_build_stores_what_transformers_said_and_the_reference_is_within_rounding_of_it(built: Path, run: Run) -> None:
    part = part_of(built)
    assert (part.source, part.file.path) == ("transformers", SELFTEST_PATH)
    assert part.file.bytes < 1 << 20
    for own in (part.visual, part.prefill, part.decode):
        assert 0 < own.rms < FLOOR.rms / 5, "fp32 against fp32: the limit is the floor"
    result = run("selftest", built)
    assert result.exit_code == 0, result.output
    assert "what transformers computed in fp32" in result.stdout
    assert "not covered: a mask that is ignored beyond position 512" in result.stdout
    line = next(line for line in run("inspect", built).stdout.splitlines() if "self-test" in line)
    assert "answers by transformers" in line


def test_the_reference_alone_makes_the_self_test_that_transformers_makes(copy: Path, run: Run) -> None:
    known, _ = stored(copy)
    result = run("selftest", copy, "--make")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"next: qwen2vl-tc selftest {copy}\n")
    assert part_of(copy).source == "reference"
    made, data = stored(copy)
    assert [sorted(p.name for p in (copy / "selftest").iterdir())] == [["selftest.safetensors"]]
    assert made.answers.keys() == known.answers.keys()
    for mine, theirs in zip(made.columns, known.columns, strict=True):
        assert np.array_equal(mine, theirs)
    for call, answer in known.answers.items():
        np.testing.assert_allclose(made.answers[call].values, answer.values, atol=FLOOR.rms * answer.std)
    assert to_bytes(made) == data
    with open_artifact(copy) as artifact:
        artifact.check_all()
    assert read_manifest(copy).verification == "passed", "the rest of the artifact is as it was"


def test_in_half_precision_the_widened_reference_is_nearer_to_transformers_than_to_itself_unwidened(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers carry the weights' rounding, as transformers' do, and none of the arithmetic's."""
    monkeypatch.setattr(inputs_module, "_LONGEST", 64)
    source, path = build("npu", tiny_config(), dtype="bf16", batches="1,3", max_length=2048)
    with open_artifact(path) as artifact:
        theirs, mine = by_transformers(artifact, source), by_reference(artifact, silent)
    for kind in KINDS:
        assert mine.own[kind].rms == pytest.approx(theirs.own[kind].rms, rel=0.5)
    for call, answer in theirs.known.answers.items():
        output = mine.known.answers[call].values
        rms = float(np.sqrt(np.square((output - answer.values) / answer.std).mean()))
        assert rms < 0.5 * theirs.own["visual" if call[0] < 0 else "prefill"].rms


class Widened(TorchDispatchMode):
    """How many values at a time became fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


def test_weights_are_widened_a_block_at_a_time(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No whole weight, and no table of embeddings, stands in memory as fp32."""
    _, path = build("npu", tiny_config(), dtype="bf16", batches="1,3", max_length=2048)
    block = 2048
    with open_artifact(path) as artifact:
        inputs = make_inputs(config_of(artifact.manifest), 64)
        monkeypatch.setattr(mat_mul, "_WIDENED_VALUES", block)
        backend = wide.WideBackend(artifact)
        cache = backend.allocate(1)
        assert cache.keys[0].dtype == torch.float32
        script = inputs.scripts[1]
        with Widened() as seen:
            places = script.positions[:, :7]
            backend.prefill(cache, 0, 0, script.token_ids[:7], places, None, np.zeros(0, np.int64))
        text = config_of(artifact.manifest).text
    smallest = text.hidden_size * text.kv_dim
    assert seen.largest <= block <= smallest < text.vocab_size * text.hidden_size


def test_a_cache_too_short_for_it_is_said_and_the_verification_stands(built: Path, checkpoint: Path) -> None:
    passed = from_plain(VerifyReport, json.loads((built / "reports/verify.json").read_text()), "report")
    with open_artifact(built) as artifact:
        assert artifact.manifest.ge is not None
        ge = dataclasses.replace(artifact.manifest.ge, max_length=40)
        short = Artifact(artifact.path, dataclasses.replace(artifact.manifest, ge=ge), "", {})
        report, selftest = with_selftest(short, checkpoint, "ge", passed)
    assert selftest is None and report.passed
    assert report.notes[-1].startswith("no self-test: the self-test needs a cache of ")
    with pytest.raises(TargetError, match=r"the self-test needs a cache of \d+ tokens, the artifact has 40; compile"):
        make_inputs(CONFIG, 40)
    assert make_inputs(CONFIG, 64).longest() == 64
    (missing,) = make_inputs(CONFIG, 512).not_covered()
    assert "position 512" in missing
    assert make_inputs(CONFIG, 640).not_covered() == ()


@pytest.mark.parametrize("size", ["2b", "7b", "72b"])
def test_it_takes_a_few_megabytes_at_any_size(size: str) -> None:
    config = config_from_hf(published(size))
    inputs = make_inputs(config, 8192)
    random = np.random.default_rng(0)
    outputs = {}
    for i, each in enumerate(inputs.visual):
        rows = len(each.patches) // config.vision.spatial_merge_size**2
        outputs[-1, i] = random.standard_normal((rows, config.text.hidden_size)).astype(np.float32)
    for i, script in enumerate(inputs.scripts):
        for j in range(len(script.read())):
            outputs[i, j] = random.standard_normal((1, config.text.vocab_size)).astype(np.float32)
    known = known_of(inputs, outputs)
    data = to_bytes(known)
    assert len(data) < 2_000_000
    assert to_bytes(from_bytes(data, config, "here")) == data
    # a tile of a matrix product is 128 columns: wherever one of the logits is wrong, it is seen
    limit = limit_of(OwnError(0.01, 0.05))
    for begin in (0, 70_000, config.text.vocab_size - 128):
        wrong = outputs[1, 0].copy()
        wrong[0, begin : begin + 128] *= -1
        assert not distance(known, Observed("prefill", (1, 0), "", 0, wrong, 0)).within(limit)
    assert distance(known, Observed("prefill", (1, 0), "", 0, outputs[1, 0], 0)).within(OwnError(1e-6, 1e-6))


def test_rows_of_a_batch_have_different_requests_beside_each_other_and_every_request_runs() -> None:
    for batch in (1, 2, 3, 4, 7):
        groups = list(_groups(batch))
        assert {script for group in groups for script in group} == set(range(len(SCRIPTS)))
        assert max(map(len, groups)) == batch
        assert all(a != b for group in groups for a, b in pairwise(group))


def test_new_weights_drop_the_self_test(copy: Path, checkpoint: Path, run: Run) -> None:
    result = run("convert", "--src", checkpoint, "--out", copy, "--no-sync")
    assert result.exit_code == 0, result.output
    assert read_manifest(copy).selftest is None
    assert not (copy / "selftest").exists()
    result = run("selftest", copy)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "has no self-test; run `qwen2vl-tc verify" in line and f"`qwen2vl-tc selftest {copy} --make`" in line
    line = next(line for line in run("inspect", copy).stdout.splitlines() if "self-test" in line)
    assert "none" in line


def test_a_failed_verification_leaves_no_self_test(copy: Path, checkpoint: Path) -> None:
    with open_artifact(copy) as artifact:
        failed = dataclasses.replace(verify(artifact, checkpoint, steps=1), passed=False)
        report, selftest = with_selftest(artifact, checkpoint, "ge", failed)
    assert report == failed and selftest is None
    with stage(copy, sync=False) as staging:
        assert staging.base is not None
        manifest = store_report(staging, staging.base, "ge", report, selftest)
    assert (manifest.verification, manifest.selftest) == ("failed", None)


@pytest.mark.parametrize("words", [("--make", "--json"), ("--make", "--backend", "reference")])
def test_what_make_does_not_take_is_refused(copy: Path, run: Run, words: tuple[str, ...]) -> None:
    result = run("selftest", copy, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--make takes no --backend" in result.stderr


Change = Callable[[dict[str, Any]], None]


def resized(name: str, *shape: int) -> Change:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = np.resize(tensors[name], shape)

    return change


def filled(name: str, value: float) -> Change:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = np.full_like(tensors[name], value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("visual.0.patches"), "has no tensor visual.0.patches"),
        (lambda t: t.update(more=np.zeros(1, np.int64)), "tensor more is none of the self-test's"),
        (filled("visual.1.grids", 0), "tensor visual.1.grids is empty, or holds a number outside"),
        (filled("visual.1.grids", 3), "grid .* multiples of 2"),
        (filled("visual.1.grids", 1 << 15), "visual.1.grids are of .* patches"),
        (resized("visual.0.patches", 7, 1176), r"tensor visual.0.patches is \[7, 1176\], expected"),
        (filled("scripts.0.token_ids", 1 << 40), "tensor scripts.0.token_ids is empty, or holds a number outside"),
        (filled("scripts.0.token_ids", 5), "placeholders, which are not its pictures"),
        (filled("scripts.2.turns", 9), "scripts.2.turns do not fit"),
        (filled("scripts.1.turns", -1), "scripts.1.turns do not fit"),
        (resized("scripts.1.token_ids", 0), "tensor scripts.1.token_ids is empty"),
        (filled("scripts.1.values", np.nan), "scripts.1 expects what is not finite"),
        (filled("visual.0.std", 0), "visual.0 expects what is not finite, or one number"),
        (filled("logits.columns", 320), "tensor logits.columns is empty, or holds a number outside 0 to 319"),
    ],
)
def test_a_file_that_is_no_self_test_is_one_error(built: Path, change: Change, message: str) -> None:
    _, data = stored(built)
    tensors = load_tensors(data)
    change(tensors)
    with pytest.raises(ArtifactError, match=f"here: .*{message}.*; make it again with `qwen2vl-tc selftest"):
        from_bytes(save_tensors(tensors), CONFIG, "here")


def test_a_damaged_file_and_an_impossible_error_are_refused_with_code_2(copy: Path, run: Run) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    path = copy / SELFTEST_PATH
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = run("selftest", copy)
    assert result.exit_code == 2 and "altered or damaged" in result.stderr
    manifest["selftest"]["file"]["hash"] = hash_bytes(bytes(data))
    manifest["selftest"]["decode"]["rms"] = 2.0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = run("selftest", copy)
    assert result.exit_code == 2
    assert "selftest.decode is an error of 2 (RMS)" in result.stderr.splitlines()[-1]


def test_the_file_is_safetensors_that_any_reader_opens(built: Path) -> None:
    _, data = stored(built)
    names = {info.name for info in read_header(data, "here")}
    assert {f"visual.{i}.patches" for i in range(len(VISUAL_CALLS))} < names
    assert {f"scripts.{i}.token_ids" for i in range(len(SCRIPTS))} < names


def test_the_decode_steps_follow_the_graph_s_own_positions(build: Any) -> None:
    """As the runtime does: a graph that counts wrongly is seen from its second step on."""
    _, path = build("npu", tiny_config(), dtype="bf16", batches="1,3", max_length=2048)
    fed: list[list[int]] = []
    model = load(path, "reference")
    backend: Any = model.backend
    decode = ReferenceBackend.decode

    def recorded(cache: Any, step: Step, lengths: list[int]) -> Step:
        # of each row what its first head turns by
        fed.append(step.positions[:, 0].tolist())
        out = decode(backend, cache, step, lengths)
        return dataclasses.replace(out, positions=out.positions + 100 * (out.positions < backend.max_length))

    backend.decode = recorded
    list(observe(backend, config_of(model.manifest), make_inputs(config_of(model.manifest), 64), [3]))
    first, second = fed[:2]
    assert [b - a for a, b in zip(first, second, strict=True)] == [101] * 3
