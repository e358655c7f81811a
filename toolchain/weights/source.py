"""A HF checkpoint on disk: its config, and where each tensor's bytes lie, checked before anything is written."""

import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...artifacts.dtypes import BY_SAFETENSORS, stored_name
from ...artifacts.errors import ArtifactError, ConfigError, WeightError
from ...artifacts.integrity import check_relative
from ...artifacts.manifest import DTYPES
from ...artifacts.safetensors import MAX_HEADER_BYTES, read_header
from ...runtime import dtypes
from ...runtime.models import config_from_hf, family_of
from ...runtime.models.base import Weight
from ...runtime.models.config import ModelConfig
from .files import read_object
from .names import is_quantized, is_recomputed, legacy_name, new_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = tuple(map(stored_name, DTYPES))
_HEADER_BYTES = 8
_NAMES_SHOWN = 6
_COMPARED_VALUES = 4 << 20
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class SourceFile:
    """One safetensors file, open and mapped. `mtime_ns` and `header` identify its content for resuming."""

    path: Path
    fd: int
    map: mmap.mmap
    size: int
    mtime_ns: int
    header: bytes


@dataclass(frozen=True)
class SourceTensor:
    """One tensor: `name` as stored, bytes `begin` to `end` of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SourceFile
    begin: int
    end: int

    def bytes(self) -> memoryview:
        return memoryview(self.file.map)[self.begin : self.end]

    def forget(self) -> None:
        """Unmap the pages that only this tensor uses, so that resident memory does not grow to the checkpoint's size.

        They stay in the system's cache, and come back if they are touched again.
        """
        first = -(-self.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        count = self.end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if count > 0:
            self.file.map.madvise(mmap.MADV_DONTNEED, first, count)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint whose tensors are exactly those that the config asks for. `tensors` has the legacy names."""

    folder: Path
    config: ModelConfig
    plain_config: dict[str, Any]
    weights: tuple[Weight, ...]
    tensors: dict[str, SourceTensor]
    files: tuple[SourceFile, ...]


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a safetensors dtype name."""
    return dtypes.numpy_dtype(BY_SAFETENSORS[dtype].name)


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMES_SHOWN} more" if len(ordered) > _NAMES_SHOWN else ""
    return ", ".join(ordered[:_NAMES_SHOWN]) + more


def _find_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The checkpoint's safetensors files, and the index's map of tensor to file (empty for a single file)."""
    # transformers also prefers the single file when both are there
    if os.path.lexists(folder / SINGLE_FILE):
        return [SINGLE_FILE], {}
    if os.path.lexists(folder / INDEX_FILE):
        weight_map = (read_object(folder, INDEX_FILE, WeightError) or {}).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WeightError(f"{folder / INDEX_FILE}: weight_map is not an object of file names; download it again")
        for name in set(weight_map.values()):
            try:
                check_relative(name, str(folder / INDEX_FILE))
            except ArtifactError as error:
                raise WeightError(f"{folder / INDEX_FILE}: {name!r} is not the name of a file beside it") from error
        if absent := {name for name in weight_map.values() if not (folder / name).exists()}:
            raise WeightError(f"{folder / INDEX_FILE} names files that are absent: {_shown(absent)}; download them")
        return sorted(set(weight_map.values())), weight_map
    if pickled := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        raise WeightError(
            f"{folder}: holds {pickled[0]}, a pickle, which is not read; convert it to safetensors, for instance with "
            "transformers: AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(other_folder)"
        )
    raise WeightError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} there; download the checkpoint's weights")


def _refuse_adapter(folder: Path) -> None:
    adapters = [name for name in _ADAPTER_FILES if (folder / name).exists()]
    if not adapters:
        return
    if not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise WeightError(
            f"{folder}: holds {adapters[0]}: an adapter (LoRA), not a model; merge it into its base model first, with "
            "peft: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(merged), copy the base "
            "model's tokenizer and processor files beside it, and convert that folder"
        )
    # transformers would load the adapter on top where peft is installed
    raise WeightError(
        f"{folder}: holds a whole model and an adapter ({', '.join(adapters)}); merge the adapter, or remove these "
        "files if the weights already include it"
    )


