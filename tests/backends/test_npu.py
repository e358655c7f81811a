"""The NPU backend end to end on the emulated device, and what it refuses."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from helpers.emulated_npu import DeviceWork, emulated_npu, load_on_npu
from helpers.synthetic import tiny_config
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_tc.artifacts.errors import ArtifactError, MissingDependencyError, TargetError, ToolchainError
from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.artifacts.soc import DEFAULT_SOC
from qwen2vl_tc.artifacts.store import Artifact
from qwen2vl_tc.runtime import Model, load, loader
from qwen2vl_tc.runtime.backends import npu
from qwen2vl_tc.runtime.memory import device_memory
from qwen2vl_tc.runtime.ops import OPERATORS
from qwen2vl_tc.runtime.requests.answer import Timings, Token
from qwen2vl_tc.runtime.requests.generate import generate_rows
from qwen2vl_tc.toolchain.host.execute_mode import engine


@pytest.fixture(scope="module")
def artifact(build: Any) -> Path:
    _, path = build("npu", tiny_config(), dtype="bf16", batches="1,3", max_length=2048)
    assert isinstance(path, Path)
    return path


@pytest.fixture
def model(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with emulated_npu(monkeypatch, tmp_path):
        yield load_on_npu(artifact)


def question(pictures: int) -> list[dict[str, Any]]:
    images = [Image.new("RGB", (56 + 28 * i, 84), (200, 40 * i, 90)) for i in range(pictures)]
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What colours are these?"}]}]


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_the_npu_backend_gives_the_reference_backends_tokens(model: Model, artifact: Path, pictures: int) -> None:
    expected = load(artifact, backend="reference").generate(question(pictures), max_new_tokens=24)
    assert model.generate(question(pictures), max_new_tokens=24).token_ids == expected.token_ids
    assert model.backend.device == "npu:0"


def started(model: Model, pictures: int, **settings: Any) -> Iterator[list[Token]]:
    """A request that is prefilled and whose steps are still to come."""
    row = model.row(model.processor.prepare(question(pictures)), model.settings(settings))  # type: ignore[arg-type]
    return generate_rows(model.backend, model.backend.allocate(1), [row], model.processor, Timings())


def decode_counts(model: Model, steps: int) -> DeviceWork:
    """Device work outside graphs of a greedy loop of `steps` tokens, prefill left out."""
    running = started(model, 1, max_new_tokens=steps, ignore_eos=True)
    work = DeviceWork()
    with work:
        made = list(running)
    assert len(made) == steps
    return work


def test_a_decoded_token_costs_no_kernel_and_one_copy_to_the_host(model: Model) -> None:
    few, many = decode_counts(model, 10), decode_counts(model, 30)
    assert not [name for name in many.counts if name.startswith("kernel")]
    assert many.counts["to_host"] - few.counts["to_host"] == 20, "one deferrable read a token"
    assert many.counts["to_device"] == few.counts["to_device"], "nothing is sent to the device per token"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at_token", [0, 1, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_that_are_no_numbers_are_an_error_at_every_token_and_the_next_request_works(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float, at_token: int, rows: int
) -> None:
    """Noticed by the token that is read anyway, in the row and at the token that they belong to."""
    product, calls = OPERATORS["MatMul"].kernel(DEFAULT_SOC), [0]

    def spoils_one(node: Any, *inputs: Any) -> Any:
        (logits,) = product(node, *inputs)
        if logits.shape[1] == tiny_config()["vocab_size"] and calls[0] >= 0:
            # one call a row in prefill, one for all rows in decode
            calls[0] += 1
            if calls[0] - rows == at_token:
                logits[min(rows, len(logits)) - 1, 7] = value
        return (logits,)

    monkeypatch.setitem(OPERATORS.changed, "MatMul", dataclasses.replace(OPERATORS["MatMul"], run=spoils_one))
    seen: list[Token] = []
    with emulated_npu(monkeypatch, tmp_path):
        model = load_on_npu(artifact)
        with pytest.raises(ToolchainError, match=rf"row {rows - 1}, token {at_token}: .*its logits hold"):
            model.generate_batch([question(0)] * rows, max_new_tokens=6, ignore_eos=True, on_token=seen.append)
        calls[0] = -1
        whole = model.generate(question(0), max_new_tokens=6, ignore_eos=True).token_ids
    # the rows before it have given out their tokens, the row itself those before the one that is none
    assert [token.id for token in seen if token.row == rows - 1] == list(whole[:at_token])


def test_the_counter_sees_a_kernel_and_a_second_copy(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: one more read or one eager operator a token is counted."""
    backend: Any = model.backend
    original = backend.tokens

    def reads_logits_too(step: Any) -> Any:
        step.logits.cpu()
        with pytest.raises(RuntimeError):
            step.next_token + 1  # the emulated device has no kernels; being asked is what counts
        return original(step)

    monkeypatch.setattr(backend, "tokens", reads_logits_too)
    few, many = decode_counts(model, 10), decode_counts(model, 30)
    assert many.counts["to_host"] - few.counts["to_host"] == 40
    assert many.counts["kernel add"] - few.counts["kernel add"] == 20


