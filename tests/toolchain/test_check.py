"""`check` and what `compile` makes of it, as a user calls them: verdicts, reasons, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.runner import variant
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.artifacts.manifest import manifest_from_bytes
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.toolchain.inspect.inspect import inspect_artifact

DECODE = "graphs/ge/decode_b1/graph.pb"
# the published heads: 80 columns in the tower, 128 in the language model
CONFIG = tiny_config(
    hidden_size=256, num_attention_heads=2, num_key_value_heads=1, vision={"embed_dim": 160, "num_heads": 2}
)
ALL = ["8.5", "9.0", "9.1"]


@pytest.fixture(scope="module")
def artifact(build: Any) -> Path:
    """Default graphs in bf16, of heads as published."""
    _, path = build("check", CONFIG, dtype="bf16", batches="1,3")
    assert isinstance(path, Path)
    return path


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def edited(artifact: Path, work: Path, edit: Callable[[Any], None], path: str = DECODE) -> Path:
    """The artifact with one graph changed, hashes included."""
    model = message_class("ModelDef").FromString((artifact / path).read_bytes())
    edit(model.graph[0])
    return variant(artifact, work / "edited", {path: model.SerializeToString()}, restamp=True)


def first(graph: Any, kind: str) -> Any:
    return next(op for op in graph.op if op.type == kind)


def verdict(result: Any, graph: str, release: str) -> Any:
    return json.loads(result.stdout)["graphs"][graph][release]


def test_the_default_graphs_are_accepted_and_recorded_as_admitted(run: Any, artifact: Path) -> None:
    result = run("check", artifact, "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    assert plain["releases"] == plain["admitted"] == ALL
    assert list(plain["graphs"]) == ["visual", "prefill", "decode_b1", "decode_b3"]
    with open_artifact(artifact) as opened:
        part = opened.manifest.ge
        assert part is not None and part.admitted is not None
        assert set(ALL) <= set(part.admitted)
    assert "admitted by CANN" in run("inspect", artifact).stdout
    assert inspect_artifact(artifact).target.admitted == part.admitted  # type: ignore[union-attr]


def test_a_violated_rule_is_named_with_its_node_its_source_and_what_to_do(
    run: Any, artifact: Path, tmp_path: Path
) -> None:
    def edit(graph: Any) -> None:
        first(graph, "FusedInferAttentionScore").attr["sparse_mode"].i = 3

    result = run("check", edited(artifact, tmp_path, edit), "--cann", "9.0,8.5.0")
    assert result.exit_code == 1
    said = " ".join(result.stdout.split())
    assert "FIA-14: refused, CANN 9.0, 8.5" in said
    assert "where decode_b1: FusedInferAttentionScore" in said
    assert "do never run prefill with one token" in said
    assert "cannmirror/ops-transformer 9.1.0" in said
    assert max(map(len, result.stdout.splitlines())) <= 80
    plain = json.loads(run("check", edited(artifact, tmp_path, edit), "--cann", "9.0", "--json").stdout)
    rules = {each["rule"] for each in plain["graphs"]["decode_b1"]["9.0"]["violations"]}
    assert rules == {"FIA-14"}
    assert plain["graphs"]["prefill"]["9.0"]["accepted"]


FIA = "FusedInferAttentionScore"


@pytest.mark.parametrize(
    ("kind", "attribute", "field", "value", "said"),
    [
        (FIA, "num_heads", "s", b"x", "num_heads is 'x', expected an integer of at least 1"),
        (FIA, "num_heads", "i", -3, "num_heads is -3, expected an integer of at least 1"),
        (FIA, "num_heads", "i", 0, "num_heads is 0, expected an integer of at least 1"),
        (FIA, "num_key_value_heads", "b", True, "num_key_value_heads is True, expected an integer of at least 0"),
        (FIA, "scale", "f", float("nan"), "scale is nan, expected a positive number"),
        (FIA, "input_layout", "i", 7, "input_layout is 7, expected one of BSH, BSND, BNSD, TND, NTD, SH, NSD"),
        ("MatMul", "transpose_x2", "s", b"yes", "transpose_x2 is 'yes', expected true or false"),
        ("SplitV", "num_split", "f", 2.0, "num_split is 2.0, expected an integer of at least 1"),
        ("RmsNorm", "epsilon", "f", 0.0, "epsilon is 0.0, expected a positive number"),
    ],
)
def test_an_attribute_that_makes_no_sense_is_refused_by_its_name(
    run: Any, artifact: Path, tmp_path: Path, kind: str, attribute: str, field: str, value: Any, said: str
) -> None:
    def edit(graph: Any) -> None:
        setattr(first(graph, kind).attr[attribute], field, value)

    result = run("check", edited(artifact, tmp_path, edit), "--cann", "9.0", "--json")
    assert result.exit_code == 1, result.output
    (refused,) = verdict(result, "decode_b1", "9.0")["violations"]
    assert (refused["rule"], refused["severity"]) == (f"nonsense, {kind}.{attribute}", "refused")
    assert refused["reason"] == said and len(refused["nodes"]) == 1
    assert verdict(result, "prefill", "9.0")["accepted"]


def test_an_operator_without_a_rule_is_never_accepted(run: Any, artifact: Path, tmp_path: Path) -> None:
    def edit(graph: Any) -> None:
        first(graph, "SwiGlu").type = "SwiGluMaybe"

    path = edited(artifact, tmp_path, edit)
    result = run("check", path, "--json")
    assert result.exit_code == 1
    found = verdict(result, "decode_b1", "9.1")
    assert not found["accepted"]
    assert {each["severity"] for each in found["violations"]} == {"unproven"}
    assert any("no rule says that the release has SwiGluMaybe" in each["reason"] for each in found["violations"])
    assert verdict(result, "prefill", "9.1")["accepted"]


def with_binding(artifact: Path, work: Path, dtype: str, wanted: Callable[[str], bool]) -> tuple[Path, int]:
    """The artifact whose decode graph takes some parameters in another dtype, and how many those are."""
    path = "graphs/ge/decode_b1/binding.json"
    binding = json.loads((artifact / path).read_text())
    found = [bound for bound in binding["inputs"] if bound["kind"] == "parameter" and wanted(bound["name"])]
    assert found
    for bound in found:
        bound["dtype"] = dtype
    return variant(artifact, work / dtype, {path: json.dumps(binding).encode()}, restamp=True), len(found)


def test_a_dtype_that_no_library_lists_is_refused(run: Any, artifact: Path, tmp_path: Path) -> None:
    # RmsNorm takes a fp32 gamma beside bf16, AddRmsNorm does not
    path, _ = with_binding(artifact, tmp_path, "fp32", lambda name: "norm" in name)
    found = verdict(run("check", path, "--json"), "decode_b1", "8.5")
    assert [each["rule"] for each in found["violations"]] == ["LIB-AddRmsNorm"]


def test_a_release_that_nobody_read_is_unproven(run: Any, artifact: Path) -> None:
    result = run("check", artifact, "--cann", "8.0")
    assert result.exit_code == 1
    assert "no rule says that the release has" in " ".join(result.stdout.split())


def test_releases_whose_code_was_never_published_are_unproven(run: Any, artifact: Path) -> None:
    result = run("check", artifact, "--cann", "8.1,8.3,8.5")
    assert result.exit_code == 1
    assert "FIA-23: unproven, CANN 8.1, 8.3" in result.stdout
    assert "refused by CANN 8.1, 8.3; accepted by 8.5" in result.stdout


@pytest.mark.parametrize("release", ["9.7", "new", "", "8.5,,9.0"])
def test_a_release_that_does_not_exist_is_bad_input(run: Any, artifact: Path, release: str) -> None:
    result = run("check", artifact, "--cann", release)
    assert result.exit_code == 2
    assert "--cann" in result.stderr and "expected some of 8.0, 8.1" in result.stderr


def test_an_artifact_without_graphs_is_bad_input(run: Any, tmp_path: Path) -> None:
    result = run("check", tmp_path)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_inserted_operators_are_counted_apart(run: Any, artifact: Path, tmp_path: Path) -> None:
    assert all(graph.inserted == {} for graph in inspect_artifact(artifact).graphs.values())
    path, count = with_binding(artifact, tmp_path, "bf16", lambda name: name.endswith(".bias"))
    assert inspect_artifact(path).graphs["decode_b1"].inserted == {"Cast": count}
    line = next(line for line in run("inspect", path).stdout.splitlines() if "CANN adds these" in line)
    assert f"{count} Cast" in line
    # it costs, and it is taken
    result = run("check", path, "--json")
    assert verdict(result, "decode_b1", "9.1")["accepted"]
    assert "MM-01" in {each["rule"] for each in verdict(result, "decode_b1", "9.1")["remarks"]}


def test_compile_refuses_a_release_that_does_not_admit_and_writes_nothing(
    run: Any, config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tnd.artifact"
    words = ("compile", "--config", config_file, "--out", out, "--max-length", "256", "--visual-attention", "tnd")
    result = run(*words, "--cann", "8.1")
    assert result.exit_code == 2
    assert "CANN 8.1 does not admit the graphs: visual" in result.stderr
    assert "TND is not among the layouts of this release (FIA-01, refused)" in result.stderr
    assert not out.exists()


def test_compile_says_which_releases_admit_the_graphs(run: Any, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.artifact"
    result = run("compile", "--config", config_file, "--out", out, "--max-length", "256", "--cann", "8.5,9.1")
    assert result.exit_code == 0, result.output
    part = manifest_from_bytes((out / "manifest.json").read_bytes(), "manifest").ge
    assert part is not None and part.admitted
    last = result.stdout.splitlines()[-2]
    assert last.startswith(f"admitted by CANN {', '.join(part.admitted)}")


def test_fp32_graphs_are_for_cpu_and_admitted_nowhere(run: Any, built: Path, build_result: Any) -> None:
    assert "admitted by no CANN: its attention takes no fp32; these graphs are for CPU" in build_result.stdout
    found = verdict(run("check", built, "--json"), "decode_b1", "9.1")
    assert "FIA-17" in {each["rule"] for each in found["violations"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"embed_dim": 144, "num_heads": 2}}, "the vision tower has heads of 72 columns"),
        ({"vision": {"embed_dim": 168, "num_heads": 2}}, "the vision tower has heads of 84 columns"),
        ({"hidden_size": 96, "num_attention_heads": 4}, "the language model has heads of 24 columns"),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_heads_that_no_release_takes_are_refused_with_the_rules_sentence(
    run: Any, tmp_path: Path, changes: dict[str, Any], message: str, dtype: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config(**changes)))
    result = run("compile", "--config", config, "--out", tmp_path / "a", "--dtype", dtype)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "head_dim is a multiple of 16 and at most 512 (FIA-10)" in result.stderr
    assert not (tmp_path / "a").exists()


def test_another_chips_graphs_are_unproven(run: Any, artifact: Path, tmp_path: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["ge"]["soc"] = "Ascend310P3"
    path = variant(artifact, tmp_path / "a", {"manifest.json": json.dumps(manifest).encode()}, False)
    result = run("check", path, "--cann", "9.1")
    assert result.exit_code == 1
    assert "the rules are of Ascend910B and Ascend910_93, and not of Ascend310P3" in " ".join(result.stdout.split())


def test_a_length_that_the_graphs_were_not_compiled_for_is_refused(run: Any, artifact: Path, tmp_path: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["ge"]["max_length"] *= 2
    path = variant(artifact, tmp_path / "a", {"manifest.json": json.dumps(manifest).encode()}, False)
    result = run("check", path)
    assert result.exit_code == 2
    assert "prefill/binding.json: takes keys[0]" in result.stderr


def test_checking_imports_no_engine(artifact: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom qwen2vl_tc.toolchain.check.check import check_artifact\n"
        f"check_artifact(Path({str(artifact)!r}))\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
