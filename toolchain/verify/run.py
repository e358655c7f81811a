"""The two passes of a verification: every output against transformers', then the intermediates of what failed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...artifacts.ge.graph import read_graph
from ...artifacts.manifest import GePart
from ...artifacts.store import Artifact
from ...runtime.backends.base import Step
from ...runtime.backends.ge.operators import TORCH_DTYPES
from ...runtime.backends.model import KvCache
from ...runtime.backends.reference import ReferenceBackend
from ...runtime.models import config_of, family_of
from .cases import Case
from .landmarks import KEYS, OUTPUT, Landmark, aligned, find_landmarks, original_modules
from .reference import PREFILL, VISUAL, Expected, HfInputs, Watch, open_reference
from .report import (
    INTERMEDIATE_OF_ORIGINAL,
    TOLERANCES,
    CaseSize,
    Comparison,
    Departure,
    Floats,
    InputCheck,
    Progress,
    VerifyReport,
    compare,
    output_departs,
    second_opinion,
)
from .transformers_import import import_transformers

# fp32 against fp32, relative to the intermediate's root mean square: rounding gives about 1e-6, also in deep models
_FP32_RMS, _FP32_MAX = 2e-5, 2e-4
# In half precision transformers itself, computing in that dtype, says what is right. The floors, in roundings, are for
# intermediates that it happens to have exactly.
_HALF_RMS_FLOOR, _HALF_MAX_FLOOR = 1.0, 8.0
_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}


def calls_in_all(cases: int, batches: Sequence[int]) -> int:
    """What progress counts: loading both, the original's prefill and decode of every case, ours at every batch size."""
    return 2 + cases * (1 + len(batches))


@dataclass(frozen=True, eq=False)
class _Known:
    """A case with what transformers makes of it; expected is None where already the inputs differ."""

    case: Case
    inputs: HfInputs
    expected: Expected | None


