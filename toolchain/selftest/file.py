"""selftest/selftest.safetensors: inputs and answers, written once and read strictly.

visual.<i>.patches, .grids: a call of the vision tower. scripts.<i>.token_ids, .turns: [2, turns], how many tokens each
has, and which visual call's embeddings it takes, or -1. <call or script>.values, .std: answers, see Answer; of a script
one row a call. visual.columns, logits.columns: what the values are of.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.dtypes import stored_name
from ...artifacts.errors import ArtifactError, RequestError
from ...artifacts.ge.ops import MOST_PATCHES
from ...artifacts.safetensors import header_bytes, read_header
from ...runtime.backends.base import Ints
from ...runtime.dtypes import numpy_dtype
from ...runtime.models import family_of
from ...runtime.models.base import Picture
from ...runtime.models.config import ModelConfig
from ...runtime.models.positions import as_grids
from .inputs import SCRIPTS, STEPS, VISUAL_CALLS, Script, SelftestInputs, SelftestPictures
from .known import SUMS, Answer, Known
from .observe import Call

_DTYPES = {stored_name(name): numpy_dtype(name) for name in ("uint8", "int64", "fp32")}
Array = NDArray[Any]


def to_bytes(known: Known) -> bytes:
    """A safetensors file: the same Known gives the same bytes."""
    tensors: dict[str, Array] = {}
    tensors["visual.columns"], tensors["logits.columns"] = known.columns
    for i, each in enumerate(known.inputs.visual):
        answer = known.answers[-1, i]
        tensors |= {
            f"visual.{i}.patches": each.patches,
            f"visual.{i}.grids": each.grids,
            f"visual.{i}.values": answer.values,
            f"visual.{i}.std": np.array([answer.std], np.float32),
        }
    for i, script in enumerate(known.inputs.scripts):
        answers = [known.answers[i, j] for j in range(len(script.turns) + STEPS)]
        visual = [-1 if each is None else each for each in script.visual]
        tensors |= {
            f"scripts.{i}.token_ids": script.token_ids,
            f"scripts.{i}.turns": np.array([script.turns, visual], np.int64),
            f"scripts.{i}.values": np.concatenate([answer.values for answer in answers]),
            f"scripts.{i}.std": np.array([answer.std for answer in answers], np.float32),
        }
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header = header_bytes((name, names[array.dtype], array.shape) for name, array in tensors.items())
    return header + b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())


def from_bytes(data: bytes, config: ModelConfig, where: str) -> Known:
    """Read the file for this model. Raises ArtifactError for anything that `to_bytes` does not write."""
    tensors = _Tensors(data, where)
    vision, text = config.vision, config.text
    columns = (
        tensors.ints("visual.columns", (0, text.hidden_size), None),
        tensors.ints("logits.columns", (0, text.vocab_size), None),
    )
    answers: dict[Call, Answer] = {}
    visual = []
    for i in range(len(VISUAL_CALLS)):
        grids = tensors.ints(f"visual.{i}.grids", (1, MOST_PATCHES), None, 3)
        count = sum(t * h * w for t, h, w in grids.tolist())
        try:
            as_grids(grids, vision.spatial_merge_size)
        except RequestError as error:
            raise tensors.bad(str(error)) from error
        if not 0 < count <= MOST_PATCHES:
            raise tensors.bad(f"visual.{i}.grids are of {count} patches")
        visual.append(SelftestPictures(tensors.take(f"visual.{i}.patches", "U8", count, vision.patch_dim), grids))
        rows = count // vision.spatial_merge_size**2
        answers |= tensors.answers(f"visual.{i}", [(-1, i)], rows, len(columns[0]))
    scripts = []
    for i in range(len(SCRIPTS)):
        script = _script(tensors, f"scripts.{i}", visual, config)
        calls = [(i, j) for j in range(len(script.turns) + STEPS)]
        answers |= tensors.answers(f"scripts.{i}", calls, 1, len(columns[1]))
        scripts.append(script)
    tensors.end()
    return Known(SelftestInputs(tuple(visual), tuple(scripts)), columns, answers)


def _script(tensors: "_Tensors", name: str, visual: list[SelftestPictures], config: ModelConfig) -> Script:
    ids = tensors.ints(f"{name}.token_ids", (0, config.text.vocab_size), None)
    counts, places = tensors.ints(f"{name}.turns", (-1, len(ids) + 1), 2, None).tolist()
    if not counts or min(counts) < 1 or sum(counts) + STEPS != len(ids) or max(places) >= len(visual):
        raise tensors.bad(f"{name}.turns do not fit {len(ids)} tokens and {len(visual)} visual calls")
    taken = [None if place < 0 else place for place in places]
    merge, start = config.vision.spatial_merge_size, 0
    for count, place in zip(counts, taken, strict=True):
        slots = int((ids[start : start + count] == config.image_token_id).sum())
        if slots != (0 if place is None else len(visual[place].patches) // merge**2):
            raise tensors.bad(f"{name}: a turn has {slots} placeholders, which are not its pictures")
        start += count
    grids = [tuple(grid) for place in taken if place is not None for grid in visual[place].grids.tolist()]
    try:
        positions, _ = family_of(config).inputs(config).positions(ids, [Picture("image", grid) for grid in grids])
    except RequestError as error:
        raise tensors.bad(f"{name}: {error}") from error
    return Script(ids, positions, tuple(counts), tuple(taken))


class _Tensors:
    """The file's tensors, each taken once."""

    def __init__(self, data: bytes, where: str) -> None:
        self._where = where
        self._found: dict[str, Array] = {}
        for info in read_header(data, where):
            if info.dtype not in _DTYPES:
                raise self.bad(f"tensor {info.name[:80]} is {info.dtype}")
            self._found[info.name] = np.ndarray(info.shape, _DTYPES[info.dtype], data, info.begin)

    def bad(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self._where}: {what}; make it again with `qwen2vl-tc selftest ARTIFACT --make`")

    def take(self, name: str, dtype: str, *shape: int | None) -> Array:
        """A tensor of this shape, None for any size."""
        array = self._found.pop(name, None)
        if array is None or array.dtype != _DTYPES[dtype] or array.ndim != len(shape):
            raise self.bad(f"has no tensor {name} of {dtype} in {len(shape)} dimension(s)")
        if any(wanted not in (None, got) for got, wanted in zip(array.shape, shape, strict=True)):
            raise self.bad(f"tensor {name} is {list(array.shape)}, expected {list(shape)}")
        return array

    def ints(self, name: str, bounds: tuple[int, int], *shape: int | None) -> Ints:
        """At least one number, from the first of the bounds to below the second."""
        array = self.take(name, "I64", *shape)
        if not array.size or array.min() < bounds[0] or array.max() >= bounds[1]:
            raise self.bad(f"tensor {name} is empty, or holds a number outside {bounds[0]} to {bounds[1] - 1}")
        return array

    def answers(self, name: str, calls: list[Call], rows: int, columns: int) -> Mapping[Call, Answer]:
        """The answers of some calls, so many rows each."""
        values = self.take(f"{name}.values", "F32", rows * len(calls), columns + SUMS)
        stds = self.take(f"{name}.std", "F32", len(calls))
        if not np.isfinite(values).all() or not np.isfinite(stds).all() or not (stds > 0).all():
            raise self.bad(f"{name} expects what is not finite, or one number throughout")
        return {call: Answer(values[i * rows :][:rows], float(stds[i])) for i, call in enumerate(calls)}

    def end(self) -> None:
        """Raises ArtifactError for what was not taken."""
        if self._found:
            raise self.bad(f"tensor {min(self._found)[:80]} is none of the self-test's")
