"""The onnxruntime backend: the artifact's ONNX models on the CPU. No torch in the process.

One session of the text model serves prefill and decode, so that there is one copy of the weights. The KV cache is
bound as the model's input and output at once: a step writes only its own tokens into it.
"""

import contextlib
import functools
import importlib.util
import mmap
import os
import platform
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import ArtifactError, MissingDependencyError, RequestError, TargetError
from ...artifacts.manifest import OnnxGraph, OnnxPart
from ...artifacts.store import Artifact, onnx_part
from ..models import config_of
from ..models.base import VisualLimits
from ..models.config import ModelConfig
from ..models.segments import Piece, VisualCall, rows_in
from .base import Backend, Embeds, Ints, Step
from .onnx_check import check_model

# how many threads compute; the default is the cores that this process may use
THREADS_VARIABLE = "QWEN2VL_TC_THREADS"
# more than any machine has cores; onnxruntime would start as many as it is told, for minutes
_MOST_THREADS = 1024
PROVIDER = "CPUExecutionProvider"
# the oldest release that every form of the models was run on; 1.24 has no TensorScatter
LEAST_VERSION = (1, 25)
# Longer prompts, and more patches of several segments, run in parts of this size: what activations take stays bounded.
_PREFILL_TOKENS = 1024
_VISUAL_PATCHES = 4096
_MAX_ROWS = 64
# of the standard operators' cache, whose whole length is read, no more is shown than this many positions allow
_LENGTH_STEP = 256

_NO_MEMORY = re.compile(r"bad_?alloc|bad allocation|Failed to allocate memory|[Oo]ut of memory|Cannot allocate memory")


@dataclass(eq=False)
class OnnxKv:
    """A key and a value array a layer, by the name of the model's input, and the bindings that were made of them.

    Shapes: [rows, kv_heads, max_length, head_dim]; [rows, max_length, kv_dim] in models of standard operators only.
    """

    rows: int
    arrays: dict[str, NDArray[np.float32]]
    bindings: dict[tuple[int, int, int], Any] = field(default_factory=dict)


