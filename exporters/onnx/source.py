"""The artifact's weights as numpy, a few rows at a time: memory stays small whatever the model's size."""

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...artifacts.dtypes import BY_SAFETENSORS
from ...artifacts.errors import ArtifactError
from ...artifacts.safetensors import TensorInfo, read_header
from ...artifacts.store import Artifact
from ...runtime.dtypes import numpy_dtype

Floats = NDArray[np.float32]
# small enough that the passes of a quantization stay in the processor's cache
CHUNK_VALUES = 1 << 19


class Weights:
    """Parameters by name, checked against the manifest's hashes when the object is made. Raises ArtifactError."""

    def __init__(self, artifact: Artifact) -> None:
        part = artifact.manifest.weights
        if part is None:
            raise ArtifactError(
                f"{artifact.path}: has no weights to export; run `qwen2vl-tc convert --src <hf_dir> --out "
                f"{artifact.path}`"
            )
        self._found: dict[str, tuple[mmap.mmap, TensorInfo]] = {}
        for entry in part.files:
            artifact.check(entry)
            mapping = artifact.map(entry, check=False)
            for info in read_header(memoryview(mapping), f"{artifact.path}: {entry.path}"):
                self._found[info.name] = (mapping, info)
            _forget(mapping, 0, entry.bytes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._found[name][1].shape

    def whole(self, name: str) -> Floats:
        """A small tensor in fp32."""
        rows, shape = self.shape(name)[0], self.shape(name)
        return np.concatenate([chunk for _, chunk in self.chunks(name)]).reshape(rows, *shape[1:])

    def chunks(self, name: str) -> Iterator[tuple[int, Floats]]:
        """(first row, rows in fp32 [rows, values]) through a tensor; what was read is unmapped again."""
        mapping, info = self._found[name]
        dtype = numpy_dtype(BY_SAFETENSORS[info.dtype].name)
        width = int(np.prod(info.shape[1:], dtype=np.int64))
        # even: int4 packs two rows into one byte in one of the layouts
        step = max(2, CHUNK_VALUES // width // 2 * 2)
        for first in range(0, info.shape[0], step):
            rows = min(step, info.shape[0] - first)
            begin = info.begin + first * width * dtype.itemsize
            data = np.frombuffer(mapping, dtype, rows * width, begin).reshape(rows, width)
            yield first, data.astype(np.float32)
            _forget(mapping, begin, rows * width * dtype.itemsize)


def _forget(mapping: mmap.mmap, begin: int, length: int) -> None:
    """Give the pages of a range back; they are in the page cache and can be mapped again."""
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, first, begin + length - first)
