"""A loaded model: the object that users call."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..artifacts.manifest import Manifest
from ..artifacts.store import Artifact
from .backends.base import Backend
from .generate import LENGTH, STOP, Generation, Timings, greedy, prefill_prompt, tokens_to_make
from .integrity import WeightCheck
from .messages import Message, VideoSource
from .prompt import Processor, Prompt
from .vision import ImageSource


class Model:
    """An artifact, its processor and an engine. `reason` says why this engine was taken."""

    def __init__(
        self, artifact: Artifact, processor: Processor, backend: Backend, reason: str, check: WeightCheck
    ) -> None:
        self.artifact = artifact
        self.processor = processor
        self.backend = backend
        self.reason = reason
        self._check = check

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def max_length(self) -> int:
        """Cache positions of one conversation."""
        part = self.manifest.ge
        return part.max_length if part else 0

    @property
    def unused_settings(self) -> tuple[str, ...]:
        """Settings of generation_config.json that greedy decoding leaves unused and that would change the text.

        Sampling among the one most likely token (top_k 1, as Qwen2-VL is published) is greedy decoding.
        """
        defaults = self.processor.generation
        unused = []
        if defaults.do_sample and defaults.top_k != 1:
            unused += [f"temperature {defaults.temperature}", f"top_k {defaults.top_k}", f"top_p {defaults.top_p}"]
        if defaults.repetition_penalty != 1:
            unused.append(f"repetition_penalty {defaults.repetition_penalty}")
        return tuple(unused)

    def generate(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        max_new_tokens: int | None = None,
    ) -> Generation:
        """Answer a request, greedily.

        request: messages as Qwen users know them, or a string that already went through a chat template. images and
        videos fill the placeholders that name no source. Raises RequestError before any compute when it cannot be
        served, and ArtifactError when the weights turn out to be altered.
        """
        timings = Timings()
        prompt = self.processor.prepare(request, images, videos)
        timings.mark("preprocess")
        stream = self.processor.stream()
        tokens, pieces = [], []
        for token in self._tokens(prompt, max_new_tokens, timings):
            tokens.append(token)
            pieces.append(stream.feed(token))
        pieces.append(stream.flush())
        timings.mark("decode")
        phases = timings.phases
        phases["first_token"] = sum(
            phases.get(name, 0.0) for name in ("preprocess", "visual", "prefill", "weight_check")
        )
        if len(tokens) > 1:
            phases["per_token"] = phases["decode"] / (len(tokens) - 1)
        return Generation(
            text="".join(pieces),
            token_ids=tuple(tokens),
            prompt_token_ids=tuple(int(i) for i in prompt.token_ids),
            finish_reason=STOP if tokens[-1] in self.processor.eos_token_ids else LENGTH,
            timings_ms={name: round(value, 3) for name, value in phases.items()},
        )

    def stream(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        max_new_tokens: int | None = None,
    ) -> Iterator[str]:
        """Like `generate`, but yields pieces of text as they come, never a broken character."""
        prompt = self.processor.prepare(request, images, videos)
        stream = self.processor.stream()
        for token in self._tokens(prompt, max_new_tokens, Timings()):
            if piece := stream.feed(token):
                yield piece
        if rest := stream.flush():
            yield rest

    def _tokens(self, prompt: Prompt, max_new_tokens: int | None, timings: Timings) -> Iterator[int]:
        defaults = self.processor.generation
        count = tokens_to_make(len(prompt.token_ids), max_new_tokens, defaults.max_new_tokens, self.max_length)
        cache: Any = self.backend.allocate(1)
        merge_size = self.processor.config.vision.spatial_merge_size
        first = prefill_prompt(self.backend, cache, 0, prompt, merge_size, timings)
        for token in greedy(self.backend, cache, first, prompt, count, frozenset(self.processor.eos_token_ids)):
            if "prefill" not in timings.phases:
                timings.mark("prefill")
                # no token leaves before the weights it was made with are known to be the manifest's
                self._check.wait()
                timings.mark("weight_check")
            yield token

    def close(self) -> None:
        """Close the artifact's files. What is mapped stays usable until the model itself is gone."""
        self._check.wait()
        self.artifact.close()