class Run:
    """One verification. Loads both models at construction; memory is checked before."""

    def __init__(
        self, artifact: Artifact, part: GePart, against: Path, cases: Sequence[Case], steps: int, progress: Progress
    ) -> None:
        self.artifact, self.against, self.steps = artifact, against, steps
        self.part = part
        self.tolerance = TOLERANCES[self.part.dtype]
        self.cases = cases
        self._progress = progress
        self._done, self._total = 0, calls_in_all(len(cases), self.part.batches)
        self._tell("loading transformers' model")
        self.reference = open_reference(against, TORCH_DTYPES[self.part.dtype])
        self._tell("loading the artifact")
        self.backend = ReferenceBackend(artifact)

    def _tell(self, what: str) -> None:
        self._progress(what, self._done, self._total)
        self._done += 1

    def report(self, memory_bytes: int, notes: tuple[str, ...]) -> VerifyReport:
        """Run both passes."""
        checks: list[InputCheck] = []
        known = []
        for case in self.cases:
            self._tell(f"transformers: {case.name}")
            inputs = self.reference.inputs(case)
            found = check_inputs(case, inputs)
            checks += found
            equal = all(check.equal for check in found)
            known.append(_Known(case, inputs, self.reference.run(inputs, self.steps) if equal else None))
        comparisons: list[Comparison] = []
        batches = sorted(self.part.batches)
        comparable = [each for each in known if each.expected is not None]
        for batch in batches:
            for start in range(0, len(comparable), batch):
                group = comparable[start : start + batch]
                found_here = self._compare_group(batch, group, only_decode=batch != batches[0])
                comparisons += found_here
        comparisons.sort(key=lambda each: (each.graph != VISUAL, each.graph != PREFILL))
        if self.part.dtype != "fp32" and not all(each.passed for each in comparisons):
            comparisons = self._second_opinions(comparisons, comparable)
        failed = next((each for each in comparisons if not each.passed), None)
        departure = None
        intermediates = 0
        if failed is not None:
            self._progress(f"looking for where {failed.graph} departs", self._total, self._total)
            departure, intermediates = self._locate(failed, known)
            departure = departure or output_departs(failed)
        elif self.part.dtype != "fp32":
            departure, intermediates = self._check_intermediates(comparisons, known)
        self._progress("done", self._total, self._total)
        return VerifyReport(
            passed=failed is None and departure is None and bool(comparisons) and all(check.equal for check in checks),
            artifact=self.artifact.manifest.name,
            against=self.against.resolve().name,
            dtype=self.part.dtype,
            backend=self.backend.name,
            versions={"torch": torch.__version__, "transformers": str(import_transformers().__version__)},
            steps=self.steps,
            tolerance=self.tolerance,
            memory_bytes=memory_bytes,
            notes=notes,
            cases=tuple(CaseSize(c.name, len(c.prompt.token_ids), len(c.prompt.patches)) for c in self.cases),
            inputs=tuple(checks),
            comparisons=tuple(comparisons),
            intermediates=intermediates,
            departure=departure,
        )

    # ours

    def _decode(self, cache: KvCache, group: Sequence[_Known], step: Step | None, number: int) -> Step:
        """Decode step `number`, from 1, of a group, a row each: transformers' tokens, our own positions."""
        fed = np.array([_expected(each).tokens[number - 1] for each in group], np.int64)
        lengths = np.array([len(each.case.prompt.token_ids) for each in group], np.int64) + number - 1
        deltas = np.array([each.case.prompt.delta for each in group], np.int64)
        begun = self.backend.begin(cache, fed, lengths, lengths + deltas)
        if step is not None:
            # positions are the graph's own, from its step before: the runtime takes them from there, too
            begun = replace(begun, cache_index=step.cache_index, positions=step.positions)
        return self.backend.decode(cache, begun, [int(length) + 1 for length in lengths])

    def _prefill(self, cache: KvCache, row: int, case: Case) -> tuple[Floats | None, Step]:
        """Our visual output, and the prefill into one row of the cache."""
        prompt, config = case.prompt, config_of(self.artifact.manifest)
        embeds, slots = None, prompt.vision_slots
        if len(prompt.grids):
            embeds = self.backend.embed(family_of(config).inputs(config), prompt.patches, prompt.grids)
            slots = embeds.placed(slots)
        step = self.backend.prefill(cache, row, 0, prompt.token_ids, prompt.positions, embeds, slots)
        return None if embeds is None else embeds.in_order(embeds.tensor.float().numpy()), step

    def _compare_group(self, batch: int, group: Sequence[_Known], only_decode: bool) -> list[Comparison]:
        """All comparisons of the cases that share one cache of `batch` rows."""
        found = []
        cache = self.backend.allocate(batch)
        graph = f"decode_b{cache.rows}"

        def logits(each: _Known, graph: str, step: int | None, out: Step, row: int) -> None:
            expected = _expected(each).logits[step or 0].numpy()
            token = int(self.backend.tokens(out)[row])
            ours = self.backend.logits(out)[row]
            found.append(compare(each.case.name, graph, step, ours, expected, self.tolerance, token))

        for row, each in enumerate(group):
            self._tell(f"{graph}: {each.case.name}")
            visual, out = self._prefill(cache, row, each.case)
            if only_decode:
                continue
            original = _expected(each).visual
            if visual is not None and original is not None:
                found.append(compare(each.case.name, VISUAL, None, visual, original.numpy(), self.tolerance, None))
            logits(each, PREFILL, None, out, 0)
        step = None
        for number in range(1, 1 + self.steps):
            step = self._decode(cache, group, step, number)
            for row, each in enumerate(group):
                logits(each, graph, number, step, row)
        return found

    def _second_opinions(self, comparisons: list[Comparison], known: Sequence[_Known]) -> list[Comparison]:
        """Judge what is outside the bounds by transformers computing in the artifact's dtype on the same tokens."""
        self._progress(f"transformers in {self.part.dtype}", self._total, self._total)
        cases = {each.case.name: each for each in known}
        failing = {each.case for each in comparisons if not each.passed}
        self.reference.compute_in(TORCH_DTYPES[self.part.dtype])
        half = {
            name: self.reference.run(cases[name].inputs, self.steps, _expected(cases[name]).tokens) for name in failing
        }
        self.reference.compute_in(torch.float32)

        def judged(each: Comparison) -> Comparison:
            if each.passed:
                return each
            rounded, exact = half[each.case], _expected(cases[each.case])
            if each.graph == VISUAL and rounded.visual is not None and exact.visual is not None:
                a, b = rounded.visual, exact.visual
            else:
                a, b = rounded.logits[each.step or 0], exact.logits[each.step or 0]
            measured = compare(each.case, each.graph, each.step, a.numpy(), b.numpy(), self.tolerance, None)
            return second_opinion(each, measured)

        return [judged(each) for each in comparisons]

    # where it departs

    def _check_intermediates(
        self, comparisons: Sequence[Comparison], known: Sequence[_Known]
    ) -> tuple[Departure | None, int]:
        """Half precision only: what is wrong by less than the outputs' rounding still stands out where it arises.

        The request with the most pictures, through each graph once. Returns the first departure, and how many
        intermediates were compared.
        """
        case = max(known, key=lambda each: len(each.case.pictures)).case.name
        compared = 0
        for graph in self.part.graphs:
            at = next((c for c in comparisons if (c.case, c.graph) == (case, graph.name)), None)
            if at is not None:
                self._progress(f"intermediates of {graph.name}", self._total, self._total)
                departure, count = self._locate(at, known)
                compared += count
                if departure is not None:
                    return departure, compared
        return None, compared

    def _locate(self, failed: Comparison, known: Sequence[_Known]) -> tuple[Departure | None, int]:
        """Run one call again, on both sides, and compare the graph's intermediates in order up to the first departure.

        Returns it, and how many were compared.
        """
        each = next(k for k in known if k.case.name == failed.case)
        graph = next(g for g in self.part.graphs if g.name == failed.graph)
        model = config_of(self.artifact.manifest)
        nodes = read_graph(self.artifact.read(graph.graph), graph.graph.path)
        landmarks = find_landmarks(nodes, self.backend.binding(graph.name), model)
        call = failed.step if failed.step is not None else failed.graph
        steps = failed.step or 0
        modules = original_modules(landmarks, model)
        tokens = _expected(each).tokens
        original = Watch(modules, call)
        self.reference.run(each.inputs, steps, tokens, original)
        rounded = None
        if self.part.dtype != "fp32":
            rounded = Watch(modules, call)
            self.reference.compute_in(TORCH_DTYPES[self.part.dtype])
            self.reference.run(each.inputs, steps, tokens, rounded)
            self.reference.compute_in(torch.float32)
        ours = self._observe(each, failed, landmarks)
        compared = 0
        for mark in landmarks:
            reference = _seen(original, mark)
            pair = None if reference is None or mark not in ours else aligned(ours[mark], reference, 0)
            if pair is None:
                continue
            compared += 1
            half = None if rounded is None else _seen(rounded, mark)
            departure = self._departs(failed, mark.title, pair, None if half is None else aligned(ours[mark], half, 0))
            if departure is not None:
                return departure, compared
        return None, compared

    def _observe(self, each: _Known, failed: Comparison, landmarks: Sequence[Landmark]) -> dict[Landmark, Tensor]:
        """Our intermediates of the failed call, each [rows, width] in fp32."""
        wanted: dict[str, list[Landmark]] = {}
        for mark in landmarks:
            wanted.setdefault(mark.node, []).append(mark)
        seen: dict[Landmark, Tensor] = {}

        def observe(graph: str, operator: str, outputs: tuple[Tensor, ...]) -> None:
            for mark in wanted.get(operator, ()) if graph == failed.graph else ():
                out = outputs[mark.index]
                seen[mark] = out.float().reshape(-1, out.shape[-1]).clone()

        rows = int(failed.graph.removeprefix("decode_b")) if failed.step else min(self.part.batches)
        cache = self.backend.allocate(rows)
        self.backend.observer = observe
        try:
            self._prefill(cache, 0, each.case)
            step = None
            # alone in its cache: the other rows have no influence on this one
            for number in range(1, 1 + (failed.step or 0)):
                step = self._decode(cache, [each], step, number)
        finally:
            self.backend.observer = None
        return seen

    def _departs(
        self, at: Comparison, title: str, pair: tuple[Tensor, Tensor], rounded: tuple[Tensor, Tensor] | None
    ) -> Departure | None:
        """The departure at one landmark. pair: (ours, transformers' in fp32); rounded: (ours, its in our dtype)."""
        rms, largest, size = _errors(*pair)
        allowed_rms, allowed_max = _FP32_RMS, _FP32_MAX
        if self.part.dtype != "fp32":
            bits = _ROUNDING[self.part.dtype]
            half_rms, half_max, _ = _errors(rounded[1], pair[1]) if rounded else (0.0, 0.0, 0.0)
            allowed_rms = max(_HALF_RMS_FLOOR * bits, INTERMEDIATE_OF_ORIGINAL * half_rms)
            allowed_max = max(_HALF_MAX_FLOOR * bits, INTERMEDIATE_OF_ORIGINAL * half_max)
        if rms <= allowed_rms and largest <= allowed_max:
            return None
        limit = size * min(allowed_max, largest * allowed_rms / rms if np.isfinite(rms) else allowed_max)
        if not np.isfinite(largest):
            return Departure(at.case, at.graph, at.step, title, None, limit, None)
        return Departure(at.case, at.graph, at.step, title, largest * size, limit, rms)


def _expected(each: _Known) -> Expected:
    if each.expected is None:
        raise ValueError(f"{each.case.name}: inputs differ, nothing was computed")
    return each.expected


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


def check_inputs(case: Case, theirs: HfInputs) -> list[InputCheck]:
    """Grids, token ids after expansion, and M-RoPE positions: equal or not, and where not."""
    prompt = case.prompt
    pairs = [
        ("grids", prompt.grids, theirs.grids),
        ("token ids", prompt.token_ids, theirs.token_ids),
        ("M-RoPE positions", prompt.positions, theirs.positions),
        ("M-RoPE delta", np.array([prompt.delta]), np.array([theirs.delta])),
    ]
    found = []
    for what, ours, original in pairs:
        detail = ""
        if ours.shape != original.shape:
            detail = f"shape {list(ours.shape)}, expected {list(original.shape)}"
        elif (ours != original).any():
            at = tuple(int(i) for i in np.argwhere(ours != original)[0])
            detail = f"at {list(at)} got {ours[at]}, expected {original[at]}"
        found.append(InputCheck(case.name, what, not detail, detail))
    return found
