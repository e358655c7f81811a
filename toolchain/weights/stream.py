"""Writing one shard: bytes go from the mapped source to the file while another thread hashes and checks them."""

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ...artifacts.errors import TargetError, WeightError
from ...artifacts.naming import naming
from .source import SourceTensor, numpy_dtype

# of source; large enough to make the per-chunk cost vanish, small enough to stay in the processor's cache
CHUNK_BYTES = 8 << 20
_QUEUED_CHUNKS = 4
# copy_file_range: not in this kernel, between these file systems, or for this kind of file
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)

Progress = Callable[[int], None]


def is_finite(data: "memoryview | npt.NDArray[Any]", dtype: str) -> bool:
    """Whether a buffer of `dtype` holds neither NaN nor infinity. Two reductions over the bits, no temporary array."""
    kind = numpy_dtype(dtype)
    bits = np.frombuffer(data, f"u{kind.itemsize}")
    if not len(bits):
        return True
    sign = 1 << (8 * bits.itemsize - 1)
    # NaNs lie above it
    infinity = np.array(np.inf, kind).view(bits.dtype)
    # as signed integers the largest positive value is on top, as unsigned ones the largest negative value
    return bool(bits.view(f"i{kind.itemsize}").max() < infinity and bits.max() < sign + infinity)


@dataclass(frozen=True)
class ShardPiece:
    """Bytes of one output tensor, in order: a source tensor brought to `dtype`, or what `computed` gives instead."""

    source: SourceTensor
    dtype: str
    computed: "Callable[[], npt.NDArray[Any]] | None" = None


def _refuse_nonfinite(source: SourceTensor) -> None:
    raise WeightError(
        f"{source.file.path}: {source.name} holds NaN or infinity; the checkpoint is damaged: download it again"
    )


def _refuse_overflow(source: SourceTensor, dtype: str) -> None:
    raise WeightError(
        f"{source.file.path}: {source.name} holds values of {source.dtype} that {dtype} cannot represent; "
        "use --dtype bf16 or fp32"
    )


def _cast(source: SourceTensor, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """The tensor in `dtype`, a chunk at a time, rounded once to nearest even. Raises WeightError on overflow, NaN."""
    data = source.bytes()
    for begin in range(0, len(data), CHUNK_BYTES):
        chunk = data[begin : begin + CHUNK_BYTES]
        if not is_finite(chunk, source.dtype):
            _refuse_nonfinite(source)
        with np.errstate(over="ignore"):
            # by way of fp32, which holds every bf16 and fp16 value exactly
            cast = np.frombuffer(chunk, numpy_dtype(source.dtype)).astype(np.float32).astype(numpy_dtype(dtype))
        if not is_finite(cast.view(np.uint8), dtype):
            _refuse_overflow(source, dtype)
        yield cast
    source.forget()


class _Checker:
    """Hashes what is handed to `put`, in its own thread.

    Chunks of a source that were not looked at yet come with the source: they are checked for NaN and infinity, and
    unmapped once the source's last byte is hashed.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Any, SourceTensor | None, bool] | None] = queue.Queue(_QUEUED_CHUNKS)
        self._hash = blake3()
        self._bad: SourceTensor | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="hash", daemon=True)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # the queue must go on draining, or `put` would wait for ever
            data, source, is_last = item
            try:
                self._hash.update(data)
                if source and not self._bad and not is_finite(data, source.dtype):
                    self._bad = source
                if source and is_last:
                    source.forget()
            except BaseException as error:  # raised again by the thread that writes; blake3 panics outside Exception
                self._error = error
        self._ended = True

    def put(self, data: Any, source: SourceTensor | None = None, is_last: bool = False) -> None:
        self._refuse()
        self._queue.put((data, source, is_last))

    def digest(self) -> str:
        """Wait for what was put. Raises WeightError if it was not finite, and whatever stopped the hashing."""
        self._stop()
        self._refuse()
        if not self._ended:
            raise TargetError("the thread that hashes the weights ended before its work did; run the command again")
        return self._hash.hexdigest()

    def _refuse(self) -> None:
        if self._error is not None:
            raise self._error
        if self._bad:
            _refuse_nonfinite(self._bad)

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def __enter__(self) -> "_Checker":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop()


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _copy_range(source: SourceTensor, begin: int, count: int, fd: int) -> bool:
    """Let the kernel copy `count` bytes to the end of `fd`, without passing through our memory. False if it cannot."""
    done = 0
    while done < count:
        try:
            copied = os.copy_file_range(source.file.fd, fd, count - done, begin + done)
        except OSError as error:
            if done == 0 and error.errno in _CANNOT_COPY:
                return False
            raise
        if copied == 0:
            raise WeightError(f"{source.file.path}: became shorter while it was read; is it still being downloaded?")
        done += copied
    return True


def write_shard(path: Path, header: bytes, pieces: Iterable[ShardPiece], progress: Progress) -> tuple[int, str]:
    """Write a new file of `header` and `pieces`; returns its size and blake3 hash. `progress` gets bytes as they go.

    Raises WeightError for NaN, infinity and values that overflow the new dtype, naming the tensor, and TargetError for
    a file of more bytes than may be written.
    """
    copies = hasattr(os, "copy_file_range")  # Linux
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with naming(path), _Checker() as checker:
            checker.put(header)
            _write_all(fd, memoryview(header))
            progress(len(header))
            for piece in pieces:
                source = piece.source
                if piece.computed is None and source.dtype == piece.dtype:
                    data = source.bytes()
                    for begin in range(0, len(data), CHUNK_BYTES):
                        chunk = data[begin : begin + CHUNK_BYTES]
                        checker.put(chunk, source, is_last=begin + len(chunk) == len(data))
                        copies = copies and _copy_range(source, source.begin + begin, len(chunk), fd)
                        if not copies:
                            _write_all(fd, chunk)
                        progress(len(chunk))
                    continue
                for array in [piece.computed()] if piece.computed else _cast(source, piece.dtype):
                    octets = array.reshape(-1).view(np.uint8).data
                    checker.put(octets)
                    _write_all(fd, octets)
                    progress(len(octets))
            digest = checker.digest()
        return os.fstat(fd).st_size, digest
    finally:
        os.close(fd)


def computed(make: Callable[[], npt.NDArray[Any]], source: SourceTensor, dtype: str) -> npt.NDArray[Any]:
    """Call `make` on a source that is checked to be finite, and check its result, which has `dtype`."""
    if not is_finite(source.bytes(), source.dtype):
        _refuse_nonfinite(source)
    array = make()
    if not is_finite(array.reshape(-1).view(np.uint8), dtype):
        _refuse_overflow(source, dtype)
    return array


def load(source: SourceTensor) -> npt.NDArray[Any]:
    """A small tensor as an array, in its own dtype."""
    return np.frombuffer(source.bytes(), numpy_dtype(source.dtype)).reshape(source.shape)


def padded(source: SourceTensor, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A tensor in `dtype` with zeros behind its rows and columns, up to `shape`."""
    values = load(source)
    array = np.zeros(shape, numpy_dtype(dtype))
    with np.errstate(over="ignore"):
        # by way of fp32, as _cast
        array[tuple(map(slice, values.shape))] = values.astype(np.float32).astype(numpy_dtype(dtype))
    return array
