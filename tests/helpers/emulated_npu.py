"""The NPU backend on the emulated device: torchair's Python side is real, only the device's execution is replaced.

GE's executor, `TorchNpuGraph`, is swapped for our reference executor working on the emulated device's memory, which
is host memory. Everything above that hook is the code that ships.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qwen2vl_tc.artifacts.ge.graph import read_graph
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.exporters.torchair.device import open_device
from qwen2vl_tc.runtime import Model
from qwen2vl_tc.runtime.backends.ge.executor import Executor
from qwen2vl_tc.runtime.integrity import WeightCheck
from qwen2vl_tc.runtime.loader import open_processor


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor."""
    if tensor.device.type == "cpu":
        return tensor
    assert tensor.is_contiguous(), "the device reads contiguous memory"
    size = tensor.numel() * tensor.element_size()
    raw = (ctypes.c_char * size).from_address(tensor.data_ptr())
    return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)


class EmulatedGraph:
    """Stands where GE executes: load, compile and run as torchair calls them."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.calls: list[str] = []

    def load(self, graph: Any, options: dict[str, str] | None = None) -> None:
        self.calls.append("load")
        self.options = dict(options or {})
        self.executor = Executor(read_graph(graph.SerializeToString(), self.name), self.name)

    def compile(self) -> None:
        assert self.calls == ["load"]
        self.calls.append("compile")
        # what GE keeps, under the key of the graph
        Path(self.options["ge.graph_compiler_cache_dir"], f"{self.options['ge.graph_key']}.om").write_bytes(b"kernels")

    def run(self, inputs: list[torch.Tensor], assigned_outputs: Any = (), stream: Any = None) -> list[torch.Tensor]:
        assert self.calls[:2] == ["load", "compile"]
        with torch.utils._python_dispatch._disable_current_modes():
            outputs = self.executor.run([host_view(tensor) for tensor in inputs])
            results = []
            for output in outputs:
                result = torch.empty(output.shape, dtype=output.dtype, device="npu")
                host_view(result).copy_(output)
                results.append(result)
        return results


@contextmanager
def emulated_npu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """Inside, torchair's graphs run on the emulated device, and compiled kernels would go to `cache`."""
    open_device("Ascend910B2")
    from torchair.core import _backend

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with monkeypatch.context() as patch:
        patch.setattr(_backend, "TorchNpuGraph", EmulatedGraph)
        patch.setattr(_backend, "initialize_graph_engine", lambda options=None: None)
        yield


def load_on_npu(path: Path) -> Model:
    """What `load(path, backend="npu")` does, without the check that no emulated device counts as an NPU."""
    from qwen2vl_tc.runtime.backends.npu import NpuBackend

    artifact = open_artifact(path)
    check = WeightCheck(artifact)
    backend = NpuBackend(artifact, check_weights=False)
    return Model(artifact, open_processor(artifact), backend, "emulated", check, {})


class EmulatedKernels(TorchDispatchMode):
    """Stands where torch_npu's kernels are: runs every operator on the device's memory with the CPU's kernels.

    `names` collects what ran on the device. Operators of the npu namespace need toolchain.eager.npu_ops registered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:
            # in inference mode composite operators arrive whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.device.type == "npu"]
        name = func.overloadpacket.__name__
        place = str(kwargs.get("device") or ("npu" if given else "cpu"))
        if not (given or "npu" in place) or func.is_view or name in ("empty", "empty_strided"):
            return func(*args, **kwargs)
        self.names[name] += 1
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        views = {id(tensor): _strided_host_view(tensor) for tensor in given}
        originals = {id(views[id(tensor)]): tensor for tensor in given}
        on_host = tree_map(lambda x: views.get(id(x), x), (args, kwargs))
        result = func(*on_host[0], **on_host[1])

        def upload(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or "npu" not in place:
                return value
            if id(value) in originals:  # updated in place
                return originals[id(value)]
            made = torch.empty(value.shape, dtype=value.dtype, device="npu")
            host_view(made).copy_(value)
            return made

        return tree_map(upload, result)


def _strided_host_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor, whatever the strides."""
    size = (sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.itemsize
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    raw = (ctypes.c_char * size).from_address(tensor.data_ptr())
    return torch.frombuffer(raw, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


class DeviceWork(TorchDispatchMode):
    """Counts what touches the device outside of graphs: kernels, and copies to and from the host."""

    # no kernel: memory, views and metadata
    FREE = ("empty", "empty_strided", "view", "slice", "detach", "select", "as_strided", "alias", "unsqueeze", "expand")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        copies = ("_to_copy", "copy_", "clone", "_local_scalar_dense", "item")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made_there = "npu" in str((kwargs or {}).get("device", ""))
        on_npu = made_there or any(t.device.type == "npu" for t in given)
        if on_npu and name not in (*copies, *self.FREE):
            # counted before it runs: on the emulated device it can only fail
            self.counts[f"kernel {name}"] += 1
        result = func(*args, **(kwargs or {}))
        target = args[0] if name == "copy_" else result
        places = {t.device.type for t in (*given, target) if isinstance(t, torch.Tensor)}
        if name in copies and "npu" in places:
            on_device = isinstance(target, torch.Tensor) and target.device.type == "npu"
            self.counts["to_device" if on_device else "to_host"] += 1
        return result
