"""What a measurement ran on: machine and versions, stated beside every figure."""

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...artifacts.host.process import driver_version
from ...artifacts.manifest import Manifest
from ...runtime.loader import ONNXRUNTIME

if TYPE_CHECKING:
    from ...runtime.backends.base import Backend


@dataclass(frozen=True)
class Machine:
    """cores: those that this process may use. device: the NPU's name, None on CPU."""

    cpu: str
    cores: int
    memory_bytes: int
    device: str | None

    def __str__(self) -> str:
        host = f"{self.cpu}, {self.cores} cores, {self.memory_bytes / 1e9:.0f} GB"
        return f"{self.device}; {host}" if self.device else host


def this_machine(device: str | None = None) -> Machine:
    """The machine here; `device` is the NPU's name where one runs the graphs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(_cpu(), len(os.sched_getaffinity(0)), memory, device)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    # aarch64 kernels name no model
    return names[0] if names else platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Of Python, this package and the given ones that are installed."""
    releases = {"python": platform.python_version()}
    for package in ("qwen2vl-tc", *packages):
        try:
            releases[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return releases


def engine_versions(backend: "Backend") -> dict[str, str]:
    """Of all that takes part where this engine runs."""
    if not on_npu(backend):
        return versions("onnxruntime" if backend.name == ONNXRUNTIME else "torch")
    torch_npu: Any = sys.modules["torch_npu"]
    more = {"cann": str(torch_npu.npu.utils.get_cann_version()), "driver": driver_version() or "unknown"}
    return versions("torch", "torch-npu") | more


def device_name(backend: "Backend") -> str | None:
    """The NPU that this engine runs on; None on CPU."""
    return str(sys.modules["torch_npu"].npu.get_device_name(0)) if on_npu(backend) else None


def compute_threads(backend: "Backend") -> int | None:
    """What the engine computes with on CPU; None on an NPU."""
    if on_npu(backend):
        return None
    if backend.name == ONNXRUNTIME:
        from ...runtime.backends.onnxruntime import threads

        return threads()
    return int(sys.modules["torch"].get_num_threads())


def weights_dtype(manifest: Manifest, backend: str) -> str:
    """What the weights are that this engine runs on: fp32, bf16, int8, ..."""
    if backend == ONNXRUNTIME and manifest.onnx:
        return manifest.onnx.weights
    return manifest.ge.dtype if manifest.ge else "unknown"


def on_npu(backend: "Backend") -> bool:
    return backend.device.startswith("npu")