def _open_file(path: Path, stack: ExitStack) -> SourceFile:
    """Open and map a regular file, or what a link leads to, in the folder or out of it: Hugging Face's cache links its
    snapshots to blobs, and people link weights that are too large to copy. What is not safetensors is refused anyway,
    where the small files, of which any text would do, must be the checkpoint's own (read_file).
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise WeightError(f"{path}: cannot read: {error.strerror}") from error
    stack.callback(os.close, fd)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise WeightError(f"{path}: is not a regular file; download it again")
    if status.st_size < _HEADER_BYTES:
        raise WeightError(f"{path}: {status.st_size} bytes, truncated; download it again")
    mapping = mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ)
    length = min(int.from_bytes(mapping[:_HEADER_BYTES], "little"), MAX_HEADER_BYTES)
    return SourceFile(path, fd, mapping, status.st_size, status.st_mtime_ns, mapping[: _HEADER_BYTES + length])


def _tensors_of(file: SourceFile) -> Iterator[SourceTensor]:
    try:
        for info in read_header(file.header, str(file.path), file.size):
            yield SourceTensor(info.name, info.dtype, info.shape, file, info.begin, info.end)
    except ArtifactError as error:
        raise WeightError(str(error)) from error


def _collect(files: Iterable[SourceFile], weight_map: dict[str, str]) -> dict[str, SourceTensor]:
    """Every tensor by its legacy name; one that is stored twice, or not where the index says, is an error."""
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        for tensor in _tensors_of(file):
            name = legacy_name(tensor.name)
            if other := tensors.get(name):
                raise WeightError(
                    f"{tensor.name} is stored twice: in {other.file.path} (as {other.name}) and in {file.path}; "
                    "keep one of them"
                )
            tensors[name] = tensor
    for stored, file_name in weight_map.items():
        there = tensors.get(legacy_name(stored))
        if there is None or there.file.path.name != Path(file_name).name:
            raise WeightError(
                f"{INDEX_FILE} says that {stored} is in {file_name}, but it is "
                + (f"in {there.file.path.name}" if there else "not there")
                + "; download index and shards of the same revision"
            )
    return tensors


def _check_names(folder: Path, tensors: dict[str, SourceTensor], weights: Iterable[Weight], tied: bool) -> None:
    if quantized := [tensor.name for name, tensor in tensors.items() if is_quantized(name)]:
        raise WeightError(
            f"{folder}: holds quantized tensors ({_shown(quantized)}); GPTQ, AWQ and other quantized checkpoints are "
            "not supported yet: use the unquantized one"
        )
    wanted = {part.name for weight in weights for part in weight.parts}
    stored_as = new_name if any(name != tensor.name for name, tensor in tensors.items()) else str
    if missing := wanted - tensors.keys():
        hint = "; or set tie_word_embeddings in config.json" if missing == {"lm_head.weight"} else ""
        raise WeightError(
            f"{folder}: missing tensors: {_shown(map(stored_as, missing))}; "
            f"download the whole checkpoint, or the config.json that belongs to it{hint}"
        )
    extra = {"lm_head.weight"} if tied else set()
    if unused := [t.name for name, t in tensors.items() if name not in wanted | extra and not is_recomputed(name)]:
        raise WeightError(
            f"{folder}: tensors that no parameter of the model uses: {_shown(unused)}; "
            "use the config.json that belongs to the weights, and a plain checkpoint (no adapters)"
        )


def _check_shapes(tensors: dict[str, SourceTensor], weights: Iterable[Weight]) -> None:
    for weight in weights:
        for name, shape, _ in weight.parts:
            tensor = tensors[name]
            where = f"{tensor.file.path}: {tensor.name}"
            if tensor.dtype not in FLOAT_DTYPES:
                raise WeightError(
                    f"{where}: got dtype {tensor.dtype}, expected one of {', '.join(FLOAT_DTYPES)}; "
                    "quantized checkpoints are not supported yet"
                )
            if tensor.shape != shape:
                raise WeightError(
                    f"{where}: got shape {list(tensor.shape)}, config.json wants {list(shape)}; "
                    "use the config.json that belongs to the weights"
                )


def _check_tied(tensors: dict[str, SourceTensor]) -> None:
    """A tied checkpoint may store its head as well, in any dtype, if it has the same values."""
    head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    if head is None:
        return
    if not _same_values(head, embedding):
        raise WeightError(
            f"{head.file.path}: {head.name} differs from {embedding.name}, but config.json ties them; "
            "set tie_word_embeddings to false (at the top and in text_config) to use both, or remove it"
        )


def _same_values(first: SourceTensor, second: SourceTensor) -> bool:
    """Whether two tensors hold equal numbers; fp32 holds those of every dtype exactly. NaN equals nothing."""
    if first.shape != second.shape or first.dtype not in FLOAT_DTYPES:
        return False
    values = [np.frombuffer(each.bytes(), numpy_dtype(each.dtype)) for each in (first, second)]
    for begin in range(0, len(values[0]), _COMPARED_VALUES):
        part = slice(begin, begin + _COMPARED_VALUES)
        one, other = (each[part].astype(np.float32, copy=False) for each in values)
        if not np.array_equal(one, other):
            return False
    # their pages are not needed until they are copied
    first.forget()
    second.forget()
    return True


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Open a HF folder: flat or nested config.json, legacy or new names, one file or shards.

    Raises ConfigError or WeightError for everything that is wrong with it, except the values of its tensors.
    """
    _refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json there; --src wants the folder of a checkpoint")
    plain = read_object(folder, "config.json") or {}
    config = config_from_hf(plain)
    weights = tuple(family_of(config).weights(config))
    names, weight_map = _find_files(folder)
    with ExitStack() as stack:
        files = tuple(_open_file(folder / name, stack) for name in names)
        tensors = _collect(files, weight_map)
        _check_names(folder, tensors, weights, config.text.tie_word_embeddings)
        _check_shapes(tensors, weights)
        if config.text.tie_word_embeddings:
            _check_tied(tensors)
        yield Checkpoint(folder, config, plain, weights, tensors, files)
