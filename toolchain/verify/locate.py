"""Where a graph departs from transformers: its intermediates, at places that both have, in the order of computing."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ...artifacts.ge.graph import read_graph
from ...runtime.backends.reference import ReferenceBackend
from ...runtime.dtypes import torch_dtype
from ...runtime.models import config_of
from .landmarks import KEYS, OUTPUT, Landmark, aligned, find_landmarks, original_modules
from .reference import Watch
from .report import Comparison, Departure
from .sides import Answered, Sides
from .tolerances import INTERMEDIATE_OF_ORIGINAL

# fp32 against fp32, relative to the intermediate's root mean square: rounding gives about 1e-6, also in deep models
_FP32_RMS, _FP32_MAX = 2e-5, 2e-4
# In half precision transformers itself, computing in that dtype, says what is right. The floors, in roundings, are for
# intermediates that it happens to have exactly.
_HALF_RMS_FLOOR, _HALF_MAX_FLOOR = 1.0, 8.0
_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}


def check_intermediates(
    sides: Sides, comparisons: Sequence[Comparison], answered: Sequence[Answered], tell: Callable[[str], None]
) -> tuple[Departure | None, int]:
    """Half precision only: what is wrong by less than the outputs' rounding still stands out where it arises.

    The request with the most pictures, through each graph once. Returns the first departure, and how many
    intermediates were compared.
    """
    case = max(answered, key=lambda each: len(each.case.pictures)).case.name
    compared = 0
    for graph in sides.subject.graphs:
        at = next((c for c in comparisons if (c.case, c.graph) == (case, graph.name)), None)
        if at is not None:
            tell(graph.name)
            departure, count = locate(sides, at, answered)
            compared += count
            if departure is not None:
                return departure, compared
    return None, compared


def locate(sides: Sides, failed: Comparison, answered: Sequence[Answered]) -> tuple[Departure | None, int]:
    """Run one call again, on both sides, and compare the graph's intermediates in order up to the first departure.

    Returns it, and how many were compared: none where the engine does not show them.
    """
    graph = next((graph for graph in sides.subject.graphs if graph.name == failed.graph), None)
    if graph is None or not isinstance(sides.backend, ReferenceBackend):
        return None, 0
    each = next(each for each in answered if each.case.name == failed.case)
    model, half = config_of(sides.artifact.manifest), sides.subject.second_opinion
    nodes = read_graph(sides.artifact.read(graph.graph), graph.graph.path)
    landmarks = find_landmarks(nodes, sides.backend.binding(graph.name), model)
    call = failed.step if failed.step is not None else failed.graph
    steps = failed.step or 0
    modules = original_modules(landmarks, model)
    original, rounded = Watch(modules, call), Watch(modules, call)
    sides.reference.run(each.inputs, steps, each.expected.tokens, original)
    if half is not None:
        with sides.reference.computing_in(torch_dtype(half)):
            sides.reference.run(each.inputs, steps, each.expected.tokens, rounded)
    ours = _observe(sides, sides.backend, each, failed, landmarks)
    compared = 0
    for mark in landmarks:
        reference = _seen(original, mark)
        pair = None if reference is None or mark not in ours else aligned(ours[mark], reference, 0)
        if pair is None:
            continue
        compared += 1
        in_half = _seen(rounded, mark)
        again = None if in_half is None else aligned(ours[mark], in_half, 0)
        departure = _departs(failed, mark.title, pair, half, None if again is None else again[1])
        if departure is not None:
            return departure, compared
    return None, compared


def _observe(
    sides: Sides, backend: ReferenceBackend, each: Answered, failed: Comparison, landmarks: Sequence[Landmark]
) -> dict[Landmark, Tensor]:
    """Our intermediates of the failed call, each [rows, width] in fp32."""
    wanted: dict[str, list[Landmark]] = {}
    for mark in landmarks:
        wanted.setdefault(mark.node, []).append(mark)
    seen: dict[Landmark, Tensor] = {}

    def observe(graph: str, operator: str, outputs: tuple[Tensor, ...]) -> None:
        for mark in wanted.get(operator, ()) if graph == failed.graph else ():
            out = outputs[mark.index]
            seen[mark] = out.float().reshape(-1, out.shape[-1]).clone()

    batches = sides.subject.batches
    cache = backend.allocate(next(b for b in batches if not failed.step or sides.subject.decode(b) == failed.graph))
    backend.observer = observe
    try:
        sides.prefill(cache, 0, each.case)
        # alone in its cache: the other rows have no influence on this one
        for _ in sides.decode(cache, [each], failed.step or 0):
            pass
    finally:
        backend.observer = None
    return seen


def _departs(
    at: Comparison, title: str, pair: tuple[Tensor, Tensor], half: str | None, rounded: Tensor | None
) -> Departure | None:
    """The departure at one landmark. pair: (ours, transformers' in fp32); rounded: transformers' in dtype `half`."""
    rms, largest, size = _errors(*pair)
    allowed_rms, allowed_max = _FP32_RMS, _FP32_MAX
    if half is not None:
        half_rms, half_max, _ = (0.0, 0.0, 0.0) if rounded is None else _errors(rounded, pair[1])
        allowed_rms = max(_HALF_RMS_FLOOR * _ROUNDING[half], INTERMEDIATE_OF_ORIGINAL * half_rms)
        allowed_max = max(_HALF_MAX_FLOOR * _ROUNDING[half], INTERMEDIATE_OF_ORIGINAL * half_max)
    if rms <= allowed_rms and largest <= allowed_max:
        return None
    limit = size * min(allowed_max, largest * allowed_rms / rms if np.isfinite(rms) else allowed_max)
    if not np.isfinite(largest):
        return Departure(at.case, at.graph, at.step, title, None, limit, None)
    return Departure(at.case, at.graph, at.step, title, largest * size, limit, rms)


def _seen(watch: Watch, mark: Landmark) -> Tensor | None:
    if mark.side == KEYS:
        return watch.keys[int(mark.owner)] if watch.keys else None
    return (watch.outputs if mark.side == OUTPUT else watch.inputs).get(mark.owner)


def _errors(ours: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """(rms error, largest error), both relative to the reference's root mean square, and that; infinite for NaN."""
    size = float(reference.double().square().mean().sqrt()) or 1.0
    error = ours.double() - reference.double()
    if not bool(error.isfinite().all()):
        return float("inf"), float("inf"), size
    return float(error.square().mean().sqrt()) / size, float(error.abs().max()) / size, size
