"""A loaded model: the object that users call."""

import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..artifacts.errors import RequestError, TargetError
from ..artifacts.manifest import Manifest
from ..artifacts.store import Artifact
from .backends.base import Backend
from .integrity import WeightCheck
from .pictures.images import ImageSource
from .pictures.request import DEFAULT_VISION, VideoSource, VisionOptions
from .requests.answer import Generation, Row, Timings, Token
from .requests.conversation import Conversation
from .requests.generate import generate_rows, run_out, texts
from .requests.settings import Settings, settings_for
from .text.messages import Message
from .text.prompt import Processor, Prompt

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .requests.settings import GivenSettings

OnToken = Callable[[Token], None]


class Model:
    """An artifact, its processor and an engine. `reason` says why this engine was taken, `load_ms` what loading took.

    Settings, for every method that generates: see GivenSettings. Every method raises RequestError, before any compute,
    when a request cannot be served, and ArtifactError when the weights turn out to be altered.

    May be called from several threads; steps then take turns on the engine.
    """

    def __init__(
        self,
        artifact: Artifact,
        processor: Processor,
        backend: Backend,
        reason: str,
        check: WeightCheck,
        load_ms: Mapping[str, float],
    ) -> None:
        self.artifact = artifact
        self._processor = processor
        self.backend = backend
        self.reason = reason
        self.load_ms = load_ms
        self._check = check
        self._turn = threading.Lock()
        # KV caches that nothing uses now, by rows: allocated once, not per request
        self._idle: dict[int, Any] = {}
        self._owner = os.getpid()
        self._release = weakref.finalize(self, _release, artifact, processor, backend)
        # a process that ends lets go of everything faster than it could be taken apart
        self._release.atexit = False

    @property
    def processor(self) -> Processor:
        """Everything before and after the graphs. Raises RequestError once the model is closed."""
        self._check_usable()
        return self._processor

    def _check_usable(self) -> None:
        if not self._release.alive:
            raise RequestError("this model is closed; load it again")
        if self._owner != os.getpid():
            # the engines' threads are not copied, and a child would wait for them for ever
            raise TargetError(
                f"this model was loaded by process {self._owner} and cannot be used in one that was forked from it; "
                "load it after the fork, or start processes by spawn"
            )

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def max_length(self) -> int:
        """Cache positions of one conversation."""
        return self.backend.max_length

    def generate(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        vision: VisionOptions = DEFAULT_VISION,
        on_token: OnToken | None = None,
        **settings: "Unpack[GivenSettings]",
    ) -> Generation:
        """Answer a request.

        request: messages as Qwen users know them, or a string that already went through a chat template. images and
        videos fill the placeholders that name no source; vision holds for all of them. on_token is called with every
        Token as it is made; what it raises ends the generation.
        """
        timings = Timings()
        row = self.row(self.processor.prepare(request, images, videos, vision=vision), self.settings(settings))
        timings.mark("preprocess")
        run_out(self.steps([row], timings), on_token)
        return row.generation(timings)

    def generate_batch(
        self,
        requests: Sequence[str | Sequence[Message]],
        *,
        vision: VisionOptions = DEFAULT_VISION,
        on_token: OnToken | None = None,
        **settings: "Unpack[GivenSettings]",
    ) -> list[Generation]:
        """Answer several requests together, each as it would be alone: own prefill, one decode step for all.

        Rows end on their own. More requests than the artifact's largest decode graph has rows (`compile --batch`) are
        answered in groups of that size.
        """
        return [
            answer
            for group in self.answer_groups(requests, vision=vision, on_token=on_token, **settings)
            for answer in group
        ]

    def answer_groups(
        self,
        requests: Sequence[str | Sequence[Message]],
        *,
        vision: VisionOptions = DEFAULT_VISION,
        on_token: OnToken | None = None,
        **settings: "Unpack[GivenSettings]",
    ) -> Iterator[list[Generation]]:
        """`generate_batch`, group by group: a group's requests are checked before it is computed, not all before."""
        if isinstance(requests, str | bytes) or not isinstance(requests, Sequence) or not requests:
            raise RequestError("requests: expected a non-empty list, each entry a list of messages or a string")
        asked = self.settings(settings)
        size = self.backend.max_rows
        for start in range(0, len(requests), size):
            timings = Timings()
            rows = []
            for i, request in enumerate(requests[start : start + size], start):
                try:
                    rows.append(self.row(self.processor.prepare(request, vision=vision), asked, i))
                except RequestError as error:
                    raise RequestError(f"requests[{i}]: {error}") from error
            timings.mark("preprocess")
            run_out(self.steps(rows, timings), on_token, start)
            yield [row.generation(timings) for row in rows]

    def stream(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        vision: VisionOptions = DEFAULT_VISION,
        **settings: "Unpack[GivenSettings]",
    ) -> Generator[str, None, None]:
        """Like `generate`, but yields pieces of text as they come, never a broken character.

        Closing the iterator ends the generation.
        """
        row = self.row(self.processor.prepare(request, images, videos, vision=vision), self.settings(settings))
        return texts(self.steps([row], Timings()))

    async def astream(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        vision: VisionOptions = DEFAULT_VISION,
        **settings: "Unpack[GivenSettings]",
    ) -> AsyncIterator[str]:
        """`stream` for asyncio: each step runs in a thread, and a cancelled task ends the generation."""
        # here: whoever awaits has it already, and for others it would be 25 ms of a cold start
        import asyncio

        prompt = await asyncio.to_thread(self.processor.prepare, request, images, videos, vision=vision)
        steps = self.steps([self.row(prompt, self.settings(settings))], Timings())
        running = None
        try:
            while True:
                running = asyncio.ensure_future(asyncio.to_thread(next, steps, None))
                step = await asyncio.shield(running)
                if step is None:
                    return
                for token in step:
                    if token.text:
                        yield token.text
        finally:
            if running is not None and not running.done():
                # cancelled in mid-step: a generator that runs cannot be closed
                await asyncio.wait([running])
            steps.close()

    def chat(self, system: str | None = None, vision: VisionOptions = DEFAULT_VISION) -> Conversation:
        """A conversation that keeps its KV cache, one row of its own, between turns; vision holds for every turn."""
        return Conversation(self, system, vision)

    def settings(self, given: "GivenSettings") -> Settings:
        """A request's settings, completed from the checkpoint's own. Raises RequestError."""
        return settings_for(self.processor.generation, self.processor.config.text.vocab_size, given)

    def row(self, prompt: Prompt, settings: Settings, number: int = 0) -> Row:
        """A request ready to run; `number` is its own among others. Raises RequestError when it does not fit the KV
        cache."""
        return Row(prompt, settings, self.processor, self.max_length, number)

    def steps(self, rows: Sequence[Row], timings: Timings, cache: Any = None) -> Generator[list[Token], None, None]:
        """Run rows to their ends, in the caller's KV cache or one of the model's own; yields each step's tokens."""
        own = cache is None
        if own:
            cache = self.take_cache(len(rows))
        try:
            running: Iterator[list[Token]] | None = None
            while True:
                with self._turn:
                    self._check_usable()
                    first = running is None
                    if running is None:
                        running = generate_rows(self.backend, cache, rows, self.processor, timings)
                    try:
                        step = next(running, None)
                    except Exception:
                        # where the weights are altered, that is what to say
                        self._check.wait()
                        raise
                if step is None:
                    return
                if first:
                    timings.mark("prefill")
                    # no token leaves before the weights it was made with are known to be the manifest's
                    self._check.wait()
                    timings.mark("weight_check")
                else:
                    timings.mark_token()
                yield step
                timings.skip()
        finally:
            if own and self.backend.reuses_caches and self._release.alive:
                self._idle[self.backend.cache_rows(len(rows))] = cache

    def take_cache(self, rows: int) -> Any:
        """A KV cache for so many rows: one that nothing uses now, or a new one, for which others make room."""
        with self._turn:
            self._check_usable()
            cache = self._idle.pop(self.backend.cache_rows(rows), None)
            if cache is None:
                self._idle.clear()
                cache = self.backend.allocate(rows)
            return cache

    def close(self) -> None:
        """Let go of the engine, the artifact's files and the template's process; afterwards every use is refused.

        A model that nothing refers to any more is closed by itself. Raises what the weights' check found, if no answer
        has waited for it.
        """
        try:
            if self._release.alive and self._owner == os.getpid():
                self._check.wait()
        finally:
            with self._turn:
                self._idle.clear()
                self._release()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _release(artifact: Artifact, processor: Processor, backend: Backend) -> None:
    processor.close()
    backend.close()
    artifact.close()
