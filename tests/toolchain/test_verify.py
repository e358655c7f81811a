"""verify passes what is right, fails what is wrong by one row, and says where."""

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.altered import Change, Tensors, altered, rewritten
from helpers.synthetic import tiny_config, write_checkpoint
from rich.console import Console

from qwen2vl_tc.artifacts.errors import ArtifactError, ConfigError, TargetError
from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.artifacts.manifest import Manifest
from qwen2vl_tc.artifacts.schema import from_plain
from qwen2vl_tc.artifacts.store import open_artifact, read_manifest
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.backends.reference import ReferenceBackend
from qwen2vl_tc.runtime.loader import open_processor
from qwen2vl_tc.runtime.models import config_of, qwen2_vl
from qwen2vl_tc.runtime.models.base import GraphOptions
from qwen2vl_tc.runtime.models.positions import rope_positions
from qwen2vl_tc.toolchain.build.compile import CompileOptions, compile_artifact
from qwen2vl_tc.toolchain.models.build import constant_tables
from qwen2vl_tc.toolchain.verify import verify as module
from qwen2vl_tc.toolchain.verify.cases import make_cases
from qwen2vl_tc.toolchain.verify.compare import compare, second_opinion
from qwen2vl_tc.toolchain.verify.reference import trained_positions
from qwen2vl_tc.toolchain.verify.render import render
from qwen2vl_tc.toolchain.verify.report import VerifyReport
from qwen2vl_tc.toolchain.verify.subjects import PARTS, ge_memory
from qwen2vl_tc.toolchain.verify.tolerances import TOLERANCES
from qwen2vl_tc.toolchain.verify.verify import verify, verify_artifact
from qwen2vl_tc.toolchain.weights.convert import convert

STEPS = 4
REPORT_PATH = PARTS["ge"].report_path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # threads that wait for each other on a busy machine cost a tiny model many times its arithmetic
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("verify") / "hf", tiny_config(), dtype="fp32", tokenizer=True)


def built(source: Path, dtype: str, options: CompileOptions) -> Path:
    out = source.parent / dtype
    convert(source, out, dtype, sync=False)
    compile_artifact(out, options, sync=False)
    return out


@pytest.fixture(scope="module")
def fp32(source: Path) -> Path:
    # the other form of the graphs than bf16 below: landmarks are found in both
    options = CompileOptions(max_length=256, batches=(1, 2), operators="recipe", visual_attention="tnd")
    return built(source, "fp32", options)


@pytest.fixture(scope="module")
def bf16(source: Path) -> Path:
    return built(source, "bf16", CompileOptions(max_length=256))


def verified(artifact: Path, against: Path, steps: int = STEPS) -> VerifyReport:
    with open_artifact(artifact) as opened:
        return verify(opened, against, steps=steps)


def swapped_rows(name: str, first: int = 1, second: int = 2) -> Change:
    def change(tensors: Tensors, manifest: Manifest) -> None:
        if name in tensors:
            order = list(range(len(tensors[name])))
            order[first], order[second] = second, first
            tensors[name] = tensors[name][order].contiguous()

    return change


def up_before_gate(tensors: Tensors, manifest: Manifest) -> None:
    name = "model.layers.0.mlp.gate_up_proj.weight"
    if name in tensors:
        tensors[name] = torch.cat(tensors[name].chunk(2)[::-1]).contiguous()


def half_the_rope_theta(tensors: Tensors, manifest: Manifest) -> None:
    if "text_rope" in tensors:
        config = config_of(manifest)
        text = dataclasses.replace(config.text, rope_theta=config.text.rope_theta / 2)
        old = tensors["text_rope"]
        wrong = constant_tables(dataclasses.replace(config, text=text), GraphOptions(len(old) - 1), "fp32")
        tensors["text_rope"] = wrong["text_rope"].to(old.dtype)


def rows_for_columns(tensors: Tensors, manifest: Manifest) -> None:
    if "vision_rope_axes" in tensors:
        tensors["vision_rope_axes"] = tensors["vision_rope_axes"].flip(0).contiguous()


