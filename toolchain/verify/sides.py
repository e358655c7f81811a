"""What is verified and what it is measured by, both loaded: the calls of each, and every output compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...artifacts.store import Artifact
from ...runtime.backends.base import Backend, Step
from ...runtime.dtypes import torch_dtype
from ...runtime.models import config_of, family_of
from .cases import Case
from .compare import Floats, compare, second_opinion
from .reference import PREFILL, VISUAL, Expected, HfInputs, HfReference
from .report import Comparison
from .subjects import Subject
from .tolerances import output_tolerance


@dataclass(frozen=True, eq=False)
class Answered:
    """A case whose inputs are transformers' own, with what transformers makes of it."""

    case: Case
    inputs: HfInputs
    expected: Expected


@dataclass(frozen=True, eq=False)
class Sides:
    """Both models, loaded: what is verified, and what it is measured by."""

    artifact: Artifact
    subject: Subject
    reference: HfReference
    backend: Backend

    def prefill(self, cache: Any, row: int, case: Case) -> tuple[Floats | None, Step]:
        """Our visual output, and the prefill into one row of the cache."""
        prompt, config = case.prompt, config_of(self.artifact.manifest)
        embeds, slots = None, prompt.vision_slots
        if len(prompt.grids):
            embeds = self.backend.embed(family_of(config).inputs(config), prompt.patches, prompt.grids)
            slots = embeds.placed(slots)
        step = self.backend.prefill(cache, row, 0, prompt.token_ids, prompt.positions, embeds, slots)
        return None if embeds is None else embeds.in_order(torch.as_tensor(embeds.tensor).float().numpy()), step

    def decode(self, cache: Any, group: Sequence[Answered], steps: int) -> Iterator[Step]:
        """Decode steps of a group, a row each: transformers' tokens, our own positions."""
        step = None
        for number in range(1, 1 + steps):
            fed = np.array([each.expected.tokens[number - 1] for each in group], np.int64)
            lengths = np.array([len(each.case.prompt.token_ids) for each in group], np.int64) + number - 1
            deltas = np.array([each.case.prompt.delta for each in group], np.int64)
            begun = self.backend.begin(cache, fed, lengths, lengths + deltas)
            if step is not None:
                # positions are the graph's own, from its step before: the runtime takes them from there, too
                begun = replace(begun, cache_index=step.cache_index, positions=step.positions)
            step = self.backend.decode(cache, begun, (lengths + 1).tolist())
            yield step

    def compare(
        self, batch: int, group: Sequence[Answered], steps: int, only_decode: bool, tell: Callable[[str], None]
    ) -> Iterator[Comparison]:
        """All comparisons of the cases that share one cache of `batch` rows."""
        cache, dtype = self.backend.allocate(batch), self.subject.dtype
        graph = self.subject.decode(cache.rows)

        def measured(each: Answered, graph: str, number: int | None, ours: Floats, token: int | None) -> Comparison:
            theirs = each.expected.output(graph, number).numpy()
            return compare(each.case.name, graph, number, ours, theirs, output_tolerance(graph, dtype), token)

        def logits(each: Answered, graph: str, number: int | None, step: Step, row: int) -> Comparison:
            token, ours = int(self.backend.tokens(step)[row]), self.backend.logits(step)[row]
            return measured(each, graph, number, ours, token)

        for row, each in enumerate(group):
            tell(f"{graph}: {each.case.name}")
            visual, step = self.prefill(cache, row, each.case)
            if only_decode:
                continue
            if visual is not None:
                yield measured(each, VISUAL, None, visual, None)
            yield logits(each, PREFILL, None, step, 0)
        for number, step in enumerate(self.decode(cache, group, steps), start=1):
            for row, each in enumerate(group):
                yield logits(each, graph, number, step, row)

    def second_opinions(
        self, dtype: str, comparisons: Sequence[Comparison], answered: Sequence[Answered], steps: int
    ) -> list[Comparison]:
        """Judge what is outside the bounds by transformers computing in the artifact's dtype on the same tokens."""
        exact = {each.case.name: each for each in answered}
        failing = {each.case for each in comparisons if not each.passed}
        with self.reference.computing_in(torch_dtype(dtype)):
            rounded = {
                name: self.reference.run(exact[name].inputs, steps, exact[name].expected.tokens) for name in failing
            }

        def judged(each: Comparison) -> Comparison:
            if each.passed:
                return each
            a, b = (of.output(each.graph, each.step) for of in (rounded[each.case], exact[each.case].expected))
            bounds = output_tolerance(each.graph, dtype)
            return second_opinion(each, compare(each.case, each.graph, each.step, a.numpy(), b.numpy(), bounds, None))

        return [judged(each) for each in comparisons]
