"""Each pass over a real traced graph: executed before and after, bit for bit."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.dtypes import BY_PROTO
from qwen2vl_tc.artifacts.ge.graph import read_graph
from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.exporters.torchair.passes import PASSES, run_passes
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.backends.ge.executor import Executor
from qwen2vl_tc.runtime.dtypes import torch_dtype
from qwen2vl_tc.toolchain.build.compile import CompileOptions, compile_artifact

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
        if binding.graph == "visual" and bound.kind == "argument":
            # two segments of 16 patches, of which the second has 12
            shape = [2, 16, bound.shape[2]] if bound.name == "patches" else [2, 2, 16]
        if fixed is not None:
            made.append(fixed)
        elif bound.kind == "lengths":
            made.append(torch.tensor([16, 12] if bound.name == "segment_lengths" else [12]))
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
    assert sum(op.type == "Cast" for op in proto.op) > (name == "visual") or name == "decode_b1"
    run_passes(proto, PASSES)
    assert len(proto.op) < before
    # the patches' bytes become numbers; nothing else changes dtype
    assert sum(op.type == "Cast" for op in proto.op) == (name == "visual")
    assert len(set(constants())) == len(constants()), "no constant is there twice"
    shapes = [(op.type, tuple(op.input)) for op in proto.op if op.type in ("Shape", "Gather", "Pack")]
    assert len(set(shapes)) == len(shapes) == (4 if name == "visual" else 0), "one computed shape, packed once"
    read = {edge.rpartition(":")[0] for op in proto.op for edge in op.input}
    effects = ("Data", "NetOutput", "Scatter")
    assert all(op.name in read for op in proto.op if op.type not in effects), "nothing is computed for nobody"


def passed(untouched: Path, name: str) -> tuple[Any, Any]:
    """A model over the graphs as torchair emitted them, and one of these after all passes."""
    model = load(untouched)
    graph = next(g for g in model.manifest.ge.graphs if g.name == name)  # type: ignore[union-attr]
    proto = message_class("ModelDef").FromString(model.artifact.read(graph.graph))
    run_passes(proto.graph[0], PASSES)
    return model, proto


@pytest.mark.parametrize("name", GRAPHS)
def test_every_descriptor_says_the_dtype_that_its_tensor_has(untouched: Path, name: str) -> None:
    model, proto = passed(untouched, name)
    backend: Any = model.backend
    made: dict[str, list[torch.dtype]] = {}
    executor = Executor(read_graph(proto.SerializeToString(), name), name)
    inputs = example_inputs(backend.binding(name), backend, seed=3)
    executor.run(inputs, lambda operator, outputs: made.update({operator: [x.dtype for x in outputs]}))
    described = 0
    for op in proto.graph[0].op:
        if op.name in made:
            said = [torch_dtype(BY_PROTO[desc.dtype].name) for desc in op.output_desc]
            assert said == made[op.name], op.name
        for edge, desc in zip(op.input, op.input_desc, strict=False):
            producer, _, index = edge.rpartition(":")
            if producer in made:
                assert torch_dtype(BY_PROTO[desc.dtype].name) == made[producer][int(index)], (op.name, edge)
                described += 1
    assert described > 20


@pytest.mark.parametrize("name", GRAPHS)
def test_old_libraries_are_asked_for_nothing_that_they_lack(untouched: Path, name: str) -> None:
    _, proto = passed(untouched, name)
    ops = proto.graph[0].op
    constants = {op.name: op.attr["value"].t.desc.dtype for op in ops if op.type == "Const"}
    assert not [op.name for op in ops if op.input and not op.input[-1]], "an unfed optional input at the end"
    said = {"is_preprocessed", "_inference_rule", "pse_type", "pre_tokens", "softmax_lse_flag", "keep_dims", "num_axes"}
    assert not [op.name for op in ops if said & set(op.attr)]
    assert all(len(op.input) == len(op.input_desc) for op in ops if op.type == "FusedInferAttentionScore")
    norms = [constants[op.input[1].rpartition(":")[0]] for op in ops if op.type == "LayerNormV4"]
    assert [BY_PROTO[dtype].name for dtype in norms] == (["int32"] if name == "visual" else [])
    assert not [op.name for op in ops if op.type == "TensorMove"]


def test_rotary_mul_is_kept_where_its_contract_holds() -> None:
    for width, expected in ((64, "RotaryMul"), (128, "RotaryMul"), (80, "RotaryPositionEmbedding")):
        graph = message_class("ModelDef")().graph.add(name="g")
        for name, kind, inputs in (
            ("x", "Data", []),
            ("shape", "Const", []),
            ("by_head", "Reshape", ["x:0", "shape:0"]),
            ("turned", "RotaryMul", ["by_head:0", "x:0", "x:0"]),
        ):
            op = graph.op.add(name=name, type=kind)
            op.input.extend(inputs)
        graph.op[1].attr["value"].t.data = struct.pack("<4q", 1, -1, 2, width)
        for _ in range(3):
            graph.op[3].input_desc.add()
        run_passes(graph, ["rotate_any_width"])
        assert graph.op[3].type == expected
        names = [desc.name for desc in graph.op[3].input_desc]
        assert names == (["x", "cos", "sin"] if width == 80 else ["", "", ""])


@pytest.mark.parametrize(("origin", "others"), [("Data", []), ("Reshape", []), ("Const", []), ("GatherV2", ["read"])])
def test_a_copy_that_protects_somebody_is_kept(origin: str, others: list[str]) -> None:
    graph = message_class("ModelDef")().graph.add(name="g")
    reads = [("y", "Mul", ["made:0", "new:0"])] * len(others)
    for name, kind, inputs in (
        ("new", "Data", []),
        ("made", origin, ["new:0"] if origin != "Data" else []),
        ("copy", "TensorMove", ["made:0"]),
        ("write", "ScatterNdUpdate", ["copy:0", "new:0", "new:0"]),
        *reads,
    ):
        graph.op.add(name=name, type=kind).input.extend(inputs)
    run_passes(graph, ["write_fresh_tensors"])
    assert "copy" in [op.name for op in graph.op]


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
