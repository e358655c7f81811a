"""Offline models beside those of torchair's own dynamo_export: the same operators, constants and inputs."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.synthetic import tiny_config

from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.exporters.torchair.passes import PASSES, run_passes
from qwen2vl_tc.runtime.models import config_of
from qwen2vl_tc.runtime.models.base import GraphOptions
from qwen2vl_tc.runtime.models.qwen2_vl import graphs
from qwen2vl_tc.toolchain.build.air import export_air

GRAPHS = ("visual", "prefill", "decode_b1", "decode_b2")
MAX_LENGTH = 256


@pytest.fixture(scope="module")
def exported(build: Any) -> Path:
    _, artifact = build("air_bf16", tiny_config(), dtype="bf16", batches="1,2", max_length=MAX_LENGTH)
    if read_manifest(artifact).air is None:
        export_air(artifact, sync=False)
    assert isinstance(artifact, Path)
    return artifact


class Method(torch.nn.Module):
    """torchair exports a module's forward."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, **arguments: Any) -> Any:
        return getattr(self.model, self.name)(**arguments)


@pytest.fixture(scope="module")
def torchairs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What torchair's dynamo_export hands to C++ to be saved, by graph, with its dynamic-shape error corrected."""
    from qwen2vl_tc.exporters.torchair.converters import register_converters
    from qwen2vl_tc.exporters.torchair.device import open_device
    from qwen2vl_tc.exporters.torchair.trace import _tracing_patches
    from qwen2vl_tc.toolchain.models.build import empty_model, example_arguments

    open_device("Ascend910B2")
    register_converters()
    import torchair
    import torchair._ge_concrete_graph.fx2ge_converter as fx2ge
    import torchair._utils.export_utils as export_utils

    convert = export_utils._convert_data_to_const

    def inputs_first(inputs: Any, graph: Any, path: str, names: Any) -> Any:
        ops = [type(op).FromString(op.SerializeToString()) for op in graph.op]
        first = [op for op in ops if op.type in ("Data", "RefData")]
        del graph.op[:]
        graph.op.extend(sorted(first, key=lambda op: op.attr["index"].i))
        graph.op.extend(op for op in ops if op.type not in ("Data", "RefData"))
        return convert(inputs, graph, path, names)

    saved: list[bytes] = []

    class Saving:
        def __getattr__(self, name: str) -> Any:
            return (lambda data, options: saved.append(data)) if name == "export" else getattr(real, name)

    real = fx2ge._torchair
    config, options = config_of(read_manifest(exported)), GraphOptions(MAX_LENGTH, batches=(1, 2))
    found = {}
    model = empty_model(config, options, "bf16").to_empty(device="npu").eval().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch, _tracing_patches(set()):
        patch.chdir(tmp_path_factory.mktemp("torchair"))
        patch.setattr(export_utils, "_convert_data_to_const", inputs_first)
        # as above 2 GB
        patch.setattr(
            export_utils,
            "_is_weight_externalized",
            lambda inputs, names, graph: (True, sum(id(x) in names for x in inputs)),
        )
        patch.setattr(fx2ge, "_torchair", Saving())
        for spec in graphs(config, options):
            torchair.dynamo_export(
                model=Method(model, spec.method),
                export_path=spec.name,
                export_name=spec.name,
                dynamic=True,
                **example_arguments(spec, config, "bf16", "npu"),
            )
            found[spec.name] = message_class("ModelDef").FromString(saved.pop()).graph[0]
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_torchairs_own_export_has_the_same_operators_constants_and_inputs(
    exported: Path, torchairs: dict[str, Any], name: str
) -> None:
    data = (exported / f"graphs/air/{name}/{name}.air").read_bytes()
    theirs, ours = torchairs[name], message_class("ModelDef").FromString(data).graph[0]
    run_passes(theirs, PASSES)
    assert Counter(op.type for op in theirs.op) == Counter(op.type for op in ours.op)

    def constants(graph: Any) -> list[tuple[str, list[int], int]]:
        found = []
        for op in graph.op:
            if op.type == "FileConstant":
                # theirs are called by their files, <folder>/model_<name with underscores>; ours by the tensors' names
                name = (
                    op.attr["file_path"].s.decode().rpartition("/")[2].removeprefix("model_").removeprefix("constants_")
                )
                found.append((name or op.name.replace(".", "_"), list(op.attr["shape"].list.i), op.attr["dtype"].dt))
        return sorted(found)

    def inputs(graph: Any) -> Counter[tuple[str, tuple[int, ...]]]:
        found = Counter(
            (op.type, tuple(op.output_desc[0].shape.dim)) for op in graph.op if op.type in ("Data", "RefData")
        )
        if name == "visual":
            # the length of the list of segments is free in ours and baked into theirs
            found["Data", (-1,)] += found.pop(("Data", (3,)), 0)
        return found

    assert constants(ours) == constants(theirs)
    assert inputs(ours) == inputs(theirs)
