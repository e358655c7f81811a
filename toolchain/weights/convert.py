"""From a HF checkpoint to the artifact's weights: streamed, hashed on the way, resumable, never half there."""

import dataclasses
import errno
import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ...artifacts.disk import require_disk
from ...artifacts.dtypes import BY_SAFETENSORS, stored_name, torch_name
from ...artifacts.errors import ArtifactError, ConfigError, TargetError
from ...artifacts.manifest import DTYPES, FileEntry, Folding, Manifest, WeightsPart, empty_manifest
from ...artifacts.safetensors import header_bytes
from ...artifacts.schema import dump_json, from_plain, shown
from ...artifacts.staging import Staging, stage
from ...runtime.models import to_plain
from ...runtime.models.base import FP32, Role, Weight
from ...runtime.models.config import ModelConfig
from ..progress import BytesProgress, no_bytes
from .folding import fold_bias, fold_weight
from .notes import config_notes
from .source import Checkpoint, SourceTensor, numpy_dtype, open_checkpoint
from .stream import ShardPiece, computed, load, padded, write_shard

if TYPE_CHECKING:
    from .processor import ProcessorFiles

SHARD_BYTES = 2 << 30
_TORCH_DTYPES = {torch_name(dtype): dtype for dtype in DTYPES}
# raised when the bytes that one source gives change: a killed run of an older version is not resumed
_CONVERSION = 1


@dataclass(frozen=True)
class Shard:
    """One file to write: its path in the artifact, its tensors, and its exact size."""

    path: str
    weights: tuple[Weight, ...]
    header: bytes
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A checked conversion: only the tensors' values can still be wrong. `fingerprint` names its exact weights."""

    checkpoint: Checkpoint
    processor: "ProcessorFiles"
    dtype: str
    folding: Folding
    shards: tuple[Shard, ...]
    fingerprint: str

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class ConvertResult:
    """What was staged. `resumed_shards` were already there, from a run that was killed; `notes` say which of the
    checkpoint's files contradict each other, and which of them counts.
    """

    model: ModelConfig
    weights: WeightsPart
    processor: tuple[FileEntry, ...]
    bytes: int
    resumed_shards: int
    notes: tuple[str, ...]


def source_dtype(config: dict[str, Any]) -> str:
    """The dtype that config.json names, at the top or in text_config. Raises ConfigError for any other than ours."""
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        for key in ("torch_dtype", "dtype"):
            if (name := level.get(key)) is not None:
                if not isinstance(name, str) or name not in _TORCH_DTYPES:
                    raise ConfigError(
                        f"config.json: {key} is {shown(name)}, expected one of {', '.join(_TORCH_DTYPES)}; "
                        f"choose one with --dtype {'|'.join(DTYPES)}"
                    )
                return _TORCH_DTYPES[name]
    raise ConfigError(f"config.json: no torch_dtype there; choose one with --dtype {'|'.join(DTYPES)}")


def stored_dtype(weight: Weight, dtype: str) -> str:
    """The safetensors dtype of a tensor in an artifact of `dtype`."""
    return stored_name(weight.dtype(dtype))


def _shards(checkpoint: Checkpoint, dtype: str, shard_bytes: int) -> tuple[Shard, ...]:
    """Whole tensors in load order, a new file before one that would exceed `shard_bytes`."""
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in checkpoint.weights:
        tensor_bytes = weight.size * BY_SAFETENSORS[stored_dtype(weight, dtype)].bytes
        if groups[-1] and size + tensor_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += tensor_bytes
    shards = []
    for number, weights in enumerate(groups, start=1):
        header = header_bytes((weight.name, stored_dtype(weight, dtype), weight.shape) for weight in weights)
        data = sum(weight.size * BY_SAFETENSORS[stored_dtype(weight, dtype)].bytes for weight in weights)
        path = f"weights/model-{number:05}-of-{len(groups):05}.safetensors"
        shards.append(Shard(path, tuple(weights), header, len(header) + data))
    return tuple(shards)


def _fingerprint(checkpoint: Checkpoint, dtype: str, folding: Folding, shards: tuple[Shard, ...]) -> str:
    """What the output depends on; of the sources' data, size and time of change stand in for the bytes."""
    digest = blake3()
    files = [[file.path.name, file.size, file.mtime_ns] for file in checkpoint.files]
    plan = [_CONVERSION, dtype, dataclasses.asdict(folding), dataclasses.asdict(checkpoint.config), files]
    digest.update(dump_json(plan))
    for header in (*(file.header for file in checkpoint.files), *(shard.header for shard in shards)):
        digest.update(header)
    return digest.hexdigest()


