"""A backend over an artifact: binds weights once, feeds arguments, by binding.json where a GE graph takes them, and
leaves execution to an engine."""

import mmap
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....artifacts.errors import ArtifactError, RequestError, TargetError
from ....artifacts.ge.binding import CACHE, CONSTANT, LENGTHS, PARAMETER, Binding, BoundInput, binding_from_bytes
from ....artifacts.ge.ops import MOST_PACKED, MOST_PATCHES
from ....artifacts.manifest import FileEntry
from ....artifacts.parameters import FP32, parameters
from ....artifacts.safetensors import GRAPH_DTYPE_NAMES, read_header
from ....artifacts.store import Artifact, ge_part
from ...pictures.segments import Piece, Run, pieces, plan_packed, plan_runs, rows_of
from ..base import Backend, Embeds, Ints, Step
from .checks import check_binding
from .operators import TORCH_DTYPES

_SAFETENSORS_DTYPES = {stored: name for name, stored in GRAPH_DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Cache:
    """One key and one value tensor a layer, each [rows, max_length, kv_dim]."""

    rows: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def row(self, row: int) -> "Cache":
        """A view of one row: what prefill writes is what decode reads."""
        return Cache(1, *(tuple(t[row : row + 1] for t in side) for side in (self.keys, self.values)))


def mapped_tensors(artifact: Artifact, entry: FileEntry, check: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of its mapping; nothing is copied. Raises ArtifactError."""
    where = f"{artifact.path}: {entry.path}"
    mapping = artifact.map(entry, check=check)
    found = {}
    for info in read_header(memoryview(mapping), where):
        if info.dtype not in _SAFETENSORS_DTYPES:
            raise ArtifactError(f"{where}: tensor {info.name} is {info.dtype}, which no graph takes")
        raw = mapped_bytes(mapping, info.begin, info.end - info.begin)
        found[info.name] = raw.view(TORCH_DTYPES[_SAFETENSORS_DTYPES[info.dtype]]).view(info.shape)
    return found


def mapped_bytes(mapping: mmap.mmap, offset: int, length: int) -> Tensor:
    """A part of a mapped file as bytes; nothing is copied."""
    # torch has no read-only tensors and warns of the mapping being one; nothing writes to a weight
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.frombuffer(mapping, np.uint8, length, offset))


def load_weights(artifact: Artifact, check: bool) -> dict[str, Tensor]:
    """All parameters by name, checked against the model's shapes. Raises ArtifactError for any that does not fit."""
    part = artifact.manifest.weights
    if part is None:
        raise ArtifactError(
            f"{artifact.path}: has no weights (compiled from a config alone); run `qwen2vl-tc convert --src <hf_dir> "
            f"--out {artifact.path}`"
        )
    found: dict[str, Tensor] = {}
    wanted_tensors = list(parameters(artifact.manifest.model, part.bias_dtype))
    wanted_names = {wanted.name for wanted in wanted_tensors}
    for entry in part.files:
        for name, tensor in mapped_tensors(artifact, entry, check).items():
            if name in found:
                raise ArtifactError(f"{artifact.path}: {entry.path}: tensor {name} is also in another file")
            if name not in wanted_names:
                raise ArtifactError(f"{artifact.path}: {entry.path}: tensor {name[:80]} is none of the model's")
            found[name] = tensor
    for wanted in wanted_tensors:
        tensor = found.get(wanted.name)  # type: ignore[assignment]
        dtype = TORCH_DTYPES["fp32" if wanted.dtype == FP32 else part.dtype]
        if tensor is None or tuple(tensor.shape) != wanted.shape or tensor.dtype != dtype:
            got = "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
            raise ArtifactError(
                f"{artifact.path}: weight {wanted.name}: got {got}, expected {list(wanted.shape)} {dtype}; "
                "convert it again"
            )
    return found


class BoundGraph:
    """One graph's binding: puts named arguments into the order of the graph's inputs.

    Parameters and constants are checked when it is made, against `tensors` wherever those are, and looked up once, by
    `bind`, where the graph runs; `tensors` is None for a graph that is only loaded, not run.
    """

    def __init__(self, binding: Binding, tensors: Mapping[str, Tensor] | None) -> None:
        self.binding = binding
        self.outputs = [output.name for output in binding.outputs]
        self._fixed: list[Tensor | None] = [None] * len(binding.inputs)
        if tensors is None:
            return
        for i, bound in enumerate(binding.inputs):
            if bound.kind in (PARAMETER, CONSTANT):
                tensor = tensors.get(bound.name)
                dtype = TORCH_DTYPES.get(bound.dtype)
                if tensor is None or tuple(tensor.shape) != bound.shape or tensor.dtype != dtype:
                    got = "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
                    raise ArtifactError(
                        f"graph {binding.graph}: {bound.kind} {bound.name}: got {got}, the graph was compiled for "
                        f"{list(bound.shape)} {bound.dtype}; compile the artifact again"
                    )
                self._fixed[i] = tensor

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters and constants from `tensors`: the same ones, where the graph runs."""
        pairs = zip(self.binding.inputs, self._fixed, strict=True)
        self._fixed = [None if fixed is None else tensors[bound.name] for bound, fixed in pairs]

    def inputs(self, arguments: Mapping[str, Tensor], lengths: Mapping[str, list[int]], cache: Cache | None) -> Any:
        """The graph's inputs in order. Raises RequestError where an argument does not have the compiled shape."""
        caches = {"keys": cache.keys, "values": cache.values} if cache else {}
        found: list[Tensor] = []
        for bound, fixed in zip(self.binding.inputs, self._fixed, strict=True):
            try:
                if fixed is not None:
                    tensor = fixed
                elif bound.kind == CACHE:
                    tensor = caches[bound.name][bound.index]  # type: ignore[index]
                elif bound.kind == LENGTHS:
                    tensor = self._fitting(bound, torch.tensor(lengths[bound.name], dtype=torch.int64))
                else:
                    tensor = self._fitting(bound, arguments[bound.name])
            except KeyError as error:
                raise ArtifactError(
                    f"graph {self.binding.graph}: takes {bound.kind} {bound.name}, which nothing feeds it; compile the "
                    "artifact again"
                ) from error
            found.append(tensor)
        return found

    def examples(self, device: str) -> list[Tensor]:
        """Inputs of the right places and formats, with 1 for every dynamic size: what GE wants to see once."""
        return [
            torch.empty(
                [1 if size == -1 else size for size in bound.shape],
                dtype=TORCH_DTYPES[bound.dtype],
                device="cpu" if bound.host else device,
            )
            if fixed is None
            else fixed
            for bound, fixed in zip(self.binding.inputs, self._fixed, strict=True)
        ]

    def _fitting(self, bound: BoundInput, tensor: Tensor) -> Tensor:
        sizes = zip(tensor.shape, bound.shape, strict=False)
        if tensor.dim() != len(bound.shape) or any(wanted not in (-1, got) for got, wanted in sizes):
            raise RequestError(
                f"{self.binding.graph}.{bound.name}: got {list(tensor.shape)}, the artifact wants {list(bound.shape)}"
            )
        return tensor


class ModelBackend(Backend):
    """The model's three calls over an artifact's weights: all that ways of running them have in common.

    A subclass brings the device, and what is run there by the names visual, prefill and decode_b<rows>.
    """

    def __init__(self, artifact: Artifact, check_weights: bool = True) -> None:
        super().__init__()
        part = ge_part(artifact.manifest, artifact.path)
        self._part = part
        self.max_length = part.max_length
        self._model = artifact.manifest.model
        self._where = str(artifact.path)
        self._dtype = TORCH_DTYPES[part.dtype]
        self.max_rows = max(part.batches)
        self._by_head = any(output.name == "rope_rows" for graph in part.graphs for output in graph.outputs)
        # The recipe's operators multiply what the mask hides by zero, and zero times a stray NaN is NaN: its caches
        # start as zeros. The fused form never reads past a row's length.
        self.reuses_caches = part.operators != "recipe"
        tensors: dict[str, Tensor] | None = None
        if artifact.manifest.weights is not None:
            tensors = {**load_weights(artifact, check_weights), **mapped_tensors(artifact, part.constants, check=True)}
            if "vision_rope" not in tensors or not tensors["vision_rope"].dim():
                raise ArtifactError(f"{artifact.path}: {part.constants.path} has no table vision_rope; compile again")
        self.loading.mark("weights")
        self.prepare(artifact, tensors)
        self.loading.mark("graphs")
        # from here on the device's memory is taken: whatever can be refused has been
        if tensors is not None:
            tensors = self.place(tensors)
            self.loading.mark("device")
            self._embedding = tensors["model.embed_tokens.weight"]
            self._max_side = tensors["vision_rope"].shape[0]
            self.bind(tensors)

    @abstractmethod
    def prepare(self, artifact: Artifact, tensors: dict[str, Tensor] | None) -> None:
        """Read and check all that runs, on the host. `tensors`: parameters and constants there, None without weights.

        Raises ArtifactError for what is altered, unknown, or does not fit the tensors.
        """

    @abstractmethod
    def place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put parameters and constants where the graphs run, once."""

    @abstractmethod
    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take what `place` returned as the parameters and constants of all that runs."""

    @abstractmethod
    def run(
        self,
        name: str,
        arguments: Mapping[str, Tensor],
        lengths: Mapping[str, list[int]],
        cache: Cache | None = None,
    ) -> dict[str, Tensor]:
        """Run visual, prefill or decode_b<rows>; returns its outputs by name."""

    def to_device(self, array: NDArray[Any]) -> Tensor:
        """A host array, contiguous, on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def cache_rows(self, rows: int) -> int:
        fitting = [batch for batch in self._part.batches if batch >= rows]
        if not fitting:
            raise RequestError(
                f"{rows} rows: the artifact has decode graphs for {', '.join(map(str, self._part.batches))}; "
                f"compile it with --batch {rows}"
            )
        return min(fitting)

    def allocate(self, rows: int) -> Cache:
        size = (self.cache_rows(rows), self._part.max_length, self._model.text.kv_dim)
        layers = range(self._model.text.num_layers)
        try:
            if self.reuses_caches:
                sides = [
                    tuple(torch.empty(size, dtype=self._dtype, device=self.device) for _ in layers) for _ in range(2)
                ]
            else:
                zeros = torch.zeros(size, dtype=self._dtype)
                sides = [tuple(zeros.clone().to(self.device) for _ in layers) for _ in range(2)]
        except RuntimeError as error:
            # the words of devices, and of the CPU
            if not any(words in str(error).lower() for words in ("out of memory", "can't allocate memory")):
                raise
            raise TargetError(
                f"{self.device}: no memory for another KV cache of {size[0]} x {size[1]} tokens; end a conversation or "
                "request that holds one"
            ) from error
        return Cache(size[0], *sides)

    def visual(self, patches: NDArray[np.uint8], positions: Ints, segment_ends: list[int]) -> Embeds:
        if positions.max() >= self._max_side:
            raise RequestError(
                f"a picture is {int(positions.max()) + 1} patches long, the visual graph takes {self._max_side}; "
                "make it smaller, with max_pixels for instance"
            )
        longest = int(np.diff(segment_ends, prepend=0).max())
        if longest > MOST_PATCHES:
            raise RequestError(
                f"a picture has {longest:,} patches, the visual graph takes {MOST_PATCHES:,}; make it smaller, "
                "with max_pixels for instance"
            )
        merge = self._model.vision.spatial_merge_size
        if self._part.visual_attention == "segments":
            runs = plan_runs(segment_ends, MOST_PATCHES, pads=True)
        else:
            runs = plan_packed(segment_ends, MOST_PATCHES, MOST_PACKED)
        count = len(patches) // merge**2
        embeds = None
        for run in runs:
            made = self._run_visual(run, segment_ends, patches, positions)
            found = list(pieces(run, segment_ends, merge))
            if found == [Piece(0, count, 0)]:
                # what stands behind belongs to no patch
                return Embeds(made[:count], count)
            if embeds is None:
                embeds = torch.empty((count, made.shape[1]), dtype=made.dtype, device=made.device)
            for piece in found:
                embeds[piece.to : piece.to + piece.count].copy_(made[piece.begin : piece.begin + piece.count])
        return Embeds(embeds, count)

    def _run_visual(self, run: Run, segment_ends: list[int], patches: NDArray[np.uint8], positions: Ints) -> Tensor:
        """The embeddings of a run, padding included."""
        form = self._part.visual_attention
        taken, places = rows_of(run, segment_ends, patches, positions)
        if form == "segments":
            lengths = {"segment_lengths": list(run.lengths)}
        else:
            taken, places = taken.reshape(-1, taken.shape[2]), places.reshape(2, -1)
            lengths = {"segment_ends": np.cumsum(run.packed).tolist()}
        arguments = {"patches": self.to_device(taken), "positions": self.to_device(places)}
        if form == "masked":
            # only artifacts of the schemas before 3 have this form
            segment = np.searchsorted(lengths.pop("segment_ends"), np.arange(len(taken)), side="right")
            arguments["segment_mask"] = self.to_device((segment[:, None] != segment[None])[None, None])
        return self.run("visual", arguments, lengths)["embeds"]

    def prefill(
        self, cache: Cache, row: int, start: int, token_ids: Ints, positions: Ints, embeds: Embeds | None, index: Ints
    ) -> Step:
        count = len(token_ids)
        if count == 1:
            # With one query token the attention of prefill takes no causal mask. A second token, read by nobody and
            # overwritten by the next step, makes it two.
            if start + 2 > self.max_length:
                raise RequestError(
                    f"one token at cache position {start}, the last of {self.max_length}, cannot be prefilled; "
                    f"compile with --max-length {start + 2}"
                )
            token_ids, positions = np.repeat(token_ids, 2), np.repeat(positions, 2, 1)
        self._check_room(start, start + len(token_ids), int(positions.max(initial=0)))
        written = len(token_ids)
        if embeds is None:
            # The graph always writes rows of embeddings. With no picture it writes the first token's own embedding
            # over itself: no second graph, no operator more.
            tensor = self._embedding[int(token_ids[0])][None]
            index = np.zeros(1, np.int64)
        else:
            tensor = embeds.tensor
        arguments = {
            "token_ids": self.to_device(token_ids),
            "image_embeds": tensor,
            "image_index": self.to_device(index[:, None]),
            "positions": self.to_device(positions),
            "cache_index": self.to_device(np.array([start], np.int64)),
            "last": self.to_device(np.array([count - 1], np.int64)),
        }
        if self._part.operators == "recipe":
            hidden = np.arange(self._part.max_length)[None] > start + np.arange(written)[:, None]
            arguments["mask"] = self.to_device(hidden[None, None])
        outputs = self.run("prefill", arguments, {"kv_lengths": [start + written]}, cache.row(row))
        return Step(outputs["next_token"], outputs["logits"], checked_token=outputs.get("checked_token"))

    def _check_room(self, begin: int, end: int, position: int) -> None:
        """Raises RequestError unless cache positions from `begin` to before `end` exist, and rotary ones to `position`:
        the device's operators write and read wherever an index points."""
        if begin < 0 or not begin < end <= self.max_length or not 0 <= position < self.max_length:
            raise RequestError(
                f"cache positions {begin} to {end} and rotary position {position} are needed, the artifact has "
                f"{self.max_length}" + ("" if begin < 0 else f"; compile with --max-length {max(end, position + 1)}")
            )

    def begin(self, cache: Cache, tokens: Ints | Step, cache_index: Ints, positions: Ints) -> Step:
        def padded(values: Ints) -> Tensor:
            # rows that the batch has and the request has not repeat the last one's values into their own cache row
            missing = [(0, cache.rows - len(values)), *[(0, 0)] * (values.ndim - 1)]
            return self.to_device(np.pad(values, missing, mode="edge"))

        for at, position in zip(cache_index.tolist(), positions.tolist(), strict=True):
            self._check_room(at, at + 1, position)
        if isinstance(tokens, Step):
            # a row without a token is an error as soon as it is read, and until then stays within the embedding
            token_ids = tokens.next_token if cache.rows == 1 else padded(np.maximum(self.tokens(tokens), 0))
        else:
            token_ids = padded(tokens)
        return Step(
            token_ids, None, padded(cache_index), padded(self._rope_rows(positions)), written=cache_index.tolist()
        )

    def _rope_rows(self, positions: Ints) -> Ints:
        """Rotary positions [rows] as decode takes them: a row of its table for every head, the one that turns nothing
        for those of v. Graphs of the schemas before 3 take them as they are."""
        if not self._by_head:
            return positions
        text = self._model.text
        rows = np.repeat(positions[:, None], text.num_heads + 2 * text.num_kv_heads, axis=1)
        rows[:, -text.num_kv_heads :] = self.max_length
        return rows

    def decode(self, cache: Cache, step: Step, kv_lengths: list[int]) -> Step:
        if kv_lengths != [at + 1 for at in step.written or ()] or max(kv_lengths) > self.max_length:
            raise RequestError(
                f"a step after cache positions {step.written} was asked for with lengths {kv_lengths}; the artifact "
                f"has {self.max_length}"
            )
        place = "rope_rows" if self._by_head else "positions"
        arguments = {"token_ids": step.next_token, "cache_index": step.cache_index, place: step.positions}
        lengths = kv_lengths + [kv_lengths[-1]] * (cache.rows - len(kv_lengths))
        outputs = self.run(f"decode_b{cache.rows}", arguments, {"kv_lengths": lengths}, cache)
        return Step(
            outputs["next_token"],
            outputs["logits"],
            outputs["cache_index"],
            outputs[place],
            outputs.get("checked_token"),
            kv_lengths,
        )

    def tokens(self, step: Step) -> Ints:
        read = step.next_token if step.checked_token is None else step.checked_token
        tokens: Ints = read.cpu().numpy()
        return tokens

    def logits(self, step: Step) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = step.logits.cpu().float().numpy()
        return logits


class GeBackend(ModelBackend):
    """Everything about GE graphs but their execution, which a subclass brings for its device."""

    def prepare(self, artifact: Artifact, tensors: dict[str, Tensor] | None) -> None:
        self._bound: dict[str, BoundGraph] = {}
        for graph in self._part.graphs:
            where = f"{artifact.path}: {graph.binding.path}"
            binding = binding_from_bytes(artifact.read(graph.binding), where)
            check_binding(binding, graph.name, self._part, self._model, where)
            self._bound[graph.name] = BoundGraph(binding, tensors)
            self.load_graph(graph.name, artifact.read(graph.graph), f"{artifact.path}: {graph.graph.path}")

    def bind(self, tensors: dict[str, Tensor]) -> None:
        for bound in self._bound.values():
            bound.bind(tensors)

    @abstractmethod
    def load_graph(self, name: str, data: bytes, where: str) -> None:
        """Make a serialized graph ready to run. Takes no device memory."""

    @abstractmethod
    def run_graph(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        """Run a loaded graph."""

    def binding(self, name: str) -> Binding:
        return self._bound[name].binding

    def run(
        self,
        name: str,
        arguments: Mapping[str, Tensor],
        lengths: Mapping[str, list[int]],
        cache: Cache | None = None,
    ) -> dict[str, Tensor]:
        bound = self._bound[name]
        outputs = self.run_graph(name, bound.inputs(arguments, lengths, cache))
        if len(outputs) != len(bound.outputs):
            raise ArtifactError(f"graph {name}: gave {len(outputs)} outputs, its binding names {len(bound.outputs)}")
        return dict(zip(bound.outputs, outputs, strict=True))
