"""The model's calls over an artifact's weights: all that engines over torch tensors have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...artifacts.errors import ArtifactError, RequestError, TargetError
from ...artifacts.ge.ops import MOST_PACKED, MOST_PATCHES
from ...artifacts.store import Artifact, ge_part
from ..dtypes import torch_dtype
from ..models import config_of, graphs_of, spec_of
from ..models.base import GraphSpec, VisualLimits
from ..models.segments import Piece, VisualCall, rows_in
from .base import Backend, Embeds, Ints, Step
from .weights import load_weights, mapped_tensors


@dataclass(frozen=True)
class KvCache:
    """One key and one value tensor a layer, each [rows, max_length, kv_dim]."""

    rows: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def row(self, row: int) -> "KvCache":
        """A view of one row: what prefill writes is what decode reads."""
        return KvCache(1, *(tuple(t[row : row + 1] for t in side) for side in (self.keys, self.values)))


class ModelBackend(Backend):
    """The model's three calls over an artifact's weights: all that ways of running them have in common.

    A subclass brings the device, and what is run there by the names of the specs.
    """

    def __init__(self, artifact: Artifact, check_weights: bool = True) -> None:
        super().__init__()
        part = ge_part(artifact.manifest, artifact.path)
        self._part = part
        self.max_length = part.max_length
        self._config = config_of(artifact.manifest)
        self._specs = graphs_of(self._config, part)
        decodes = [spec for spec in self._specs.values() if spec.kind == "decode"]
        self._decodes = {spec.rows: spec.name for spec in decodes}
        # how a step is told where its tokens stand
        self._place = next(argument for argument in decodes[0].arguments if argument.indexes)
        self._visual = next(spec for spec in self._specs.values() if spec.kind == "visual")
        self._prefill = next(spec for spec in self._specs.values() if spec.kind == "prefill")
        self.visual_limits = VisualLimits(part.visual_attention, MOST_PATCHES, longest=MOST_PATCHES, packed=MOST_PACKED)
        self._where = str(artifact.path)
        self._dtype = torch_dtype(part.dtype)
        self.max_rows = max(part.batches)
        # The recipe's operators multiply what the mask hides by zero, and zero times a stray NaN is NaN: its caches
        # start as zeros. The fused form never reads past a row's length.
        self.reuses_caches = part.operators != "recipe"
        tensors: dict[str, Tensor] | None = None
        if artifact.manifest.weights is not None:
            tensors = {**load_weights(artifact, check_weights), **mapped_tensors(artifact, part.constants, check=True)}
            self.visual_limits = self._limits(tensors, f"{artifact.path}: {part.constants.path}")
        self.loading.mark("weights")
        self.prepare(artifact, tensors)
        self.loading.mark("graphs")
        # from here on the device's memory is taken: whatever can be refused has been
        if tensors is not None:
            tensors = self.place(tensors)
            self.loading.mark("device")
            self._embedding = tensors["model.embed_tokens.weight"]
            self.bind(tensors)

    def _limits(self, tensors: Mapping[str, Tensor], where: str) -> VisualLimits:
        """Raises ArtifactError where a table that an argument indexes is missing."""
        arguments = [argument for spec in self._specs.values() for argument in spec.arguments]
        for name in sorted({argument.indexes for argument in arguments if argument.indexes}):
            if name not in tensors or not tensors[name].dim():
                raise ArtifactError(f"{where} has no table {name}; compile again")
        # what the positions of patches choose rows of
        sides = [tensors[each.indexes].shape[0] for each in self._visual.arguments if each.indexes]
        return self.visual_limits._replace(side=min([self.visual_limits.side, *sides]))

    def spec(self, name: str) -> GraphSpec:
        """The spec of a graph that the manifest lists. Raises ArtifactError where the model has none of this name."""
        return spec_of(self._specs, name, self._where)

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
        cache: KvCache | None = None,
    ) -> dict[str, Tensor]:
        """Run a graph; returns its outputs by name."""

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

    def allocate(self, rows: int) -> KvCache:
        size = (self.cache_rows(rows), self._part.max_length, self._config.text.kv_dim)
        layers = range(self._config.text.num_layers)
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
        return KvCache(size[0], *sides)

    def visual(self, calls: Sequence[VisualCall]) -> Tensor:
        count, embeds = rows_in(calls), None
        for call in calls:
            made = self._run_visual(call)
            if call.pieces == (Piece(0, count, 0),):
                # what stands behind belongs to no patch
                return made[:count]
            if embeds is None:
                embeds = torch.empty((count, made.shape[1]), dtype=made.dtype, device=made.device)
            for piece in call.pieces:
                embeds[piece.to : piece.to + piece.count].copy_(made[piece.begin : piece.begin + piece.count])
        if embeds is None:
            raise RequestError("there are no pictures to embed")
        return embeds

    def _run_visual(self, call: VisualCall) -> Tensor:
        """The embeddings of one call, padding included."""
        arguments = {name: self.to_device(array) for name, array in call.arguments.items()}
        return self.run(self._visual.name, arguments, call.lengths)["embeds"]

    def prefill(
        self, cache: KvCache, row: int, start: int, token_ids: Ints, positions: Ints, embeds: Embeds | None, index: Ints
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
        self.check_room(start, start + len(token_ids), (int(positions.min()), int(positions.max())))
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
        if any(argument.name == "mask" for argument in self._prefill.arguments):
            hidden = np.arange(self._part.max_length)[None] > start + np.arange(written)[:, None]
            arguments["mask"] = self.to_device(hidden[None, None])
        outputs = self.run(self._prefill.name, arguments, {"kv_lengths": [start + written]}, cache.row(row))
        return Step(outputs["next_token"], outputs["logits"], checked_token=outputs.get("checked_token"))

    def begin(self, cache: KvCache, tokens: Ints | Step, cache_index: Ints, positions: Ints) -> Step:
        def padded(values: Ints) -> Tensor:
            # rows that the batch has and the request has not repeat the last one's values into their own cache row
            missing = [(0, cache.rows - len(values)), *[(0, 0)] * (values.ndim - 1)]
            return self.to_device(np.pad(values, missing, mode="edge"))

        places = list(zip(cache_index.tolist(), positions.tolist(), strict=True))
        for at, position in places:
            self.check_room(at, at + 1, [position])
        if isinstance(tokens, Step):
            # a row without a token is an error as soon as it is read, and until then stays within the embedding
            token_ids = tokens.next_token if cache.rows == 1 else padded(np.maximum(self.tokens(tokens), 0))
        else:
            token_ids = padded(tokens)
        return Step(token_ids, None, padded(cache_index), padded(self._rope_rows(positions)), places=places)

    def _rope_rows(self, positions: Ints) -> Ints:
        """Rotary positions [rows] as decode takes them: a row of its table for every head, the one that turns nothing
        for those of v. Graphs of the schemas before 3 take them as they are."""
        if len(self._place.shape) == 1:
            return positions
        text = self._config.text
        rows = np.repeat(positions[:, None], text.rotary_heads, axis=1)
        rows[:, -text.num_kv_heads :] = self.max_length
        return rows

    def decode(self, cache: KvCache, step: Step, kv_lengths: list[int]) -> Step:
        places = step.places or []
        if not places or kv_lengths != [at + 1 for at, _ in places]:
            raise RequestError(f"a step to the places {places} was asked for with lengths {kv_lengths}")
        for at, position in places:
            self.check_room(at, at + 1, [position])
        place = self._place.name
        arguments = {"token_ids": step.next_token, "cache_index": step.cache_index, place: step.positions}
        lengths = kv_lengths + [kv_lengths[-1]] * (cache.rows - len(kv_lengths))
        outputs = self.run(self._decodes[cache.rows], arguments, {"kv_lengths": lengths}, cache)
        return Step(
            outputs["next_token"],
            outputs["logits"],
            outputs["cache_index"],
            outputs[place],
            outputs.get("checked_token"),
            [(at + 1, position + 1) for at, position in places],
        )

    def tokens(self, step: Step) -> Ints:
        read = step.next_token if step.checked_token is None else step.checked_token
        tokens: Ints = read.cpu().numpy()
        return tokens

    def logits(self, step: Step) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = step.logits.cpu().float().numpy()
        return logits