class OnnxBackend(Backend):
    """Both models, opened in the artifact's folder."""

    name = "onnxruntime"
    device = "cpu"
    max_rows = _MAX_ROWS

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self._part = onnx_part(artifact.manifest, artifact.path)
        self.max_length = self._part.max_length
        # The standard attention multiplies what lies behind a row's length by zero, and zero times a stray NaN is NaN.
        self.reuses_caches = not self._part.standard_only
        self._model = config_of(artifact.manifest)
        self.visual_limits = VisualLimits("equal", _VISUAL_PATCHES)
        self._where = str(artifact.path)
        runtime = import_onnxruntime()
        self.loading.mark("imports")
        graphs = {graph.name: graph for graph in self._part.graphs}
        if missing := sorted({"visual", "text"} - graphs.keys()):
            raise ArtifactError(
                f"{artifact.path}: has no ONNX model {missing[0]}; run `qwen2vl-tc compile {artifact.path} --mode onnx`"
            )
        # onnxruntime lays a model's weights out on one core
        with ThreadPoolExecutor() as pool:
            made = pool.map(
                lambda name: _open(runtime, artifact, graphs[name], self._part, self._model), ("visual", "text")
            )
            self._visual, self._text = made
        self.loading.mark("graphs")

    def allocate(self, rows: int) -> OnnxKv:
        if not 1 <= rows <= self.max_rows:
            raise RequestError(f"{rows} rows: this backend takes 1 to {self.max_rows} at once")
        text, length = self._model.text, self.max_length
        shape: tuple[int, ...] = (rows, text.num_kv_heads, length, text.head_dim)
        if self._part.standard_only:
            shape = (rows, length, text.kv_dim)
        names = [f"{side}.{i}" for i in range(text.num_layers) for side in ("key", "value")]
        # Zeros, as the standard attention needs. They take no memory until they are touched, and then by the page:
        # numpy's own would come in huge pages, 2 MB for a position of each array.
        size = int(np.prod(shape))
        memory = mmap.mmap(-1, 4 * size * len(names), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # a kernel without huge pages refuses the advice, and needs none
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        arrays = (np.frombuffer(memory, np.float32, size, 4 * size * i).reshape(shape) for i in range(len(names)))
        return OnnxKv(rows, dict(zip(names, arrays, strict=True)))

    def visual(self, calls: Sequence[VisualCall]) -> NDArray[np.float32]:
        count = rows_in(calls)
        embeds = np.empty((count, self._model.vision.hidden_size), np.float32)
        for call in calls:
            shape = list(call.arguments["patches"].shape[:2])
            with _failures(f"{self._where}: the visual model fails on {shape[0]} x {shape[1]} patches"):
                lengths = {name: np.array(each, np.int64) for name, each in call.lengths.items()}
                (made,) = self._visual.run(["embeds"], {**call.arguments, **lengths})
            if call.pieces == (Piece(0, count, 0),):
                whole: NDArray[np.float32] = made
                return whole
            for piece in call.pieces:
                embeds[piece.to : piece.to + piece.count] = made[piece.begin : piece.begin + piece.count]
        return embeds

    def prefill(
        self, cache: OnnxKv, row: int, start: int, token_ids: Ints, positions: Ints, embeds: Embeds | None, index: Ints
    ) -> Step:
        step = None
        for begin in range(0, len(token_ids), _PREFILL_TOKENS):
            ids = token_ids[begin : begin + _PREFILL_TOKENS]
            here = (index >= begin) & (index < begin + len(ids))
            step = self._run(
                cache,
                (row, 1),
                ids[None],
                positions[:, None, begin : begin + len(ids)],
                [start + begin + len(ids)],
                (embeds.tensor[here], index[here] - begin) if embeds and here.any() else None,
            )
        if step is None:
            raise RequestError("a prompt needs at least one token")
        return step

    def begin(self, cache: OnnxKv, tokens: Ints | Step, cache_index: Ints, positions: Ints) -> Step:
        return Step(self.tokens(tokens) if isinstance(tokens, Step) else tokens, None, cache_index, positions)

    def decode(self, cache: OnnxKv, step: Step, kv_lengths: list[int]) -> Step:
        rows = len(kv_lengths)
        positions = np.broadcast_to(step.positions[None, :, None], (3, rows, 1))
        made = self._run(cache, (0, rows), step.next_token[:, None], positions, kv_lengths, None)
        return Step(made.next_token, made.logits, step.cache_index + 1, step.positions + 1)

    def _run(
        self,
        cache: OnnxKv,
        rows: tuple[int, int],
        token_ids: Ints,
        positions: Ints,
        kv_lengths: Sequence[int],
        images: tuple[NDArray[np.float32], Ints] | None,
    ) -> Step:
        """The text model on token_ids [rows, tokens] of the cache's rows (first, count); images: embeddings, index."""
        longest = max(kv_lengths)
        self.check_room(min(kv_lengths) - token_ids.shape[1], longest, (int(positions.min()), int(positions.max())))
        text, (first, count) = self._model.text, rows
        embeds, index = images or (np.empty((0, text.hidden_size), np.float32), np.empty(0, np.int64))
        # arrays must live until the run is over
        inputs: dict[str, NDArray[Any]] = {
            "token_ids": np.ascontiguousarray(token_ids, np.int64),
            "image_embeds": np.ascontiguousarray(embeds, np.float32),
            "image_index": np.ascontiguousarray(index[:, None], np.int64),
            "positions": np.ascontiguousarray(positions, np.int64),
            "kv_lengths": np.array(kv_lengths, np.int64),
            "last": np.array([token_ids.shape[1] - 1], np.int64),
        }
        outputs: dict[str, NDArray[Any]] = {
            "next_token": np.empty(count, np.int64),
            "logits": np.empty((count, text.vocab_size), np.float32),
        }
        binding = self._binding(cache, first, count, longest)
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        with _failures(f"{self._where}: the text model fails on {token_ids.shape[1]} token(s) of {count} row(s)"):
            self._text.run_with_iobinding(binding)
        return Step(outputs["next_token"], outputs["logits"])

    def _binding(self, cache: OnnxKv, first: int, count: int, longest: int) -> Any:
        """A binding of rows of the cache, as input and as output; made once."""
        length = self.max_length
        if self._part.standard_only and count == 1:
            # these kernels read the whole cache that they are shown
            length = min(length, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
        key = (first, count, length)
        if key not in cache.bindings:
            binding = self._text.io_binding()
            for name, array in cache.arrays.items():
                part = array[first : first + count]
                if len(part) != count:
                    raise RequestError(f"rows {first} to {first + count - 1} of a cache that has {cache.rows}")
                shape = (count, length, *part.shape[2:]) if self._part.standard_only else part.shape
                for bind, bound in ((binding.bind_input, name), (binding.bind_output, f"present_{name}")):
                    bind(bound, "cpu", 0, np.float32, shape, part.ctypes.data)
            cache.bindings[key] = binding
        return cache.bindings[key]

    def tokens(self, step: Step) -> Ints:
        tokens: Ints = step.next_token
        return tokens

    def logits(self, step: Step) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = step.logits
        return logits


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Whatever onnxruntime raises, as an error of ours: TargetError where memory ran out, else ArtifactError."""
    try:
        yield
    except Exception as error:  # onnxruntime raises classes of its own that have no common base
        first = (str(error).splitlines() or [type(error).__name__])[0]
        # a kernel's allocation fails as C++'s bad_alloc, its arena's with a message
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            raise TargetError(
                f"{what}: not enough memory ({first}); free some, or ask for less: a smaller picture, a shorter prompt"
            ) from error
        raise ArtifactError(f"{what}: {first}; compile the artifact again, or update onnxruntime") from error


def import_onnxruntime() -> Any:
    """The package. Raises MissingDependencyError where it is missing or too old for the models' opset."""
    least = ".".join(map(str, LEAST_VERSION))
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingDependencyError(
            f"backend onnxruntime needs onnxruntime {least} or newer, on Python 3.11 or newer; pip install "
            "'qwen2vl-tc[onnx]'"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime cannot be imported: {error}; pip install --force-reinstall 'onnxruntime>={least}'"
        ) from error

    version = re.match(r"(\d+)\.(\d+)", onnxruntime.__version__)
    if version and tuple(map(int, version.groups())) < LEAST_VERSION:
        raise MissingDependencyError(
            f"onnxruntime {onnxruntime.__version__} is too old, these models need {least}; pip install "
            f"'onnxruntime>={least}'"
        )
    if PROVIDER not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"this onnxruntime has no {PROVIDER} (it has {', '.join(onnxruntime.get_available_providers())}); "
            "pip install onnxruntime"
        )
    return onnxruntime


def threads() -> int:
    """How many threads compute. Raises TargetError for a value of QWEN2VL_TC_THREADS that is no such number."""
    given = os.environ.get(THREADS_VARIABLE)
    if given is None:
        return len(os.sched_getaffinity(0))
    if not given.isdecimal() or not 1 <= int(given) <= _MOST_THREADS:
        raise TargetError(f"{THREADS_VARIABLE} is {given!r}, expected a number of threads, 1 to {_MOST_THREADS}")
    return int(given)


def session_options(runtime: Any) -> Any:
    """The options of both sessions."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    if _products_saturate():
        # makes both factors uint8: half the speed (measured in docs/ONNX.md), and right
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


@functools.cache
def _products_saturate() -> bool:
    """Whether sums of products of uint8 and int8 overflow 16 bits here: on x86-64 without the VNNI instructions."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True


def _open(runtime: Any, artifact: Artifact, graph: OnnxGraph, part: OnnxPart, config: ModelConfig) -> Any:
    """A session of one model. Raises ArtifactError where a file is altered, replaced or refused."""
    path, options = artifact.path / graph.model.path, session_options(runtime)
    model, data = artifact.read(graph.model), artifact.path / graph.data.path
    check_model(model, graph, config, part.standard_only, str(path))
    # bytes: a path need not be UTF-8, and a str must be
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fsencode(data.parent))
    with _failures(f"{path}: onnxruntime {runtime.__version__} refuses it"):
        session = runtime.InferenceSession(model, options, providers=[PROVIDER])
    # onnxruntime opens the data by name: it must still be the file whose hash is checked
    artifact.check_in_place(graph.data)
    return session
