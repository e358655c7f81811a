"""Offline models: run back bit for bit over the artifact's own weights, wherever they are moved."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import tiny_config
from safetensors import safe_open

from qwen2vl_tc.artifacts.dtypes import BY_GE
from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.ge.binding import Binding, BoundInput, binding_from_bytes
from qwen2vl_tc.artifacts.ge.graph import Constant, Node, read_graph
from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.artifacts.manifest import AirGraph, Manifest
from qwen2vl_tc.artifacts.store import Artifact, open_artifact, read_manifest
from qwen2vl_tc.exporters.torchair.air import convert_to_air, input_name
from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.backends.ge.executor import Executor
from qwen2vl_tc.runtime.dtypes import torch_dtype
from qwen2vl_tc.toolchain.build.air import atc_commands, export_air

GRAPHS = ("visual", "prefill", "decode_b1", "decode_b2")
MAX_LENGTH = 256


def built(build: Any, dtype: str) -> Path:
    _, artifact = build(f"air_{dtype}", tiny_config(), dtype=dtype, batches="1,2", max_length=MAX_LENGTH)
    if read_manifest(artifact).air is None:
        export_air(artifact, sync=False)
    assert isinstance(artifact, Path)
    return artifact


@pytest.fixture(scope="module")
def exported(build: Any) -> Path:
    """An artifact with offline models; bf16, where one parameter is fp32. Tests that change it take `copied`."""
    return built(build, "bf16")


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "moved")


def air_graph(manifest: Manifest, name: str) -> AirGraph:
    assert manifest.air is not None
    return next(graph for graph in manifest.air.graphs if graph.name == name)


def model_def(artifact: Path, name: str) -> Any:
    return message_class("ModelDef").FromString((artifact / f"graphs/air/{name}/{name}.air").read_bytes())


def file_constants(artifact: Path, name: str) -> Iterator[Any]:
    return (op for op in model_def(artifact, name).graph[0].op if op.type == "FileConstant")


def read_back(artifact: Artifact, name: str) -> Executor:
    """An offline model, ready to run on what the manifest lists as its inputs, then its caches."""
    entry = air_graph(artifact.manifest, name).model

    def with_value(node: Node) -> Node:
        if node.op != "FileConstant":
            return node
        given = node.attributes
        file = Path(os.path.normpath(artifact.path / Path(entry.path).parent / given["location"]))
        data = file.read_bytes()[given["offset"] :][: given["length"]]
        return replace(node, constant=Constant(BY_GE[given["dtype"]].name, tuple(given["shape"]), data))

    graph = read_graph(artifact.read(entry), name)
    return Executor(replace(graph, nodes=tuple(map(with_value, graph.nodes))), name)


def example(bound: BoundInput, graph: str, rng: np.random.Generator) -> torch.Tensor:
    """A legal value of a run-time input: segments of 16 and 12 patches, 12 tokens of which 4 are of a picture."""
    rows = {"decode_b1": 1, "decode_b2": 2}.get(graph, 1)
    fixed = {
        "segment_lengths": [16, 12],
        "kv_lengths": [12] if graph == "prefill" else list(range(13, 13 + rows)),
        "image_index": [[1], [2], [3], [4]],
        "last": [11],
        "cache_index": [0] if graph == "prefill" else list(range(12, 12 + rows)),
    }
    if bound.name in fixed:
        return torch.tensor(fixed[bound.name])
    tokens = 16 if graph == "visual" else 4 if bound.name == "image_embeds" else 12
    shape = [tokens if size == -1 else size for size in bound.shape]
    if graph == "visual":
        shape = [2, 16, bound.shape[2]] if bound.name == "patches" else [2, 2, 16]
    if bound.dtype == "uint8":
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    if bound.dtype == "int64":
        return torch.from_numpy(rng.integers(0, 4, shape))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(torch_dtype(bound.dtype))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", GRAPHS)
def test_an_offline_model_read_back_gives_the_outputs_and_caches_of_the_graph_bit_for_bit(
    build: Any, dtype: str, name: str
) -> None:
    model = load(built(build, dtype))
    backend: Any = model.backend
    binding: Binding = backend.binding(name)
    air = air_graph(model.manifest, name)
    rng = np.random.default_rng(5)
    given = {
        input_name(bound): example(bound, name, rng)
        for bound in binding.inputs
        if bound.kind not in ("parameter", "constant")
    }
    assert set(given) == {tensor.name for tensor in (*air.inputs, *air.caches)}
    before = {key: tensor.clone() for key, tensor in given.items()}

    fixed = backend._bound[name]._fixed
    expected = backend.run_graph(
        name,
        [
            constant if constant is not None else given[input_name(bound)]
            for bound, constant in zip(binding.inputs, fixed, strict=True)
        ],
    )
    outputs = read_back(model.artifact, name).run([before[tensor.name] for tensor in (*air.inputs, *air.caches)])
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert torch.isfinite(outputs[-1].float()).all()
    for key, tensor in before.items():
        assert torch.equal(tensor, given[key]), key
    for tensor in air.caches:
        assert before[tensor.name].unique().numel() > 1


@pytest.mark.parametrize("name", GRAPHS)
def test_inputs_come_first_arguments_before_caches_under_their_own_names(exported: Path, name: str) -> None:
    model = model_def(exported, name)
    air = air_graph(read_manifest(exported), name)
    ops = model.graph[0].op
    count = len(air.inputs) + len(air.caches)
    assert (model.name, model.version, model.graph[0].name) == (name, 1, name)
    assert [op.type for op in ops[:count]] == ["Data"] * len(air.inputs) + ["RefData"] * len(air.caches)
    assert [op.attr["index"].i for op in ops[:count]] == list(range(count))
    assert [op.name for op in ops[:count]] == [tensor.name for tensor in (*air.inputs, *air.caches)]
    assert [tuple(op.output_desc[0].shape.dim) for op in ops[:count]] == [t.shape for t in (*air.inputs, *air.caches)]
    assert not any(op.type in ("Data", "RefData") for op in ops[count:])
    host = ["segment_lengths", "kv_lengths"]
    assert list(model.graph[0].attr["_input_placements"].list.i) == [int(op.name not in host) for op in ops[:count]]


def test_sizes_of_a_request_stay_dynamic_and_caches_keep_theirs(exported: Path) -> None:
    manifest = read_manifest(exported)
    dynamic = {name: {t.name for t in air_graph(manifest, name).inputs if -1 in t.shape} for name in GRAPHS}
    assert dynamic["visual"] == {"patches", "positions", "segment_lengths"}
    assert dynamic["prefill"] == {"token_ids", "image_embeds", "image_index", "positions"}
    assert dynamic["decode_b2"] == set()
    caches = air_graph(manifest, "decode_b2").caches
    assert [t.name for t in caches] == ["keys_0", "values_0", "keys_1", "values_1"]
    assert {t.shape for t in caches} == {(2, MAX_LENGTH, 32)}


@pytest.mark.parametrize("name", GRAPHS)
def test_opened_in_its_folder_a_constant_is_the_named_tensor_of_the_weights(exported: Path, name: str) -> None:
    """As GE does it: open `location` from the working directory, seek `offset`, read `length` bytes."""
    folder = exported / "graphs/air" / name
    seen = 0
    for op in file_constants(exported, name):
        location, offset, length = op.attr["location"].s.decode(), op.attr["offset"].i, op.attr["length"].i
        assert not os.path.isabs(location)
        path = Path(os.path.normpath(folder / location))
        assert path.is_relative_to(exported)
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(op.name)
        with open(path, "rb") as raw:
            raw.seek(offset)
            assert raw.read(length) == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert list(op.attr["shape"].list.i) == list(op.output_desc[0].shape.dim) == list(tensor.shape)
        assert torch_dtype(BY_GE[op.attr["dtype"].dt].name) == tensor.dtype
        # a CANN that does not know `location` must not read another file's first bytes
        assert (op.attr["file_path"].s, op.attr["file_id"].s) == (b"", b"")
        seen += 1
    assert seen > 10


def test_no_weight_is_stored_twice(exported: Path) -> None:
    files = sorted(path for path in (exported / "graphs/air").rglob("*") if path.is_file())
    assert [path.name for path in files] == sorted(f"{name}.air" for name in GRAPHS)
    assert sum(path.stat().st_size for path in files) < 250_000
    assert str(exported.parent).encode() not in b"".join(path.read_bytes() for path in files)


def test_a_moved_artifact_runs_and_the_rest_of_it_works_as_before(copied: Path) -> None:
    model = load(copied)
    for name in GRAPHS:
        read_back(model.artifact, name)
    answer = model.generate([{"role": "user", "content": [{"type": "text", "text": "a"}]}], max_new_tokens=2)
    assert answer.token_ids
    model.artifact.check_all()


def test_exporting_again_writes_the_same_bytes_and_touches_no_other_file(copied: Path) -> None:
    first = read_manifest(copied)
    weights = {e.path: (copied / e.path).stat().st_ino for e in first.files() if not e.path.endswith(".air")}
    assert export_air(copied, sync=False) == first == read_manifest(copied)
    assert {path: (copied / path).stat().st_ino for path in weights} == weights


def test_an_artifact_behind_a_link_is_exported_in_its_own_place(copied: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(copied)
    first = read_manifest(copied)
    shutil.rmtree(copied / "graphs/air")
    (copied / "manifest.json").write_bytes(replace(first, air=None).to_bytes())
    assert export_air(link, sync=False) == first
    assert link.is_symlink() and (copied / "graphs/air/visual/visual.air").is_file()


def test_exporting_needs_neither_torch_nor_a_device(copied: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qwen2vl_tc.toolchain.build.air import export_air;"
        "export_air(Path(sys.argv[1]), sync=False); print('torch' in sys.modules, 'torch_npu' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copied)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def without(manifest: Manifest, **parts: Any) -> bytes:
    return replace(manifest, **parts).to_bytes()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weights": None, "air": None}, r"has no weights \(compiled from a config alone\).*qwen2vl-tc convert --src"),
        ({"ge": None, "air": None}, r"has no GE graphs; run `qwen2vl-tc compile"),
    ],
)
def test_what_is_missing_for_an_export_is_named_with_the_command(copied: Path, parts: Any, message: str) -> None:
    manifest = read_manifest(copied)
    before = without(manifest, **parts)
    (copied / "manifest.json").write_bytes(before)
    for entry in set(manifest.files()) - set(replace(manifest, **parts).files()):
        (copied / entry.path).unlink()
    with pytest.raises(ArtifactError, match=message):
        export_air(copied, sync=False)
    assert (copied / "manifest.json").read_bytes() == before


def weights_file(artifact: Path) -> Path:
    return next((artifact / "weights").iterdir())


def delete(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    real = path.parents[2] / path.name
    path.rename(real)
    path.symlink_to(real)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (delete, "model-00001-of-00001.safetensors is missing"),
        (shorten, r"model-00001-of-00001.safetensors: got \d+ bytes, the manifest says"),
        (alter, "model-00001-of-00001.safetensors: blake3"),
        (link, "model-00001-of-00001.safetensors is, or lies below, a symbolic link"),
    ],
)
def test_weights_that_are_not_there_are_refused_by_name_when_exporting(
    copied: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(weights_file(copied))
    with pytest.raises(ArtifactError, match=message):
        export_air(copied, sync=False)


def test_a_graph_that_does_not_fit_its_binding_is_refused(exported: Path) -> None:
    with open_artifact(exported) as artifact:
        graph = next(g for g in artifact.manifest.ge.graphs if g.name == "decode_b1")  # type: ignore[union-attr]
        binding = binding_from_bytes(artifact.read(graph.binding), "binding")
        data = artifact.read(graph.graph)
    short = replace(binding, inputs=binding.inputs[:-1])
    with pytest.raises(ArtifactError, match=r"graph decode_b1: has inputs .* its binding\.json lists"):
        convert_to_air(message_class("ModelDef").FromString(data), short, {}, "x/y.air")
    last = replace(binding.inputs[-1], name="MatMul")
    clash = replace(binding, inputs=(*binding.inputs[:-1], last))
    with pytest.raises(ArtifactError, match="MatMul names an input and another operator"):
        convert_to_air(message_class("ModelDef").FromString(data), clash, {}, "x/y.air")


def test_the_atc_command_names_every_argument_of_a_dynamic_model(exported: Path) -> None:
    manifest = read_manifest(exported)
    commands = dict(atc_commands(manifest))
    visual = shlex.split(commands["graphs/air/visual"])
    assert visual[:4] == ["atc", "--framework=1", "--model=visual.air", "--soc_version=Ascend910B2"]
    (shapes,) = [word for word in visual if word.startswith("--input_shape=")]
    given = dict(item.split(":") for item in shapes.removeprefix("--input_shape=").split(";"))
    assert given == {"patches": "-1,-1,1176", "positions": "2,-1,-1", "segment_lengths": "-1"}
    assert not any("input_shape" in word for word in shlex.split(commands["graphs/air/decode_b1"]))
    # ATC's default would turn bf16 into fp16
    assert all("--precision_mode=must_keep_origin_dtype" in command for command in commands.values())
    assert all((exported / folder / f"{Path(folder).name}.air").is_file() for folder in commands)
