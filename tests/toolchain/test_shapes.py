"""Shape rules say what the reference executor makes, operator by operator; inspecting needs no torch for that."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.dtypes import BY_TORCH
from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.ge.binding import binding_from_bytes
from qwen2vl_tc.artifacts.ge.graph import GeGraph, read_graph
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.runtime.backends.base import Embeds
from qwen2vl_tc.runtime.backends.reference import ReferenceBackend
from qwen2vl_tc.runtime.models import config_of, graphs_of
from qwen2vl_tc.runtime.models.segments import Piece, VisualCall
from qwen2vl_tc.runtime.ops import known
from qwen2vl_tc.runtime.ops.base import TensorSpec
from qwen2vl_tc.runtime.ops.kernel import dtype_name
from qwen2vl_tc.toolchain.inspect.cost import Lengths, input_specs
from qwen2vl_tc.toolchain.inspect.shapes import live_nodes, propagate

from ..conftest import Build
from .test_inspect import graph_of

FORMS = {
    "default": {"operators": "fused", "visual_attention": "segments"},
    "other": {"operators": "recipe", "visual_attention": "tnd"},
}
Shape = tuple[str, tuple[int, ...]]
LENGTHS = Lengths(patches=32, segments=(16, 16), tokens=11, image_tokens=8)


def observed(path: Path, form: str, lengths: Lengths) -> dict[str, dict[str, list[Shape]]]:
    """Every operator's outputs by graph and name, from running all graphs of an artifact at `lengths`."""
    found: dict[str, dict[str, list[Shape]]] = {}

    def observe(graph: str, operator: str, outputs: tuple[torch.Tensor, ...]) -> None:
        shapes = [(BY_TORCH[dtype_name(tensor)].name, tuple(tensor.shape)) for tensor in outputs]
        found.setdefault(graph, {})[operator] = shapes

    backend = ReferenceBackend(open_artifact(path), observer=observe)
    tokens, rows = lengths.tokens, (Piece(0, lengths.patches // 4, 0),)
    given = {"patches": np.zeros((2, 16, 1176), np.uint8), "positions": np.zeros((2, 2, 16), np.int64)}
    call = VisualCall(given, {"segment_lengths": [16, 16]}, rows)
    if form == "tnd":
        packed = {name: array.reshape(-1, array.shape[-1]) for name, array in given.items()}
        packed["positions"] = given["positions"].reshape(2, -1)
        call = VisualCall(packed, {"segment_ends": [16, 32]}, rows)
    embeds = Embeds(backend.visual([call]), lengths.patches // 4)
    cache = backend.allocate(2)
    ids, positions = np.arange(tokens), np.tile(np.arange(tokens), (3, 1))
    backend.prefill(cache, 0, 0, ids, positions, embeds, np.arange(lengths.image_tokens))
    for rows in (1, 2):
        step = np.full(rows, tokens - 1)
        cache = backend.allocate(rows)
        backend.decode(cache, backend.begin(cache, ids[:rows], step, step), [tokens] * rows)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_shape_and_dtype_is_the_one_that_the_reference_executor_makes(form: str, build: Build) -> None:
    _, path = build(f"shapes_{form}", tiny_config(), dtype="bf16", batches="1,2", max_length=64, **FORMS[form])
    real = observed(path, FORMS[form]["visual_attention"], LENGTHS)
    with open_artifact(path) as artifact:
        part = artifact.manifest.ge
        assert part is not None
        config = config_of(artifact.manifest)
        specs_of = graphs_of(config, part)
        assert set(real) == {graph.name for graph in part.graphs} == {"visual", "prefill", "decode_b1", "decode_b2"}
        for each in part.graphs:
            graph = read_graph(artifact.read(each.graph), each.name)
            binding = binding_from_bytes(artifact.read(each.binding), each.name)
            specs = propagate(graph, input_specs(binding, specs_of[each.name], config, LENGTHS), each.name)
            running = [node.name for node in live_nodes(graph) if known(node.op).kind != "data"]
            assert set(running) == set(real[each.name])
            ruled = {name: [(spec.dtype, spec.shape) for spec in specs[name]] for name in running}
            assert ruled == real[each.name]


def test_an_operator_without_a_rule_is_named() -> None:
    graph = graph_of(("x", "Data"), ("odd", "Conv3D", "x"), ("out", "NetOutput", "odd"))
    with pytest.raises(ArtifactError, match="here: Conv3D odd has no shape rule; there are rules for Add, "):
        propagate(graph, [TensorSpec("fp32", (2, 2))], "here")


def test_an_operator_without_a_rule_does_not_matter_where_nothing_reads_it() -> None:
    graph = graph_of(("x", "Data"), ("dead", "Conv3D", "x"), ("y", "FastGelu", "x"), ("out", "NetOutput", "y"))
    assert propagate(graph, [TensorSpec("fp32", (2, 2))], "here")["y"] == (TensorSpec("fp32", (2, 2)),)


def two_inputs(op: str) -> GeGraph:
    return graph_of(("a", "Data"), ("b", "Data"), ("y", op, "a", "b"), ("out", "NetOutput", "y"))


@pytest.mark.parametrize(
    ("op", "a", "b", "said"),
    [
        ("MatMul", TensorSpec("bf16", (2, 3)), TensorSpec("bf16", (4, 5)), "inner sizes 3 and 4 differ"),
        ("Add", TensorSpec("bf16", (2, 3)), TensorSpec("bf16", (2, 4)), "do not broadcast"),
        ("Mul", TensorSpec("bf16", (2, 3)), TensorSpec("fp32", (2, 3)), "the dtypes differ"),
        ("Reshape", TensorSpec("bf16", (2, 3)), TensorSpec("int64", (2,), (-1, 4)), "no shape .* of 6 values"),
        ("Reshape", TensorSpec("bf16", (2, 3)), TensorSpec("int64", (2,)), "must be a constant"),
        ("RmsNorm", TensorSpec("bf16", (2, 3)), TensorSpec("bf16", (2,)), "size of the last axis"),
        ("SplitV", TensorSpec("bf16", (2, 3)), TensorSpec("bf16", (2,)), "split_dim"),
    ],
)
def test_inputs_that_do_not_fit_are_an_error_with_the_operator_and_what_it_got(
    op: str, a: TensorSpec, b: TensorSpec, said: str
) -> None:
    with pytest.raises(ArtifactError, match=rf"here: {op} y does not take \(bf16 \[2, 3\], .*{said}"):
        propagate(two_inputs(op), [a, b], "here")


def test_broadcasting_and_an_inferred_size_follow_numpy() -> None:
    a, b = TensorSpec("bf16", (3, 7, 1)), TensorSpec("bf16", (1, 5))
    assert propagate(two_inputs("Mul"), [a, b], "here")["y"][0].shape == (3, 7, 5)
    shape = TensorSpec("int64", (3,), (0, -1, 7))
    assert propagate(two_inputs("Reshape"), [a, shape], "here")["y"][0].shape == (3, 1, 7)


def test_inspecting_with_costs_and_drawing_imports_no_torch(built: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qwen2vl_tc.toolchain.inspect.inspect import draw_artifact, inspect_artifact\n"
        "path = Path(sys.argv[1])\n"
        "assert inspect_artifact(path).graphs['visual'].cost.flops > 0\n"
        "draw_artifact(path, 'visual')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(built)], check=True)