def not_a_number(tensors: Tensors, manifest: Manifest) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    if name in tensors:
        tensors[name] = torch.full_like(tensors[name], float("nan"))


WRONG: dict[str, tuple[Change, str, str]] = {
    "two rows of o_proj": (
        swapped_rows("model.layers.1.self_attn.o_proj.weight"),
        "prefill",
        "layers.1.self_attn.o_proj",
    ),
    "two rows of down_proj": (swapped_rows("model.layers.0.mlp.down_proj.weight"), "prefill", "layers.0.mlp.down_proj"),
    "two rows of q": (swapped_rows("model.layers.1.self_attn.qkv_proj.weight"), "", "layers.1.self_attn.qkv_proj"),
    "gate and up": (up_before_gate, "prefill", "layers.0.mlp.gate_up_proj"),
    "two tokens of the head": (swapped_rows("lm_head.weight", 40, 41), "prefill", "lm_head"),
    "rope theta": (half_the_rope_theta, "prefill", "layers.0.self_attn: keys after the rotary embedding"),
    "the vision rotary's axes": (rows_for_columns, "visual", "visual.blocks.0.attn.proj (the attention's output)"),
    "two rows of the patch embedding": (swapped_rows("visual.patch_embed.weight"), "visual", "visual.patch_embed"),
    "two rows of a vision MLP": (swapped_rows("visual.blocks.1.mlp.fc1.weight"), "visual", "visual.blocks.1.mlp.fc1"),
    "a weight that is NaN": (not_a_number, "prefill", "layers.1.mlp.down_proj"),
}


def test_a_right_fp32_artifact_is_verified_in_every_graph_and_keeps_the_report(
    fp32: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = Path(shutil.copytree(fp32, tmp_path / "artifact"))
    before = read_manifest(artifact)
    seen: list[tuple[int, int]] = []
    report = verify_artifact(artifact, source, progress=lambda what, done, total: seen.append((done, total)))
    assert capsys.readouterr().out == ""
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]

    assert report.passed and report.conclusion.startswith("verified: ")
    covered = {(each.case, each.graph) for each in report.comparisons}
    graphs = ("visual", "prefill", "decode_b1", "decode_b2")
    cases = ("one image", "two images", "a clip", "text only")
    assert covered == {(case, graph) for case in cases for graph in graphs} - {("text only", "visual")}
    decoded = [each for each in report.comparisons if (each.case, each.graph) == ("two images", "decode_b2")]
    assert [each.step for each in decoded] == list(range(1, 17))
    assert all(each.max_error is not None and each.max_error < 1e-4 for each in report.comparisons)
    assert all(each.top1 for each in report.comparisons if each.graph != "visual")
    # logits as large as a real model's: an error of 1e-4 means something
    assert all(each.std > 2 for each in report.comparisons if each.graph != "visual")

    manifest = read_manifest(artifact)
    assert manifest.verification == "passed"
    assert [entry.path for entry in manifest.reports] == [REPORT_PATH]
    assert manifest.selftest is not None and manifest.selftest.source == "transformers"
    added = {*manifest.reports, manifest.selftest.file}
    assert set(manifest.files()) - added == set(before.files())
    stored = from_plain(VerifyReport, json.loads((artifact / REPORT_PATH).read_bytes()), "verify.json")
    assert stored == report
    assert str(tmp_path) not in (artifact / REPORT_PATH).read_text()
    with open_artifact(artifact) as opened:
        opened.check_all()