@contextmanager
def plan_conversion(src: Path, dtype: str | None = None, *, shard_bytes: int = SHARD_BYTES) -> Iterator[Plan]:
    """Open and check a checkpoint, and lay out the shards. `dtype` None takes the one that config.json names.

    Raises ConfigError, WeightError or TargetError; writes nothing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise TargetError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    with open_checkpoint(src) as checkpoint:
        # it reads tokenizer and template by the code of a load: tokenizers, jinja2
        from .processor import read_processor

        processor = read_processor(src, checkpoint.config, checkpoint.plain_config)
        folding = processor.folding
        chosen = dtype or source_dtype(checkpoint.plain_config)
        shards = _shards(checkpoint, chosen, shard_bytes)
        yield Plan(checkpoint, processor, chosen, folding, shards, _fingerprint(checkpoint, chosen, folding, shards))


def _pieces(plan: Plan, weight: Weight) -> Iterator[ShardPiece]:
    dtype = stored_dtype(weight, plan.dtype)
    for part in weight.parts:
        source = plan.checkpoint.tensors[part.name]
        make = _maker(plan, weight, source, (part.rows, *weight.shape[1:]), dtype)
        yield ShardPiece(source, dtype, functools.partial(computed, make, source, dtype) if make else None)


def _maker(
    plan: Plan, weight: Weight, source: SourceTensor, shape: tuple[int, ...], dtype: str
) -> Callable[[], Any] | None:
    """What computes a part of `shape`; None where it is the source as it is."""
    if weight.role in (Role.PATCHES, Role.MEAN):
        channels = plan.checkpoint.config.vision.in_channels
        matrix = functools.partial(_folded, plan, source)
        return matrix if weight.role is Role.PATCHES else lambda: fold_bias(matrix(), plan.folding, channels)
    return None if source.shape == shape else functools.partial(padded, source, dtype, shape)


def _folded(plan: Plan, source: Any) -> Any:
    return fold_weight(load(source), plan.folding, numpy_dtype(stored_name(plan.dtype)))


def _finished(staging: Staging, plan: Plan) -> dict[str, FileEntry]:
    """The shards that a killed run of the same conversion wrote, by path; whatever else it left is deleted."""
    journal = staging.journal.get("weights")
    if not isinstance(journal, dict) or journal.get("fingerprint") != plan.fingerprint:
        if (staging.path / "weights").exists():
            shutil.rmtree(staging.path / "weights")
        return {}
    whole: dict[str, FileEntry] = {}
    try:
        for plain in journal["shards"]:
            entry = from_plain(FileEntry, plain, "staging.json")
            staging.take_up(entry)
            whole[entry.path] = entry
    except ArtifactError:
        # a shard that did not reach the disk before a power cut: it and those after it are written again
        return whole
    return whole


def _write_shards(plan: Plan, staging: Staging, progress: BytesProgress) -> tuple[tuple[FileEntry, ...], int]:
    """Write what is not there yet; returns the entries and how many were there."""
    finished = _finished(staging, plan)
    done = sum(entry.bytes for entry in finished.values())
    require_disk(staging.path, plan.bytes - done, "the conversion")
    progress(done, plan.bytes)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, plan.bytes)

    entries: list[FileEntry] = []
    for shard in plan.shards:
        entry = finished.get(shard.path)
        if entry is None:
            pieces = (piece for weight in shard.weights for piece in _pieces(plan, weight))
            size, digest = write_shard(staging.file(shard.path), shard.header, pieces, advance)
            entry = FileEntry(shard.path, size, digest)
        entries.append(entry)
        staging.journal["weights"] = {
            "fingerprint": plan.fingerprint,
            "shards": [dataclasses.asdict(entry) for entry in entries],
        }
        staging.save_journal()
    return tuple(entries), len(finished)


def convert_planned(plan: Plan, staging: Staging, progress: BytesProgress = no_bytes) -> ConvertResult:
    """Write the plan's weights/ and processor/ into a staged artifact; the caller writes the manifest and commits.

    Raises WeightError for NaN, infinity and overflow, TargetError if the disk is full.
    """
    try:
        files, resumed = _write_shards(plan, staging, progress)
        processor = plan.processor.stage(staging)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TargetError(
            f"{staging.target}: the disk is full; free some space and run the same command again: it resumes"
        ) from error
    weights = WeightsPart(plan.dtype, FP32, plan.folding, files)
    notes = (*config_notes(plan.checkpoint.plain_config), *plan.processor.notes)
    return ConvertResult(plan.checkpoint.config, weights, processor, plan.bytes, resumed, notes)


def artifact_name(src: Path) -> str:
    """What the manifest calls a model: the checkpoint's folder."""
    return src.resolve().name


def _check_graphs_fit(base: Manifest, plan: Plan, target: Path) -> None:
    """Graphs carry the model's shape and dtype. The folding is in the weights alone: graphs take any."""
    if base.ge is None:
        return
    if base.model != to_plain(plan.checkpoint.config):
        what = "a model of another shape or with other constants"
    elif base.ge.dtype != plan.dtype:
        what = f"dtype {base.ge.dtype}, the weights would be {plan.dtype}"
    elif base.ge.admitted is None:
        what = "the weights of an earlier release, whose biases have another dtype"
    else:
        return
    raise ArtifactError(
        f"{target}: holds graphs compiled for {what}; use another --out, or rebuild with qwen2vl-tc build"
    )


def convert(
    src: Path,
    out: Path,
    dtype: str | None = None,
    *,
    progress: BytesProgress = no_bytes,
    sync: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> ConvertResult:
    """Make or replace weights/ and processor/ of the artifact at `out`; its graphs are kept, and refused if they do
    not fit. Raises ToolchainError and then leaves `out` as it was.
    """
    with plan_conversion(src, dtype, shard_bytes=shard_bytes) as plan, stage(out, sync=sync) as staging:
        base = staging.base or empty_manifest("", to_plain(plan.checkpoint.config))
        _check_graphs_fit(base, plan, staging.target)
        result = convert_planned(plan, staging, progress)
        name = artifact_name(src)
        staging.commit(base.with_weights(name, to_plain(result.model), result.weights, result.processor))
    return result