def test_steps_run_ahead_of_the_host_by_the_stated_number(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = model.backend
    events: list[str] = []
    for name in ("decode", "tokens"):
        original = getattr(backend, name)

        def record(*args: Any, name: str = name, original: Any = original) -> Any:
            events.append(name)
            return original(*args)

        monkeypatch.setattr(backend, name, record)
    list(started(model, 0, max_new_tokens=6, ignore_eos=True))
    assert npu.RUN_AHEAD == 2
    assert events[:4] == ["decode", "decode", "tokens", "decode"]
    assert (events.count("decode"), events.count("tokens")) == (5, 6)


def test_a_token_is_sent_to_the_host_before_the_next_step_is_launched(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for later, the copy would stand behind the steps launched since, and wait for all of them."""
    backend: Any = model.backend
    events: list[str] = []
    run_graph = backend.run_graph
    monkeypatch.setattr(backend, "run_graph", lambda *args: (events.append("launch"), run_graph(*args))[1])

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("copy_", "_to_copy") and result.device.type == "cpu":
                events.append("send")
            return result

    running = started(model, 0, max_new_tokens=6, ignore_eos=True)
    events.clear()
    with Copies():
        for _ in running:
            events.append("read")
    assert events == ["launch", "send"] * 2 + ["read"] + ["launch", "send", "read"] * 3 + ["read"] * 2


def test_an_answer_that_ends_early_is_not_continued(model: Model) -> None:
    free = model.generate(question(0), max_new_tokens=12, ignore_eos=True).token_ids
    ended = model.generate(question(0), max_new_tokens=12, eos_token_id=free[4])
    assert ended.token_ids == free[: free.index(free[4]) + 1]
    assert ended.finish_reason == "stop"


REQUESTS = [*(question(n) for n in (1, 0, 2)), [{"role": "user", "content": "Hello"}]]


def test_a_batch_answers_rows_of_unequal_length_like_each_alone(model: Model) -> None:
    """Rows end on their own, one by one, while steps run ahead; four requests are two groups on graphs of three."""
    free = [model.generate(request, max_new_tokens=12, ignore_eos=True).token_ids for request in REQUESTS]
    lengths = {end: {(*row, end).index(end) + 1 for row in free} for end in {i for row in free for i in row}}
    end = max(lengths, key=lambda end: (len(lengths[end]), sum(lengths[end])))
    settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": end}
    alone = [model.generate(request, **settings) for request in REQUESTS]
    assert len({len(answer.token_ids) for answer in alone}) > 1
    together = model.generate_batch(REQUESTS, **settings)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def clip(*shades: int) -> dict[str, Any]:
    return {"type": "video", "video": [Image.new("RGB", (84, 56), (shade, 90, 200)) for shade in shades]}


@pytest.mark.parametrize(
    "content",
    [
        [clip(10, 60, 110, 160), clip(200, 100, 0), {"type": "text", "text": "What moves?"}],
        [question(1)[0]["content"][0], clip(40, 80), {"type": "text", "text": "Which one?"}],
        [{"type": "text", "text": "word " * 500}],
    ],
    ids=["two videos", "image and video", "1500 tokens"],
)
def test_clips_and_long_prompts_run_on_the_device_like_on_the_reference_backend(
    model: Model, artifact: Path, content: list[Any]
) -> None:
    request = [{"role": "user", "content": content}]
    expected = load(artifact, backend="reference").generate(request, max_new_tokens=12)
    assert model.generate(request, max_new_tokens=12).token_ids == expected.token_ids
    assert len(expected.prompt_token_ids) > (1500 if len(content) == 1 else 0)


def test_sampling_on_the_device_gives_the_reference_backends_tokens(model: Model, artifact: Path) -> None:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 3, "max_new_tokens": 12}
    expected = load(artifact, backend="reference").generate(question(1), **settings)
    assert model.generate(question(1), **settings).token_ids == expected.token_ids
    assert model.generate_batch([question(1), question(0)], **settings)[0].token_ids == expected.token_ids


def test_a_conversation_on_the_device_keeps_its_cache(model: Model) -> None:
    chat = model.chat()
    chat.send("What is this?", [Image.new("RGB", (84, 84), (200, 10, 90))], max_new_tokens=6)
    second = chat.send("And now?", [Image.new("RGB", (56, 84), (0, 210, 90))], max_new_tokens=6)
    third = chat.send("Which?", max_new_tokens=6)
    fresh = model.generate(chat.messages[:-1], max_new_tokens=6)
    assert 10 < second.cached_tokens < third.cached_tokens
    assert third.token_ids == fresh.token_ids


def test_graphs_get_a_compile_cache_outside_the_artifact(model: Model, artifact: Path, tmp_path: Path) -> None:
    from torchair.core._backend import TorchNpuGraph

    before = sorted(path.name for path in artifact.rglob("*"))
    backend: Any = model.backend
    for name, graph in backend._graphs.items():
        assert isinstance(graph._executor, TorchNpuGraph)
        options = graph._executor.options
        assert options["ge.graph_key"] == name
        assert Path(options["ge.graph_compiler_cache_dir"]).is_relative_to(tmp_path)
        assert set(options["frozenInput"].split(",")) == {"0", "1"}
    assert sorted(path.name for path in artifact.rglob("*")) == before


def test_parameters_keep_one_address_and_are_parameters(model: Model) -> None:
    backend: Any = model.backend
    fixed = {
        id(tensor): tensor.data_ptr()
        for bound in backend._bound.values()
        for tensor in bound._fixed
        if tensor is not None
    }
    model.generate(question(1), max_new_tokens=4)
    for bound in backend._bound.values():
        for tensor in bound._fixed:
            if tensor is not None:
                assert isinstance(tensor, torch.nn.Parameter)
                assert fixed[id(tensor)] == tensor.data_ptr()


def changed(artifact: Artifact, **fields: Any) -> Artifact:
    part = artifact.manifest.ge
    assert part is not None
    manifest = dataclasses.replace(artifact.manifest, ge=dataclasses.replace(part, **fields))
    return Artifact(artifact.path, manifest, artifact.manifest_hash, artifact._files)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"soc": "Ascend310P3"}, "compiled for Ascend310P3, this device is Ascend910B2; compile it again with --soc"),
        ({"versions": {"torch-npu": "2.5.1"}}, "compiled with torch-npu 2.5.1, installed is"),
        ({"max_length": 10**12}, "needs .* GB of device memory .* compile with --max-length"),
    ],
)
def test_what_cannot_run_here_is_refused_before_device_memory_is_taken(
    model: Model, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(npu.NpuBackend, "place", lambda *args: taken.append(args))
    with pytest.raises(TargetError, match=message):
        npu.NpuBackend(changed(model.artifact, **fields))
    assert not taken


CONSTANTS, WEIGHTS = "graphs/ge/constants.safetensors", "weights/model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("mode", "file"),
    [
        ("dynamo", "graphs/ge/decode_b3/graph.pb"),
        ("dynamo", "graphs/ge/prefill/binding.json"),
        ("dynamo", CONSTANTS),
        ("dynamo", WEIGHTS),
        ("eager", CONSTANTS),
        ("eager", WEIGHTS),
    ],
)
def test_an_altered_file_is_refused_before_device_memory_is_taken(
    model: Model, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, file: str
) -> None:
    moved = Path(copytree(artifact, tmp_path / "moved.artifact"))
    data = bytearray((moved / file).read_bytes())
    data[-1] ^= 1
    (moved / file).write_bytes(data)
    monkeypatch.setattr(loader, "npu_problem", lambda: None)
    with DeviceWork() as work, pytest.raises(ArtifactError, match=f"{file}: blake3 .* altered or damaged"):
        load(moved, engine(mode, "npu"))
    assert not work.counts["to_device"]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_write_into_a_weight_is_refused_wherever_a_control_edge_stands(model: Model, place: int) -> None:
    entry = next(each.graph for each in model.manifest.ge.graphs if each.name == "prefill")  # type: ignore[union-attr]
    made = message_class("ModelDef").FromString(model.artifact.read(entry))
    nodes = {op.name: op for op in made.graph[0].op}
    scatter = next(op for op in made.graph[0].op if op.type == "Scatter")
    weight = next(op.input[1] for op in nodes.values() if op.type == "MatMul")
    edges = [f"{weight.partition(':')[0]}:0", *list(scatter.input)[1:]]
    edges.insert(place, f"{edges[1].partition(':')[0]}:-1")
    del scatter.input[:]
    scatter.input.extend(edges)
    with pytest.raises(ArtifactError, match=r"writes into parameter .* which is no cache"):
        model.backend.load_graph("prefill", made.SerializeToString(), "g")  # type: ignore[attr-defined]


def test_a_cann_that_lacks_an_operator_of_the_graphs_is_refused_before_device_memory_is_taken(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_npu
    from torchair.core import _torchair

    def ask(operator: str, inputs: Any, attributes: Any) -> str:
        return "its registry has no approximate" if operator == "GeluV2" else ""

    taken: list[Any] = []
    monkeypatch.setattr(npu, "emulated", lambda: False)
    monkeypatch.setattr(torch_npu.npu.utils, "get_cann_version", lambda: "9.1.0")
    monkeypatch.setattr(_torchair, "check_cann_compat", ask)
    monkeypatch.setattr(npu.NpuBackend, "place", lambda *args: taken.append(args))
    with pytest.raises(TargetError, match="this CANN lacks GeluV2: its registry has no approximate; install a newer"):
        npu.NpuBackend(model.artifact)
    assert not taken


def test_torch_and_torch_npu_of_different_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.12.0")
    with pytest.raises(
        MissingDependencyError, match=r"torch 2\.13.* and torch-npu 2\.12\.0 do not match; install equal"
    ):
        npu.vendor_modules()


def test_memory_that_others_hold_is_told_from_memory_that_is_not_there(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_npu

    part = model.manifest.ge
    assert part is not None
    needed = device_memory(model.manifest, part)
    free = needed.weights + needed.cache // part.max_length * 100
    taken: list[Any] = []
    monkeypatch.setattr(npu.NpuBackend, "place", lambda *args: taken.append(args))
    monkeypatch.setattr(torch_npu.npu, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch_npu.npu, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch_npu.npu, "mem_get_info", lambda: (free, 64 << 30))
    with pytest.raises(TargetError, match=r"are free; stop what else uses the NPU, or compile with --max-length 100$"):
        npu.NpuBackend(model.artifact)
    monkeypatch.setattr(torch_npu.npu, "mem_get_info", lambda: (needed.weights, 64 << 30))
    with pytest.raises(TargetError, match=r"are free; stop what else uses the NPU$"):
        npu.NpuBackend(model.artifact)
    assert not taken


def test_a_new_driver_gets_a_compile_cache_of_its_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for version in ("24.1.rc2", "25.0", None):
        monkeypatch.setattr(npu, "driver_version", lambda version=version: version)
        backend: Any = npu.NpuBackend(model.artifact)
        names.append(backend.cache_folder.name)
    prefix = f"{model.artifact.manifest_hash[:16]}-Ascend910B2-cann-none-driver"
    assert names == [f"{prefix}-24.1.rc2", f"{prefix}-25.0", f"{prefix}-unknown"]


def test_fp32_graphs_are_refused_on_the_device(model: Model, build: Any) -> None:
    _, path = build("gqa2_tied", tiny_config(tie_word_embeddings=True), stored_head=True)
    with pytest.raises(TargetError, match="it is fp32, and the NPU's attention takes bf16 and fp16"):
        load_on_npu(path)


def test_another_chip_of_the_same_family_is_accepted(model: Model) -> None:
    assert npu.NpuBackend(changed(model.artifact, soc="Ascend910B4")).name == "npu"


def test_the_emulated_device_never_counts_as_an_npu(model: Model, artifact: Path) -> None:
    assert load(artifact).backend.name == "reference"
    with pytest.raises(TargetError, match="no NPU is here"):
        load(artifact, backend="npu")


def test_a_model_too_large_for_one_device_is_refused_by_name(artifact: Path) -> None:
    from helpers.synthetic import published

    from qwen2vl_tc.artifacts.manifest import empty_manifest
    from qwen2vl_tc.artifacts.store import read_manifest
    from qwen2vl_tc.runtime.memory import check_fits
    from qwen2vl_tc.runtime.models import config_from_hf, to_plain

    part = read_manifest(artifact).ge
    assert part is not None
    part = dataclasses.replace(part, dtype="bf16", max_length=8192, batches=(1,))
    manifest = empty_manifest("qwen2-vl-72b", to_plain(config_from_hf(published("72b"))))
    with pytest.raises(TargetError, match=r"qwen2-vl-72b needs 149\.5 GB of device memory .* weights alone do not fit"):
        check_fits(manifest, part, 64 << 30)
    check_fits(empty_manifest("qwen2-vl-7b", to_plain(config_from_hf(published("7b")))), part, 64 << 30)
