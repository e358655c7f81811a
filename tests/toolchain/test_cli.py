"""The command line: what every command takes, what it prints where, and how it fails."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.clips import write_clip
from helpers.synthetic import published, write_checkpoint

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.manifest import empty_manifest
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.runtime.models import config_from_hf, to_plain
from qwen2vl_tc.toolchain.cli import locate
from qwen2vl_tc.toolchain.cli import output as cli_output
from qwen2vl_tc.toolchain.cli import values as cli_values
from qwen2vl_tc.toolchain.cli.main import app, main
from qwen2vl_tc.toolchain.host import doctor

from .conftest import TINY, Run

SCRIPT = Path(sys.executable).parent / "qwen2vl-tc"

# What users' scripts rely on: a change here is a change for them.
COMPILE_OPTIONS = {
    *("--mode", "--soc", "--max-length", "--batch", "--dtype", "--dump", "--passes"),
    *("--operators", "--visual-attention", "--cann"),
}
SETTINGS = {
    *("--max-new-tokens", "--min-new-tokens", "--sample", "--greedy", "--temperature", "--top-k", "--top-p"),
    *("--repetition-penalty", "--seed", "--stop"),
}
ENGINE = {"--backend", "--trusted-key", "--execute-mode"}
VISION = {"--min-pixels", "--max-pixels", "--video-sampling", "--picture-modes", "--allow-http"}
GENERATE = {*SETTINGS, *VISION}
BENCH_OPTIONS = {"--image", "--video", "--size", "--runs", "--json", *ENGINE}
FROZEN = {
    "convert": {"--src", "--out", "--dtype", "--no-sync"},
    "compile": {"ARTIFACT", "--config", "--out", "--weights", "--standard-only", *COMPILE_OPTIONS},
    "build": {"--src", "--out", "--no-verify", "--no-sync", *COMPILE_OPTIONS},
    "verify": {"ARTIFACT", "--against", "--trusted-key", "--json"},
    "inspect": {"ARTIFACT", "--json", "--tokens", "--patches", "--graph", "--dot", "--layer", "--trusted-key"},
    "check": {"ARTIFACT", "--cann", "--json"},
    "generate": {"ARTIFACT", "--image", "--video", "--prompt", "--system", "--requests", "--json", *ENGINE, *GENERATE},
    "chat": {"ARTIFACT", "--image", "--video", "--system", *ENGINE, *GENERATE},
    "warm": {"ARTIFACT", "--trusted-key"},
    "selftest": {"ARTIFACT", "--backend", "--make", "--trusted-key", "--json"},
    "bench": {"ARTIFACT", "--max-new-tokens", "--batch", "--warmup", *BENCH_OPTIONS},
    "bench cold-start": {"ARTIFACT", "--cold", *BENCH_OPTIONS},
    "sign": {"ARTIFACT", "--key"},
    "doctor": {"ARTIFACT", "--json"},
    "demo": {"--out", "--keep", "--no-keep"},
}


def commands() -> dict[str, Any]:
    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


def names(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [parameter.name.upper()]
    return [*parameter.opts, *parameter.secondary_opts]


def test_the_commands_and_their_options_are_the_ones_that_scripts_rely_on() -> None:
    found = {
        name: {text for parameter in command.params for text in names(parameter) if text not in ("-h", "--help")}
        for name, command in commands().items()
    }
    assert found == FROZEN


@pytest.mark.parametrize("words", [[], *(name.split() for name in FROZEN)], ids=lambda words: " ".join(words) or "root")
def test_every_help_text_ends_with_examples_that_start_with_the_program(words: list[str], run: Run) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert f"qwen2vl-tc {' '.join(words)}".strip() in result.stdout.split("Examples")[1]


def test_version_is_the_package_s(run: Run) -> None:
    assert run("--version").stdout == f"qwen2vl-tc {version('qwen2vl-tc')}\n"


@pytest.mark.parametrize("script", ["", "app(['--help'], standalone_mode=False)", "app(['doctor'])"])
def test_the_command_line_imports_no_engine_before_it_needs_one(script: str) -> None:
    code = f"""
import sys
from qwen2vl_tc.toolchain.cli.main import app
try:
    {script or "pass"}
except SystemExit:
    pass
