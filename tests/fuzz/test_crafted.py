"""Artifacts made to do harm, with right hashes: each ends in one error of ours, before a token leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.released import REQUESTS, unpack

from fuzz.runner import variant
from qwen2vl_tc.artifacts.errors import ArtifactError, ToolchainError
from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.artifacts.safetensors import header_bytes
from qwen2vl_tc.runtime import load
from qwen2vl_tc.toolchain.inspect.inspect import inspect_artifact

GRAPH = "graphs/ge/decode_b1/graph.pb"
BINDING = "graphs/ge/decode_b1/binding.json"
WEIGHTS = "weights/model-00001-of-00001.safetensors"
CONSTANTS = "graphs/ge/constants.safetensors"
Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("schema") / "clean")


def use(path: Path) -> None:
    model = load(path, "reference")
    for messages, pictures, _ in REQUESTS:
        model.generate(messages, pictures, max_new_tokens=2)


def refused(clean: Path, work: Path, changes: dict[str, bytes], message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        use(variant(clean, work / "a", changes, restamp=True))


def graph(clean: Path, edit: Edit, path: str = GRAPH) -> dict[str, bytes]:
    model = message_class("ModelDef").FromString((clean / path).read_bytes())
    edit(model.graph[0])
    return {path: model.SerializeToString()}


def ops(graph: Any, kind: str) -> list[Any]:
    return [op for op in graph.op if op.type == kind]


def set_inputs(kind: str, *inputs: str) -> Edit:
    def edit(graph: Any) -> None:
        for i, text in enumerate(inputs):
            ops(graph, kind)[0].input[i] = text

    return edit


def cycle(graph: Any) -> None:
    first, second = ops(graph, "MatMul")[:2]
    first.input[0], second.input[0] = f"{second.name}:0", f"{first.name}:0"


def twin(graph: Any) -> None:
    graph.op[1].name = graph.op[0].name


def unknown(graph: Any) -> None:
    ops(graph, "MatMul")[0].type = "ReadFile"


def huge_constant(*shape: int) -> Edit:
    def edit(graph: Any) -> None:
        constant = ops(graph, "Const")[0].attr["value"].t
        constant.desc.shape.dim[:] = shape
        if 0 in shape:
            constant.data = b""

    return edit


def write_into_a_weight(graph: Any) -> None:
    weight = next(op for op in ops(graph, "Data") if "norm" in op.name or op.attr["index"].i == 0)
    ops(graph, "Scatter")[0].input[0] = f"{weight.name}:0"


def write_into_a_constant(graph: Any) -> None:
    ops(graph, "Scatter")[0].input[0] = f"{ops(graph, 'Const')[0].name}:0"


def behind_a_control_edge(graph: Any) -> None:
    """What the in-place operator writes into is its second edge, and its first input all the same."""
    write_into_a_weight(graph)
    scatter = ops(graph, "Scatter")[0]
    edges = [f"{ops(graph, 'Const')[0].name}:-1", *scatter.input]
    del scatter.input[:]
    scatter.input.extend(edges)


def claim_outputs(graph: Any) -> None:
    producer = ops(graph, "MatMul")[0]
    for _ in range(3):
        producer.output_desc.add()
    ops(graph, "AddRmsNorm")[0].input[0] = f"{producer.name}:3"


def no_attributes(graph: Any) -> None:
    ops(graph, "FusedInferAttentionScore")[0].attr.clear()


def shape_of(op: str, *sizes: int) -> Edit:
    def edit(graph: Any) -> None:
        reshape = ops(graph, op)[0]
        source = next(o for o in graph.op if o.name == reshape.input[1].rpartition(":")[0])
        constant = source.attr["value"].t
        constant.data = b"".join(size.to_bytes(8, "little", signed=True) for size in sizes)
        constant.desc.shape.dim[:] = [len(sizes)]
        constant.desc.dtype = 8

    return edit


GRAPHS: dict[str, tuple[Edit, str]] = {
    "a cycle": (cycle, "part of a cycle"),
    "a missing producer": (set_inputs("MatMul", "nobody:0"), "reads 'nobody', which no node produces"),
    "an edge without a number": (set_inputs("MatMul", "nobody"), "malformed input"),
    "an edge with a number that int() takes and no one else": (set_inputs("MatMul", "x:²"), "malformed input"),
    "an edge with two signs": (set_inputs("MatMul", "x:--1"), "malformed input"),
    "an edge of 5000 digits": (set_inputs("MatMul", "x:" + "9" * 5000), "malformed input"),
    "an output read as a value": (set_inputs("MatMul", "NetOutput:0"), "reads"),
    "two nodes of one name": (twin, "two nodes are called"),
    "an unknown operator": (unknown, "ReadFile .* is not an operator of the reference backend"),
    "a constant larger than its bytes": (huge_constant(1 << 40, 1 << 40), "expected"),
    "a constant of 2^124 values beside a zero": (huge_constant(0, 1 << 62, 1 << 62), "impossible shape"),
    "a constant of negative size": (huge_constant(-1), "has the shape"),
    "a constant of many dimensions": (huge_constant(*[1] * 5000), "has the shape"),
    "a write into a weight": (write_into_a_weight, "writes into .* which is no cache"),
    "a write into a weight behind a control edge": (behind_a_control_edge, "writes into .* which is no cache"),
    "a write into a constant": (write_into_a_constant, "writes into the constant"),
    "an operator with fewer outputs than it claims": (claim_outputs, "reads output 3 of an operator that has 1"),
    "an operator without attributes": (no_attributes, "cannot run on"),
    "a reshape to 2^63 values": (shape_of("Reshape", 1 << 62, 1 << 62), "cannot run on"),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_hostile_graph_is_one_error(clean: Path, tmp_path: Path, case: str) -> None:
    edit, message = GRAPHS[case]
    changes = graph(clean, edit)
    refused(clean, tmp_path, changes, message)


def test_a_file_of_empty_operators_is_refused_before_it_grows_in_memory(clean: Path, tmp_path: Path) -> None:
    body = b"\x32\x00" * (5 << 20)
    length = len(body)
    varint = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14 & 127 | 128, length >> 21])
    refused(clean, tmp_path, {GRAPH: b"\x3a" + varint + body}, "more than any graph")


def first(of_kind: str, **fields: Any) -> Edit:
    def edit(binding: Any) -> None:
        next(bound for bound in binding["inputs"] if bound["kind"] == of_kind).update(fields)

    return edit


def without_outputs(binding: Any) -> None:
    binding["outputs"] = []


BINDINGS: dict[str, tuple[Edit, str]] = {
    "an argument that there is not": (
        first("argument", name="password"),
        "takes password .* as argument of .*, which this",
    ),
    "lengths that there are not": (
        first("lengths", name="x"),
        "takes x .* as lengths of .*, which this",
    ),
    "a layer that there is not": (first("cache", index=1 << 40), "this model has 2 layers of keys, "),
    "a negative layer": (first("cache", index=-1), "this model has 2 layers of keys, "),
    "a cache of another shape": (
        first("cache", shape=[1 << 40, 1 << 40]),
        "this model has 2 layers of keys, ",
    ),
    "a parameter that there is not": (first("parameter", name="x"), "parameter x: got nothing"),
    "a dtype that there is not": (first("parameter", dtype="fp\u0000"), "unknown dtype"),
    "a list as dtype": (first("parameter", dtype=[]), "expected str"),
    "no outputs": (without_outputs, "the manifest lists others; compile again"),
    "another graph's name": (lambda binding: binding.update(graph="prefill"), "is the binding of prefill"),
    "an option of GE's": (lambda binding: binding["local_options"].update({"ge.x": "/etc"}), "unknown option"),
    "an input too few": (lambda binding: binding["inputs"].pop(), "inputs, its binding names"),
    "a weight as cache": (first("parameter", kind="cache", name="keys", index=0), "this model has 2 layers of keys, "),
}


@pytest.mark.parametrize("case", BINDINGS)
def test_a_hostile_binding_is_one_error(clean: Path, tmp_path: Path, case: str) -> None:
    edit, message = BINDINGS[case]
    binding = json.loads((clean / BINDING).read_bytes())
    edit(binding)
    refused(clean, tmp_path, {BINDING: json.dumps(binding).encode()}, message)


def into(*path: str | int, value: Any) -> Edit:
    def edit(plain: Any) -> None:
        for step in path[:-1]:
            plain = plain[step]
        plain[path[-1]] = value

    return edit


MANIFESTS: dict[str, tuple[Edit, str]] = {
    "no heads": (into("model", "text", "num_heads", value=0), "num_heads is 0"),
    "more layers than time": (into("model", "text", "num_layers", value=10**18), "num_hidden_layers 10"),
    "a size beyond 2^63": (into("model", "text", "vocab_size", value=2**64), "vocab_size is 18446744073709551616"),
    "heads that do not divide": (into("model", "text", "num_kv_heads", value=3), "must each divide the one before"),
    "no batches": (into("ge", "batches", value=[]), r"ge\.batches is \[\]"),
    "a batch twice": (into("ge", "batches", value=[1, 1]), r"ge\.batches is \[1, 1\]"),
    "another cache": (into("ge", "max_length", value=2**30), "this model has 2 layers of keys, "),
    "no such dtype": (into("ge", "dtype", value="fp8"), r"ge\.dtype is 'fp8'"),
    "graphs in another order": (lambda plain: plain["ge"]["graphs"].reverse(), "has the graphs decode_b2"),
    "a path out of the folder": (into("processor", 0, "path", value="processor/../../x"), "plain relative path"),
    "an absolute path": (into("processor", 0, "path", value="/etc/passwd"), "plain relative path"),
    "a path with NUL": (into("processor", 0, "path", value="processor/\0"), "plain relative path"),
    "a path too long for the system": (into("processor", 0, "path", value="p" * 5000), "cannot open"),
    "a negative size": (into("processor", 0, "bytes", value=-1), "the manifest says -1"),
    "a file twice": (lambda plain: plain["processor"].append(plain["processor"][0]), "a file is listed twice"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_one_error(clean: Path, tmp_path: Path, case: str) -> None:
    edit, message = MANIFESTS[case]
    manifest = json.loads((clean / "manifest.json").read_bytes())
    edit(manifest)
    refused(clean, tmp_path, {"manifest.json": json.dumps(manifest).encode()}, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN', "NaN is not a JSON number"),
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": -Infinity', "-Infinity is not a JSON number"),
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999', "1e999 is too large for a number"),
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": ' + "9" * 400, "an integer of 400 digits"),
        ('"name": "tiny"', '"name": "\\ud800"', "not valid JSON: .* surrogates not allowed"),
        ('"name": "tiny"', '"name": "a", "name": "b"', "'name' appears twice"),
        ('"name": "tiny"', '"name": ' + "[" * 900 + "]" * 900, "got list .* expected str"),
        ('"name": "tiny"', '"name": ' + "[" * 100000, "not valid JSON"),
    ],
)
def test_what_json_alone_would_take_is_refused(clean: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (clean / "manifest.json").read_text()
    assert old in text
    refused(clean, tmp_path, {"manifest.json": text.replace(old, new, 1).encode()}, message)


def test_files_too_large_to_be_read_are_refused_by_their_size(clean: Path, tmp_path: Path) -> None:
    path = variant(clean, tmp_path / "a", {"processor/tokenizer.json": b"{}"}, restamp=True)
    with open(path / "processor/tokenizer.json", "r+b") as file:
        file.truncate(1 << 40)
    text = (path / "manifest.json").read_text()
    entry = text.index('"path": "processor/tokenizer.json"')
    text = text[:entry] + text[entry:].replace('"bytes": 2', f'"bytes": {1 << 40}', 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="more than any such file"):
        use(path)
    with open(path / "manifest.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match=r"manifest\.json: larger than"):
        use(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("stranger", "F32", (1,))], "is none of the model's"),
        ([("model.norm.weight", "F64", (32,))], "is F64, which no graph takes"),
        ([("model.norm.weight", "F32", (0, 7))], "weight visual.patch_embed.weight: got nothing"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    clean: Path, tmp_path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], message: str
) -> None:
    header = header_bytes(tensors)
    size = sum({"F32": 4, "F64": 8}[dtype] * shape[0] * (shape[1] if shape[1:] else 1) for _, dtype, shape in tensors)
    refused(clean, tmp_path, {WEIGHTS: header + bytes(size)}, message)


def test_constants_without_the_table_of_positions_are_refused(clean: Path, tmp_path: Path) -> None:
    refused(clean, tmp_path, {CONSTANTS: header_bytes([("x", "F32", (1,))]) + bytes(4)}, "has no table text_rope")


def processor(clean: Path, name: str, edit: Edit) -> dict[str, bytes]:
    plain = json.loads((clean / f"processor/{name}").read_bytes())
    edit(plain)
    return {f"processor/{name}": json.dumps(plain).encode()}


PROCESSORS: dict[str, tuple[str, Edit, str]] = {
    "an end token that there is not": (
        "generation_config.json",
        into("eos_token_id", value=1 << 70),
        "eos_token_id is",
    ),
    "deep end tokens": ("generation_config.json", into("eos_token_id", value=json.loads("[" * 900 + "]" * 900)), "eos"),
    "a picture blown up": (
        "preprocessor_config.json",
        lambda plain: plain.update(min_pixels=10**15, max_pixels=10**16),
        "max_pixels",
    ),
    "a token outside the vocabulary": (
        "tokenizer.json",
        into("model", "vocab", "S", value=5000),
        "gives the token 5000, outside the vocabulary of 320",
    ),
    "a pattern that takes for ever": (
        "tokenizer.json",
        into("pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": "(x+x+)+y"}),
        "tokenizer.json: splits text by another pattern",
    ),
    "a normalizer that makes gigabytes": (
        "tokenizer.json",
        into("normalizer", value={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}),
        "tokenizer.json: normalizer Replace is not one of Qwen2's",
    ),
    "a template that never ends": (
        "chat_template.json",
        into("chat_template", value="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "chat_template.json: stopped: the template ran longer than 5.0 s",
    ),
    "a template that reaches for Python": (
        "chat_template.json",
        into("chat_template", value="{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        "chat_template.json: failed with SecurityError",
    ),
    "a template of gigabytes": (
        "chat_template.json",
        into("chat_template", value="{{ 'x' * 9999999999 }}"),
        "chat_template.json: stopped: the template needed more than 256 MB",
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_hostile_processor_file_is_one_error(clean: Path, tmp_path: Path, case: str) -> None:
    name, edit, message = PROCESSORS[case]
    refused(clean, tmp_path, processor(clean, name, edit), message)


def test_inspect_takes_a_graph_apart_only_if_it_fits_its_binding(clean: Path, tmp_path: Path) -> None:
    binding = json.loads((clean / BINDING).read_bytes())
    binding["inputs"].pop()
    path = variant(clean, tmp_path / "a", {BINDING: json.dumps(binding).encode()}, restamp=True)
    with pytest.raises(ArtifactError, match="inputs, its binding names"):
        inspect_artifact(path, None, None)


def test_inspect_says_why_it_cannot_count_the_costs_of_a_graph_with_a_table_of_no_dimensions(
    clean: Path, tmp_path: Path
) -> None:
    name = "graphs/ge/visual/binding.json"
    binding = json.loads((clean / name).read_bytes())
    next(bound for bound in binding["inputs"] if bound["name"] == "vision_rope")["shape"] = []
    path = variant(clean, tmp_path / "a", {name: json.dumps(binding).encode()}, restamp=True)
    assert "does not take (fp32 []" in str(inspect_artifact(path, None, None).graphs["visual"].no_cost)