def test_a_right_bf16_artifact_of_an_fp32_checkpoint_is_verified_with_its_intermediates(
    bf16: Path, source: Path
) -> None:
    report = verified(bf16, source, steps=16)
    assert report.passed, report.conclusion
    assert report.intermediates > 50
    assert f"{report.intermediates} intermediates" in report.conclusion


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("change", "graph", "landmark"), WRONG.values(), ids=WRONG)
def test_an_artifact_with_right_hashes_and_wrong_numbers_fails_and_says_where(
    change: Change, graph: str, landmark: str, dtype: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    report = verified(altered(request.getfixturevalue(dtype), tmp_path / "wrong", change), source)
    assert not report.passed
    assert report.departure is not None and report.departure.landmark is not None
    assert report.departure.landmark.removeprefix("the input of ") == landmark
    assert report.departure.graph == graph or not graph
    assert report.conclusion.startswith(f"FAILED: {report.departure.graph} (")
    assert f"first departs at {report.departure.landmark}" in report.conclusion


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=["NaN", "infinity", "overflow"])
def test_numbers_that_are_not_finite_fail_where_they_first_appear(
    value: float, fp32: Path, source: Path, tmp_path: Path
) -> None:
    def change(tensors: Tensors, manifest: Manifest) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        if name in tensors:
            tensors[name] = tensors[name].index_fill(0, torch.tensor(3), value)

    report = verified(altered(fp32, tmp_path / "wrong", change), source)
    assert not report.passed and report.departure is not None
    assert report.departure.landmark == "layers.1.mlp.down_proj"
    assert report.departure.max_error is None or report.departure.max_error > 1e30
    assert "first departs at layers.1.mlp.down_proj" in report.conclusion


def test_a_wrong_decode_graph_fails_where_prefill_is_right(fp32: Path, source: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(fp32, tmp_path / "wrong"))
    manifest = read_manifest(artifact)
    assert manifest.ge
    graphs = {graph.name: graph for graph in manifest.ge.graphs}
    model = message_class("ModelDef").FromString((artifact / graphs["decode_b1"].graph.path).read_bytes())
    attentions = [op for op in model.graph[0].op if op.type == "IncreFlashAttention"]
    attentions[1].attr["scale_value"].f *= 2
    entry = rewritten(artifact, graphs["decode_b1"].graph, model.SerializeToString())
    graphs["decode_b1"] = dataclasses.replace(graphs["decode_b1"], graph=entry)
    ge = dataclasses.replace(manifest.ge, graphs=tuple(graphs.values()))
    (artifact / "manifest.json").write_bytes(dataclasses.replace(manifest, ge=ge).to_bytes())

    report = verified(artifact, source)
    assert {each.graph for each in report.comparisons if not each.passed} == {"decode_b1"}
    assert "decode_b1 (one image, step 1): first departs at the input of layers.1.self_attn.o_proj" in report.conclusion


def test_a_graph_that_chooses_another_token_than_its_largest_logit_fails(
    fp32: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceBackend, "tokens", lambda self, step: step.logits.argmin(-1).numpy())
    report = verified(fp32, source, steps=1)
    assert not report.passed
    assert "prefill (one image): first departs at the choice of the next token" in report.conclusion


@pytest.mark.parametrize(
    ("scale", "token", "passes"), [(1.4, 0, True), (1.6, 0, False), (1.4, 1, False)], ids=["as bad", "worse", "token"]
)
def test_outside_the_bounds_bf16_may_be_as_far_off_as_transformers_in_bf16(
    scale: float, token: int, passes: bool
) -> None:
    exact = np.linspace(30, -30, 100, dtype=np.float32)
    # the second largest logit must be out of reach of the errors
    exact[0] = 100
    error = 3 * np.sin(np.arange(100, dtype=np.float32))
    bounds = TOLERANCES["bf16"]
    ours = compare("case", "prefill", None, exact + scale * error, exact, bounds, token)
    original = compare("case", "prefill", None, exact + error, exact, bounds, None)
    assert not ours.passed and not original.passed
    assert second_opinion(ours, original).passed is passes


def test_a_failed_verification_is_recorded_and_the_artifact_stays_whole(
    fp32: Path, source: Path, tmp_path: Path
) -> None:
    artifact = altered(fp32, tmp_path / "wrong", up_before_gate)
    assert not verify_artifact(artifact, source, steps=1, sync=False).passed
    assert read_manifest(artifact).verification == "failed"
    assert json.loads((artifact / REPORT_PATH).read_bytes())["passed"] is False
    with open_artifact(artifact) as whole:
        whole.check_all()
    with pytest.raises(ArtifactError, match="its verification failed"):
        load(artifact)
    # a new verdict replaces the old one
    assert not verify_artifact(artifact, source, steps=1, sync=False).passed
    assert len(read_manifest(artifact).reports) == 1