print(sorted({{"torch", "torch_npu", "transformers", "onnxruntime", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_installed_script_fails_in_one_line_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "inspect", "absent"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "qwen2vl-tc build" in line


def test_the_module_runs_like_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwen2vl_tc.toolchain", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("qwen2vl-tc ")


def test_main_prepares_the_process_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("qwen2vl_tc.toolchain.cli.main.prepare_streams", lambda: None)
    monkeypatch.setattr("qwen2vl_tc.toolchain.cli.main.prepare_process", lambda: done.append("prepared"))
    monkeypatch.setattr("qwen2vl_tc.toolchain.cli.main.app", lambda: done.append("ran"))
    main()
    assert done == ["prepared", "ran"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "--src", "absent"], "absent: no such folder"),
        (["convert", "--src", "file"], "file: is a file"),
        (["generate", "absent"], "give --prompt TEXT, or --requests FILE"),
        (["generate", "absent", "--requests", "file", "--image", "x"], "--requests holds whole messages"),
        (["generate", "absent", "--requests", "file"], "file: has no requests"),
        (["convert", "--src", "empty"], "config.json"),
        (["convert", "--src", "tiny", "--dtype", "int4"], "--dtype int4: expected one of bf16, fp16, fp32"),
        (["convert", "--src", "tiny", "--out", "empty/inner/../../full"], "is not an artifact"),
        (["compile"], "no artifact in it"),
        (["compile", "empty"], "empty"),
        (["compile", "tiny"], "not an artifact"),
        (["compile", "x", "--mode", "onnx"], "x: no artifact there"),
        (["compile", "x", "--mode", "air"], "x: no artifact there"),
        (["compile", "x", "--mode", "air", "--soc", "Ascend910B4"], "it takes no option but the artifact"),
        (["build", "--src", "tiny", "--out", "y", "--mode", "air"], "build the graphs first"),
        (["compile", "--config", "tiny", "--out", "y", "--operators", "magic"], "expected one of fused, recipe"),
        (["compile", "--config", "tiny", "--out", "y", "--visual-attention", "x"], "expected one of segments, tnd"),
        (["compile", "x", "--mode", "jit"], "--mode jit: expected one of dynamo, onnx, air"),
        (["compile", "x", "--batch", "1,x"], "--batch 1,x: expected batch sizes"),
        (["compile", "x", "--dump", "xml"], "--dump xml: expected pbtxt"),
        (["compile", "x", "--passes", "magic"], "--passes magic: unknown; there are all, none, "),
        (["compile", "--config", "tiny/config.json"], "--config and --out together"),
        (["compile", "x", "--config", "tiny/config.json", "--out", "y"], "either an artifact, or --config"),
        (["compile", "--config", "absent.json", "--out", "y"], "absent.json: cannot be read"),
        (["compile", "--config", "tiny", "--out", "y", "--batch", "0"], "--batch 0: expected sizes from 1 to 256"),
        (["compile", "--config", "tiny", "--out", "y", "--batch", "2,2"], "given twice"),
        (["compile", "--config", "tiny", "--out", "y", "--max-length", "1"], "--max-length 1: expected 2 to"),
        (["build", "--src", "absent", "--out", "y"], "absent: no such folder"),
        (["build", "--src", "tiny", "--out", "y", "--dtype", "int4"], "--dtype int4"),
        (["build", "--src", "tiny", "--out", "y", "--batch", "999"], "--batch 999"),
        (["build", "--src", "tiny", "--out", "full"], "is not an artifact"),
        (["verify", "absent", "--against", "tiny"], "absent: no such folder"),
        (["verify", "absent", "--against", "absent"], "absent: no such folder"),
        (["inspect"], "no artifact in it"),
        (["inspect", "file"], "is a file"),
        (["generate", "absent", "--prompt", "x"], "absent: no such folder"),
        (["warm", "absent"], "warm needs a usable NPU, and no NPU is here; run it on the NPU host"),
        (["demo", "--out", "full"], "holds something else than a demo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_user_gets_wrong_is_one_line_and_code_2(
    words: list[str], said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("tiny"), TINY, tokenizer=True)
    Path("file").touch()
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is left behind"


@pytest.mark.parametrize("words", [["bench"], ["convert"], ["generate"], ["inspect", "--nonsense"]])
def test_usage_errors_exit_with_2_too(words: list[str], run: Run) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (ArtifactError("broken\nin two lines"), 2, "error: broken in two lines\n"),
        (OSError(28, "No space left on device", "weights/x"), 2, "error: weights/x: No space left on device\n"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "error: /root/x: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ZeroDivisionError("by zero"), 70, "error: this is a bug in qwen2vl-tc: ZeroDivisionError: by zero; "),
        (OSError("no number"), 70, "error: this is a bug in qwen2vl-tc: OSError: no number; "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_is_raised_becomes_one_line_and_a_code(
    raised: BaseException, code: int, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(artifact: Path | None) -> None:
        raise raised

    monkeypatch.setattr(doctor, "diagnose", fail)
    result = run("doctor")
    assert result.exit_code == code
    assert result.stderr.startswith(said)
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_debug_shows_the_traceback_by_option_and_by_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in run("--debug", "inspect", "absent").stderr
    monkeypatch.setenv("QWEN2VL_TC_DEBUG", "1")
    assert "Traceback" in run("inspect", "absent").stderr


def test_a_reader_that_goes_away_ends_a_command_without_a_word(built: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [SCRIPT, "inspect", built, "--json"]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


def test_doctor_prints_json_on_request(run: Run) -> None:
    assert json.loads(run("doctor", "--json").stdout).keys() == {"findings", "abilities"}
    assert "what to do" in run("doctor").stdout


def test_convert_names_the_artifact_after_the_checkpoint_and_says_what_is_next(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", "--src", checkpoint, "--no-sync")
    assert result.exit_code == 0
    assert result.stdout.startswith("wrote tiny.artifact: ")
    assert result.stdout.endswith("next: qwen2vl-tc compile tiny.artifact\n")
    assert "convert: " in result.stderr
    manifest = read_manifest(Path("tiny.artifact"))
    assert manifest.weights is not None
    assert manifest.weights.dtype == "fp32", "the checkpoint's own dtype"
    # the only artifact here, so it needs no name
    assert json.loads(run("inspect", "--json").stdout)["weights"]["dtype"] == "fp32"
    assert "tiny.artifact: has no GE graphs" in run("generate", "tiny.artifact", "--prompt", "x").stderr


def test_the_only_artifact_is_found_and_several_or_none_are_listed(
    built: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text("{}")
    (tmp_path / "hf").symlink_to(checkpoint)
    with pytest.raises(ArtifactError, match=r"hf \(a checkpoint: run .*--src hf`\), site \(.*not an artifact"):
        locate.find_artifact(tmp_path)
    (tmp_path / ".hidden.staging").symlink_to(built)
    (tmp_path / "first").symlink_to(built)
    assert locate.find_artifact(tmp_path) == tmp_path / "first"
    (tmp_path / "second").symlink_to(built)
    with pytest.raises(ArtifactError, match="several artifacts: first, second; say which one"):
        locate.find_artifact(tmp_path)


def test_generate_streams_the_text_and_only_the_text_to_stdout(run: Run, built: Path, picture: Path) -> None:
    words = ("generate", built, "--image", picture, "--prompt", "What is this?", "--max-new-tokens", "12")
    words += ("--backend", "reference")
    plain, as_json = run(*words), run(*words, "--json")
    assert plain.exit_code == as_json.exit_code == 0
    answer = json.loads(as_json.stdout)
    assert answer.keys() == {
        *("text", "token_ids", "prompt_token_ids", "finish_reason", "timings_ms", "token_ms", "cached_tokens"),
    }
    assert len(answer["token_ms"]) == len(answer["token_ids"]) - 1
    assert plain.stdout == answer["text"] + "\n"
    assert len(answer["token_ids"]) <= 12
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["timings_ms"].keys() >= {"preprocess", "visual", "prefill", "first_token", "decode"}
    for result in (plain, as_json):
        (line,) = result.stderr.splitlines()
        assert line == "backend: reference (asked for)"


def test_generate_takes_several_pictures_none_and_a_system_message(run: Run, built: Path, picture: Path) -> None:
    def prompt_tokens(*words: str | Path) -> list[int]:
        words = ("generate", built, "--prompt", "a", "--max-new-tokens", "1", "--json", *words)
        tokens: list[int] = json.loads(run(*words).stdout)["prompt_token_ids"]
        return tokens

    image = TINY["image_token_id"]
    counts = [prompt_tokens(*(("--image", picture) * n)).count(image) for n in range(3)]
    assert counts == [0, 64, 128], "224 x 224 pixels are 8 x 8 merged patches"
    assert len(prompt_tokens("--system", "z")) < len(prompt_tokens()), "it replaces the template's own"


def test_generate_shows_a_video_within_given_bounds(run: Run, built: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=48)
    words = ("generate", built, "--prompt", "a", "--max-new-tokens", "1", "--json", "--video", clip)
    bounds = ("--min-pixels", "3136", "--max-pixels", "16000")

    def video_tokens(*more: str) -> int:
        tokens: list[int] = json.loads(run(*words, *bounds, *more).stdout)["prompt_token_ids"]
        return tokens.count(TINY["video_token_id"])

    # 160 x 96 pixels are 6 x 3 merged patches; 2 s are 4 frames, two to a patch
    assert video_tokens() == 2 * 18
    assert "prompt has" in run(*words, *bounds, "--video-sampling", "transformers").stderr, "all of its frames"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "absent.png"], "absent.png: cannot be opened"),
        (["--image", "http://localhost:9/a.png"], "--allow-http"),
        (["--image", "http://localhost:9/a.png", "--allow-http"], "http://localhost:9/a.png: cannot be fetched"),
        (["--video", "absent.mp4"], "absent.mp4: cannot be opened"),
        (["--video-sampling", "all"], "'all': expected qwen or transformers"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--max-new-tokens", "9999"], "--max-length"),
        (["--backend", "npu"], "backend npu: "),
        (["--backend", "cuda"], "expected one of reference, onnxruntime, npu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_requests_that_cannot_be_served_are_refused_in_one_line(
    words: list[str], said: str, run: Run, built: Path
) -> None:
    result = run("generate", built, "--prompt", "x", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr.splitlines()[-1]


def test_verify_prints_a_table_or_one_object_and_ends_with_1_when_it_fails(
    run: Run, built: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2vl_tc.artifacts.schema import from_plain
    from qwen2vl_tc.toolchain.verify import verify
    from qwen2vl_tc.toolchain.verify.report import VerifyReport

    passed = from_plain(VerifyReport, json.loads((built / "reports/verify.json").read_text()), "report")
    reports = iter([passed, passed, dataclasses.replace(passed, passed=False)])
    monkeypatch.setattr(verify, "verify_artifact", lambda path, against, part, progress, trusted_keys: next(reports))
    words = ("verify", built, "--against", checkpoint)
    table, as_json, failed = run(*words), run(*words, "--json"), run(*words)
    assert (table.exit_code, as_json.exit_code, failed.exit_code) == (0, 0, 1)
    assert "verified: " in table.stdout
    assert json.loads(as_json.stdout)["passed"] is True
    assert failed.stderr.splitlines()[-1].startswith("error: ")


def test_a_model_that_one_device_cannot_hold_is_compiled_with_a_warning(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = read_manifest(built).ge
    assert part is not None
    large = dataclasses.replace(empty_manifest("72b", to_plain(config_from_hf(published("72b")))), ge=part)
    cli_output.print_compiled(large)
    printed = capsys.readouterr()
    assert "warning: 72b needs 29" in printed.err
    assert "decode_b2" in printed.out
    cli_output.print_compiled(read_manifest(built))
    warnings = capsys.readouterr().err.splitlines()
    # what the documentation does not promise of these graphs, and nothing about memory
    assert [line.split(":")[1].strip() for line in warnings] == ["fp32"]


def test_no_passes_all_passes_and_named_passes() -> None:
    assert cli_values.passes(None) is None
    assert cli_values.passes("all") is None
    assert cli_values.passes("none") == ()
    assert cli_values.passes("remove_dead_ops") == ("remove_dead_ops",)


def test_offline_models_are_exported_with_the_commands_that_take_them_on(
    run: Run, built: Path, checkpoint: Path, tmp_path: Path
) -> None:
    artifact = tmp_path / "tiny.artifact"
    shutil.copytree(built, artifact)
    result = run("compile", artifact, "--mode", "air")
    assert result.exit_code == 0, result.output
    for name in ("visual", "prefill", "decode_b1", "decode_b2"):
        assert (artifact / "graphs/air" / name / f"{name}.air").stat().st_size > 0
        assert f"atc --framework=1 --model={name}.air --soc_version=Ascend910B2" in result.stdout
    assert "No device and no ATC has run these models yet" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"wrote {artifact}/graphs/air: 4 offline models")
    # they name byte ranges of the weights, and go when those are replaced
    result = run("convert", "--src", checkpoint, "--out", artifact, "--no-sync")
    assert result.exit_code == 0, result.output
    assert not (artifact / "graphs/air").exists()


def test_the_other_forms_are_compiled_on_request_and_recorded(run: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", TINY)
    forms = ("--operators", "recipe", "--visual-attention", "tnd", "--max-length", "64")
    result = run("compile", "--config", tmp_path / "tiny", "--out", tmp_path / "other", *forms)
    assert result.exit_code == 0, result.output
    report = json.loads(run("inspect", tmp_path / "other", "--json").stdout)
    kinds = {name: set(graph["ops"]["by_type"]) for name, graph in report["graphs"].items()}
    assert "PromptFlashAttention" in kinds["prefill"] and "IncreFlashAttention" in kinds["decode_b1"]
    assert [name for name, found in kinds.items() if "FusedInferAttentionScore" in found] == ["visual"]
    assert report["target"]["visual_attention"] == "tnd"
    visual = report["graphs"]["visual"]["inputs"]
    assert {each["name"]: each["shape"] for each in visual} == {
        "patches": [-1, 1176],
        "positions": [2, -1],
        "segment_ends": [-1],
    }
