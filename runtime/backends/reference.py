"""The reference backend: the artifact's own GE graphs, executed on CPU operator by operator.

Slower than an engine built for CPUs, and the measure of what the graphs compute: no tracing, no vendor package.
"""

import ctypes
from collections.abc import Callable

from torch import Tensor

from ...artifacts.ge.graph import read_graph
from ...artifacts.store import Artifact
from .ge.bound import GeBackend
from .ge.checks import check_graph
from .ge.executor import Executor

Observer = Callable[[str, str, tuple[Tensor, ...]], None]
# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20


class ReferenceBackend(GeBackend):
    """GE graphs on CPU. `observer(graph, operator's name, outputs)` sees every intermediate, for debugging."""

    name = "reference"
    device = "cpu"

    def __init__(self, artifact: Artifact, check_weights: bool = True, observer: Observer | None = None) -> None:
        self.observer = observer
        self._executors: dict[str, Executor] = {}
        _keep_freed_memory()
        super().__init__(artifact, check_weights)

    def place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def load_graph(self, name: str, data: bytes, where: str) -> None:
        graph = read_graph(data, where)
        check_graph(graph, self.binding(name), where)
        self._executors[name] = Executor(graph, where, soc=self._part.soc)

    def run_graph(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        observer = self.observer
        if observer is None:
            return self._executors[name].run(inputs)
        return self._executors[name].run(inputs, lambda operator, outputs: observer(name, operator, outputs))


def _keep_freed_memory() -> None:
    """Let malloc reuse blocks up to 256 MB, and keep as much, for the whole process.

    glibc gives every block above 32 MB back to the kernel; a picture's activations are larger, and having their pages
    made anew for every operator takes longer than most operators. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