def test_without_store_nothing_is_written(fp32: Path, source: Path) -> None:
    before = read_manifest(fp32)
    assert verify_artifact(fp32, source, steps=1, store=False).passed
    assert read_manifest(fp32) == before
    assert not (fp32 / REPORT_PATH).exists()


def test_an_artifact_that_is_replaced_meanwhile_does_not_get_the_verdict(
    fp32: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Path(shutil.copytree(fp32, tmp_path / "artifact"))
    report = verify_artifact(artifact, source, steps=1, sync=False)

    def slow(*args: object, **options: object) -> VerifyReport:
        convert(source, artifact, "fp32", sync=False)
        return report

    monkeypatch.setattr(module, "verify", slow)
    with pytest.raises(ArtifactError, match="was replaced while it was being verified"):
        verify_artifact(artifact, source)
    assert read_manifest(artifact).verification == "none"


def test_a_checkpoint_with_other_weights_fails_where_the_first_differs(fp32: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1, dtype="fp32", tokenizer=True)
    assert "visual (one image): first departs at visual.patch_embed" in verified(fp32, other, steps=1).conclusion


def preprocessor(source: Path, out: Path, **fields: object) -> Path:
    """The checkpoint with another preprocessor_config.json."""
    shutil.copytree(source, out)
    path = out / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return out


def test_a_checkpoint_that_normalizes_otherwise_fails_at_the_patch_embedding(
    fp32: Path, source: Path, tmp_path: Path
) -> None:
    other = preprocessor(source, tmp_path / "hf", image_mean=[0.5, 0.5, 0.5])
    assert "visual (one image): first departs at visual.patch_embed" in verified(fp32, other, steps=1).conclusion


def test_a_checkpoint_that_resizes_otherwise_fails_by_its_grids(fp32: Path, source: Path, tmp_path: Path) -> None:
    report = verified(fp32, preprocessor(source, tmp_path / "hf", min_pixels=200 * 200), steps=1)
    assert not report.passed
    assert report.conclusion.startswith("FAILED: one image: grids differ from transformers': ")
    # what has the same inputs is still compared
    assert {each.case for each in report.comparisons} == {"a clip", "text only"}


def test_an_artifact_without_a_chat_template_is_verified_with_a_raw_prompt(
    fp32: Path, source: Path, tmp_path: Path
) -> None:
    plain = Path(shutil.copytree(source, tmp_path / "hf"))
    (plain / "chat_template.json").unlink()
    config = json.loads((plain / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    artifact = Path(shutil.copytree(fp32, tmp_path / "artifact"))
    convert(plain, artifact, "fp32", sync=False)
    report = verified(artifact, plain, steps=1)
    assert report.passed, report.conclusion
    assert "without a chat template" in report.notes[0]


def test_a_checkpoint_of_another_shape_is_refused_by_the_fields_that_differ(fp32: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", tiny_config(num_hidden_layers=3), dtype="fp32", tokenizer=True)
    with pytest.raises(ArtifactError, match=r"text\.num_layers is 3 there and 2 in the artifact"):
        verified(fp32, other)


def test_a_missing_checkpoint_is_refused(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent: no config\.json there; --against wants"):
        verified(fp32, tmp_path / "absent")


def test_an_artifact_that_misses_a_part_is_refused_with_the_command(fp32: Path, source: Path, tmp_path: Path) -> None:
    without_graphs = tmp_path / "weights"
    convert(source, without_graphs, "fp32", sync=False)
    with pytest.raises(ArtifactError, match=r"has no GE graphs.*qwen2vl-tc compile"):
        verified(without_graphs, source)
    without_weights = Path(shutil.copytree(fp32, tmp_path / "graphs"))
    manifest = dataclasses.replace(read_manifest(without_weights), weights=None)
    (without_weights / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(ArtifactError, match=r"has no weights.*qwen2vl-tc convert"):
        verified(without_weights, source)


def test_too_little_memory_is_said_in_gigabytes_before_anything_is_loaded(
    fp32: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2vl_tc.toolchain.verify import run as verify_run

    def never(*args: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(module, "available_bytes", lambda: 1_000_000)
    monkeypatch.setattr(verify_run, "open_reference", never)
    with pytest.raises(TargetError, match=r"needs 0\.\d GB of memory for both models together, 0\.0 GB are available"):
        verified(fp32, source)


def test_memory_is_counted_for_both_models(fp32: Path, source: Path) -> None:
    with open_artifact(fp32) as artifact:
        cases = make_cases(open_processor(artifact), 256)
        needed = ge_memory(artifact.manifest, cases, 16)
        weights = sum(entry.bytes for entry in artifact.manifest.weights.files)  # type: ignore[union-attr]
    assert needed > 2 * weights


def test_where_free_memory_is_unknown_the_report_says_so(
    fp32: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    report = verified(fp32, source, steps=1)
    assert report.passed and "memory was not checked" in report.notes[0]


def test_a_cache_too_short_for_the_prompts_is_refused_with_the_length_it_takes(fp32: Path) -> None:
    with (
        open_artifact(fp32) as artifact,
        pytest.raises(TargetError, match=r"at least \d+ tokens, the artifact has 16; .* --max-length \d+"),
    ):
        make_cases(open_processor(artifact), 16)


def text_inside_the_clip(ids: Any, pictures: Any, config: Any, start: int) -> tuple[np.ndarray, int]:
    """The rule of transformers from 5.3 on: text goes on max(h, w) behind a clip's beginning, however long it is."""
    positions, delta = rope_positions(ids, pictures, config, start)
    for t, h, w in [picture.grid for picture in pictures if picture.kind == "video"]:
        before = t - max(h, w) // config.vision.spatial_merge_size
        behind = int(np.flatnonzero(ids == config.video_token_id)[-1]) + 1
        positions[:, behind:] -= before
        delta -= before
    return positions, delta


def test_text_that_begins_inside_a_clip_fails_by_its_positions(
    fp32: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen2_vl, "rope_positions", text_inside_the_clip)
    report = verified(fp32, source, steps=1)
    assert not report.passed
    assert report.conclusion.startswith("FAILED: a clip: M-RoPE positions differ from transformers': ")


def test_positions_that_clips_are_verified_by_are_those_recorded_of_the_rule_of_training() -> None:
    recorded = json.loads((Path(__file__).parents[1] / "data" / "mrope_video.json").read_text())["cases"]
    compared = 0
    for case in recorded:
        shown = [part for part in case["parts"] if not isinstance(part, int)]
        placed: list[bool] = []
        for part in case["parts"]:
            # a clip or picture stands between two marks
            placed += [False] * part if isinstance(part, int) else [False, *[True] * (np.prod(part[1]) // 4), False]
        positions, delta = trained_positions(torch.tensor(placed), np.array([grid for _, grid in shown]), 2)
        assert (positions[:, -1].tolist(), delta) == (case["last"], case["delta"])
        if "positions" in case:
            assert positions.tolist() == case["positions"]
            compared += 1
    assert compared == 4


def test_the_terminal_shows_a_row_for_each_case_and_graph_and_ends_with_the_verdict(fp32: Path, source: Path) -> None:
    def shown(report: VerifyReport) -> list[str]:
        console = Console(file=io.StringIO(), width=140, color_system=None)
        render(report, console)
        return console.file.getvalue().rstrip().splitlines()  # type: ignore[attr-defined,no-any-return]

    report = verified(fp32, source, steps=2)
    lines = shown(report)
    assert sum("decode_b2 x 2" in line and "2/2" in line and "ok" in line for line in lines) == 4
    assert lines[-1] == report.conclusion
    wrong = [dataclasses.replace(each, passed=each.graph != "prefill") for each in report.comparisons]
    lines = shown(dataclasses.replace(report, passed=False, comparisons=tuple(wrong)))
    assert sum("FAILED" in line and "prefill" in line for line in lines) == 4
