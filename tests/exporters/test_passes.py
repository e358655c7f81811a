"""Each pass over a real traced graph: executed before and after, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen2vl_tc.exporters.torchair.passes import PASSES, run_passes
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.backends.ge.executor import Executor
from qwen2vl_tc.runtime.backends.ge.graph import read_graph
from qwen2vl_tc.runtime.backends.ge.proto import message_class
from qwen2vl_tc.toolchain.compile import CompileOptions, compile_artifact
from qwen2vl_tc.toolchain.synthetic import tiny_config

GRAPHS = ("visual", "prefill", "decode_b1")


@pytest.fixture(scope="module")
def untouched(build: Any) -> Path:
    """An artifact whose graphs are as torchair emitted them."""
    _, artifact = build("untouched", tiny_config(), dtype="bf16")
    compile_artifact(artifact, CompileOptions(max_length=256, passes=()), sync=False)
    assert isinstance(artifact, Path)
    return artifact


def example_inputs(binding: Any, backend: Any, seed: int) -> list[torch.Tensor]:
    """Random inputs that are legal for every graph: ids and positions in range, lengths that fit."""
    rng = np.random.default_rng(seed)
    sizes = {"patches": 16, "token_ids": 12, "image_embeds": 4, "image_index": 4, "positions": 12}
    made = []
    for bound, fixed in zip(binding.inputs, backend._bound[binding.graph]._fixed, strict=True):
        shape = [sizes.get(bound.name, 1) if size == -1 else size for size in bound.shape]
        if binding.graph == "visual" and bound.name == "positions":
            shape = [2, 16]
        if fixed is not None:
            made.append(fixed)
        elif bound.kind == "lengths":
            made.append(torch.tensor([16 if bound.name == "segment_ends" else 12]))
        elif bound.dtype == "int64":
            values = {"image_index": [[1], [2], [3], [4]], "last": [11], "cache_index": [0]}.get(bound.name)
            made.append(torch.tensor(values) if values else torch.from_numpy(rng.integers(0, 4, shape)))
        elif bound.dtype == "uint8":
            made.append(torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)))
        else:
            made.append(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(backend._dtype))
    return made


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("passes", [*([each] for each in PASSES), list(PASSES)], ids=lambda p: "+".join(p))
def test_a_pass_changes_no_bit_of_outputs_or_caches(untouched: Path, name: str, passes: list[str]) -> None:
    model = load(untouched)
    backend: Any = model.backend
    graph = next(g for g in model.manifest.ge.graphs if g.name == name)  # type: ignore[union-attr]
    data = model.artifact.read(graph.graph)
    changed = message_class("ModelDef").FromString(data)
    run_passes(changed.graph[0], passes)
    results = []
    for serialized in (data, changed.SerializeToString()):
        inputs = example_inputs(backend.binding(name), backend, seed=3)
        outputs = Executor(read_graph(serialized, name), name).run(inputs)
        results.append([*outputs, *inputs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_passes_remove_what_they_are_for(untouched: Path, name: str) -> None:
    model = load(untouched)
    graph = next(g for g in model.manifest.ge.graphs if g.name == name)  # type: ignore[union-attr]
    proto = message_class("ModelDef").FromString(model.artifact.read(graph.graph)).graph[0]

    def constants() -> list[bytes]:
        values = (op.attr["value"].t for op in proto.op if op.type == "Const")
        return [value.SerializeToString(deterministic=True) for value in values]

    before = len(proto.op)
    assert sum(op.type == "Cast" for op in proto.op) > (name == "visual")
    run_passes(proto, PASSES)
    assert len(proto.op) < before
    # the patches' bytes become numbers; nothing else changes dtype
    assert sum(op.type == "Cast" for op in proto.op) == (name == "visual")
    assert len(set(constants())) == len(constants()), "no constant is there twice"
    read = {edge.rpartition(":")[0] for op in proto.op for edge in op.input}
    effects = ("Data", "NetOutput", "Scatter")
    assert all(op.name in read for op in proto.op if op.type not in effects), "nothing is computed for nobody"


def test_an_unread_write_into_a_cache_stays_alive(untouched: Path) -> None:
    model = message_class("ModelDef")()
    graph = model.graph.add(name="g")
    for name, kind, inputs in (
        ("cache", "Data", []),
        ("new", "Data", []),
        ("write", "Scatter", ["cache:0", "new:0"]),
        ("copy", "TensorMove", ["cache:0"]),
        ("lost", "Scatter", ["copy:0", "new:0"]),
        ("out", "NetOutput", ["new:0"]),
    ):
        op = graph.op.add(name=name, type=kind)
        op.input.extend(inputs)
    run_passes(graph, ["remove_dead_ops"])
    assert [op.name for op in graph.op] == ["cache", "new", "write", "out"]
