"""What the traced graphs promise: bindings, placements, dynamic sizes, determinism, and work on the device."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.synthetic import published, tiny_config
from PIL import Image

from qwen2vl_tc.artifacts.ge.binding import ARGUMENT, CACHE, CONSTANT, LENGTHS, PARAMETER, Binding, binding_from_bytes
from qwen2vl_tc.artifacts.ge.graph import read_graph
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.models import config_of
from qwen2vl_tc.runtime.models.qwen2_vl import weights


@pytest.fixture(scope="module")
def bindings(build: Any) -> dict[str, Binding]:
    _, path = build("two_batches", tiny_config(tie_word_embeddings=True), batches="1,3")
    with open_artifact(path) as artifact:
        part = artifact.manifest.ge
        assert part is not None
        return {g.name: binding_from_bytes(artifact.read(g.binding), g.name) for g in part.graphs}


def test_the_graphs_bind_every_parameter_and_nothing_else(build: Any, bindings: dict[str, Binding]) -> None:
    _, path = build("two_batches", tiny_config(tie_word_embeddings=True), batches="1,3")
    with open_artifact(path) as artifact:
        names = [p.name for p in weights(config_of(artifact.manifest))]
    text = [name for name in names if not name.startswith("visual.")]
    visual = [name for name in names if name.startswith("visual.")]

    def bound(graph: str) -> list[str]:
        return sorted(b.name for b in bindings[graph].inputs if b.kind == PARAMETER)

    assert bound("visual") == sorted(visual)
    assert bound("prefill") == sorted(text)
    assert bound("decode_b1") == bound("decode_b3") == sorted(text)


def test_only_weights_and_tables_are_frozen_and_only_lengths_are_on_the_host(bindings: dict[str, Binding]) -> None:
    for binding in bindings.values():
        for bound in binding.inputs:
            assert bound.frozen == (bound.kind in (PARAMETER, CONSTANT)), bound
            assert bound.host == (bound.kind == LENGTHS), bound


def test_sizes_that_vary_between_requests_are_dynamic_and_the_others_are_static(bindings: dict[str, Binding]) -> None:
    def dynamic(graph: str) -> set[str]:
        return {b.name for b in bindings[graph].inputs if -1 in b.shape}

    assert dynamic("visual") == {"patches", "positions", "segment_lengths"}
    assert dynamic("prefill") == {"token_ids", "image_embeds", "image_index", "positions"}
    assert dynamic("decode_b1") == dynamic("decode_b3") == set()


def test_the_cache_has_key_value_heads_and_one_tensor_of_each_kind_a_layer(bindings: dict[str, Binding]) -> None:
    for name, rows in (("prefill", 1), ("decode_b1", 1), ("decode_b3", 3)):
        caches = [b for b in bindings[name].inputs if b.kind == CACHE]
        assert sorted((b.name, b.index) for b in caches) == [("keys", 0), ("keys", 1), ("values", 0), ("values", 1)]
        # 2 key-value heads of dimension 16, not the 4 query heads
        assert {b.shape for b in caches} == {(rows, 256, 32)}


def test_the_options_of_the_recipe_are_on(bindings: dict[str, Binding]) -> None:
    for name, binding in bindings.items():
        assert binding.local_options["frozen_parameter"] == "1"
        # the documentation excludes it for attention in the TND layout
        assert binding.local_options["ge.tiling_schedule_optimize"] == ("1" if name.startswith("decode") else "0")


def test_decode_gives_the_next_inputs_beside_token_and_logits(bindings: dict[str, Binding]) -> None:
    assert [o.name for o in bindings["decode_b3"].outputs] == [
        "next_token",
        "checked_token",
        "logits",
        "cache_index",
        "rope_rows",
    ]
    arguments = {b.name for b in bindings["decode_b3"].inputs if b.kind == ARGUMENT}
    assert arguments == {"token_ids", "cache_index", "rope_rows"}


def test_one_set_of_graphs_serves_every_size_without_tracing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    _, path = build("two_batches", tiny_config(tie_word_embeddings=True), batches="1,3")
    traced: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: traced.append(args))
    monkeypatch.setattr(torch._dynamo, "optimize", lambda *args, **kwargs: traced.append(args))
    model = load(path)
    for count, (height, width), text in (
        (1, (56, 56), "a"),
        (3, (84, 140), "a longer question " * 4),
        (0, (0, 0), "b"),
    ):
        pictures = [Image.new("RGB", (width, height), (40 * i, 90, 200)) for i in range(count)]
        content = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": text}]
        assert model.generate([{"role": "user", "content": content}], max_new_tokens=2).token_ids
    assert not traced


COMPILE = """
import sys, json
from pathlib import Path
from qwen2vl_tc.toolchain.build.compile import CompileOptions, compile_config
manifest = compile_config(Path(sys.argv[1]), Path(sys.argv[2]), CompileOptions(), sync=False)
# not ru_maxrss: a child starts with its parent's
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "ops": {g.name: g.ops for g in manifest.ge.graphs},
    "files": {e.path: e.hash for e in manifest.files()},
    "peak": int(peak) * 1024,
}))
"""


def compile_in_new_process(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", COMPILE, str(folder / "config.json"), str(folder / "artifact")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_two_compilations_in_two_processes_are_byte_identical(tmp_path: Path) -> None:
    first, second = (compile_in_new_process(tiny_config(), tmp_path / name) for name in "ab")
    assert first["files"] == second["files"]


# (visual, prefill, decode): device operators, of which the recipe has 1639, 789 and 732 at 7B
DEVICE_OPS = {"2b": (362, 351, 347), "7b": (362, 351, 347), "72b": (362, 12 * 80 + 15, 12 * 80 + 11)}


@pytest.mark.slow
@pytest.mark.parametrize("size", DEVICE_OPS)
def test_real_sizes_compile_without_weights_within_memory_and_operator_bounds(tmp_path: Path, size: str) -> None:
    result = compile_in_new_process(published(size), tmp_path / size)
    for name, bound in zip(("visual", "prefill", "decode_b1"), DEVICE_OPS[size], strict=True):
        assert result["ops"][name]["device"] <= bound
        # visual packs one shape of two free sizes
        assert result["ops"][name]["shape"] == (4 if name == "visual" else 0)
    assert result["peak"] < 1e9
    with open_artifact(tmp_path / size / "artifact") as artifact:
        for graph in artifact.manifest.ge.graphs:  # type: ignore[union-attr]
            kinds = {node.op for node in read_graph(artifact.read(graph.graph), graph.name).nodes}
            assert not kinds & {"Transpose", "TransposeD"}
            assert graph.name == "visual" or not kinds & {"Shape", "Pack"}


def test_what_torchair_cannot_trace_is_refused_by_name(bindings: dict[str, Binding]) -> None:
    import torch

    from qwen2vl_tc.artifacts.errors import TargetError
    from qwen2vl_tc.exporters.torchair.trace import trace
    from qwen2vl_tc.runtime.models.base import GraphSpec

    class Branching(torch.nn.Module):
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    x = torch.empty(4, 4, device="npu")
    with pytest.raises(TargetError, match="cannot trace the branch graph"):
        trace(GraphSpec("branch", "decode", "step", (), ()), Branching().step, {"x": x})


def test_folded_pictures_are_plain_bytes(bindings: dict[str, Binding]) -> None:
    patches = next(b for b in bindings["visual"].inputs if b.name == "patches")
    assert (patches.dtype, patches.shape) == ("uint8", (-1, -1, int(np.prod([3, 2, 14, 14]))))


def test_options_that_could_make_ge_write_or_load_files_are_refused(bindings: dict[str, Binding]) -> None:
    from dataclasses import replace

    from qwen2vl_tc.artifacts.errors import ArtifactError

    hostile = {**bindings["visual"].local_options, "ge.exec.dumpPath": "/home"}
    data = replace(bindings["visual"], local_options=hostile).to_bytes()
    with pytest.raises(ArtifactError, match=r"visual: unknown option ge\.exec\.dumpPath"):
        binding_from_bytes(data, "visual")
