"""A loaded model: the object that users call."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ..artifacts.errors import RequestError
from ..artifacts.manifest import Manifest
from ..artifacts.store import Artifact
from .backends.base import Backend
from .conversation import Conversation
from .generate import Generation, Row, Timings, Token, generate_rows, texts
from .integrity import WeightCheck
from .messages import Message, VideoSource
from .prompt import Processor, Prompt
from .settings import Settings, settings_for
from .vision import ImageSource

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .settings import GivenSettings

OnToken = Callable[[Token], None]


class Model:
    """An artifact, its processor and an engine. `reason` says why this engine was taken.

    Settings, for every method that generates: see GivenSettings. Every method raises RequestError, before any compute,
    when a request cannot be served, and ArtifactError when the weights turn out to be altered.

    May be called from several threads; steps then take turns on the engine.
    """

    def __init__(
        self, artifact: Artifact, processor: Processor, backend: Backend, reason: str, check: WeightCheck
    ) -> None:
        self.artifact = artifact
        self.processor = processor
        self.backend = backend
        self.reason = reason
        self._check = check
        self._turn = threading.Lock()
        # KV caches that nothing uses now, by rows: allocated once, not per request
        self._idle: dict[int, Any] = {}

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def max_length(self) -> int:
        """Cache positions of one conversation."""
        part = self.manifest.ge
        return part.max_length if part else 0

    def generate(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        on_token: OnToken | None = None,
        **settings: "Unpack[GivenSettings]",
    ) -> Generation:
        """Answer a request.

        request: messages as Qwen users know them, or a string that already went through a chat template. images and
        videos fill the placeholders that name no source. on_token is called with every Token as it is made; what it
        raises ends the generation.
        """
        timings = Timings()
        row = self.row(self.processor.prepare(request, images, videos), self.settings(settings))
        timings.mark("preprocess")
        with closing(self.steps([row], timings)) as steps:
            for step in steps:
                for token in step:
                    if on_token is not None:
                        on_token(token)
        return row.generation(timings)

    def generate_batch(
        self,
        requests: Sequence[str | Sequence[Message]],
        *,
        on_token: OnToken | None = None,
        **settings: "Unpack[GivenSettings]",
    ) -> list[Generation]:
        """Answer several requests together, each as it would be alone: own prefill, one decode step for all.

        Rows end on their own. More requests than the artifact's largest decode graph has rows (`compile --batch`) are
        answered in groups of that size. Every request is checked before the first is computed.
        """
        if isinstance(requests, str | bytes) or not isinstance(requests, Sequence) or not requests:
            raise RequestError("requests: expected a non-empty list, each entry a list of messages or a string")
        found = self.settings(settings)
        timings = Timings()
        rows = []
        for i, request in enumerate(requests):
            try:
                rows.append(self.row(self.processor.prepare(request), found))
            except RequestError as error:
                raise RequestError(f"requests[{i}]: {error}") from error
        timings.mark("preprocess")
        answers: list[Generation] = []
        size = self.backend.max_rows
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            with closing(self.steps(group, timings)) as steps:
                for step in steps:
                    for token in step:
                        if on_token is not None:
                            on_token(Token(start + token.row, token.id, token.text))
            answers += [row.generation(timings) for row in group]
            timings = Timings()
        return answers

    def stream(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **settings: "Unpack[GivenSettings]",
    ) -> Generator[str, None, None]:
        """Like `generate`, but yields pieces of text as they come, never a broken character.

        Closing the iterator ends the generation.
        """
        row = self.row(self.processor.prepare(request, images, videos), self.settings(settings))
        return texts(self.steps([row], Timings()))

    async def astream(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **settings: "Unpack[GivenSettings]",
    ) -> AsyncIterator[str]:
        """`stream` for asyncio: each step runs in a thread, and a cancelled task ends the generation."""
        pieces = await asyncio.to_thread(self.stream, request, images, videos, **settings)
        step = None
        try:
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
                piece = await asyncio.shield(step)
                if piece is None:
                    return
                yield piece
        finally:
            if step is not None and not step.done():
                # cancelled in mid-step: a generator that runs cannot be closed
                await asyncio.wait([step])
            pieces.close()

    def chat(self, system: str | None = None) -> Conversation:
        """A conversation that keeps its KV cache between turns."""
        return Conversation(self, system)

    def settings(self, given: "GivenSettings") -> Settings:
        """A request's settings, completed from the checkpoint's own. Raises RequestError."""
        return settings_for(self.processor.generation, self.manifest.model.text.vocab_size, given)

    def row(self, prompt: Prompt, settings: Settings, cached_tokens: int = 0) -> Row:
        """A request ready to run. Raises RequestError when it does not fit the KV cache."""
        return Row(prompt, settings, self.processor, self.max_length, cached_tokens)

    def steps(self, rows: Sequence[Row], timings: Timings, cache: Any = None) -> Generator[list[Token], None, None]:
        """Run rows to their ends, in the caller's KV cache or one of the model's own; yields each step's tokens."""
        own = cache is None
        if own:
            cache = self._borrow(len(rows))
        try:
            running: Iterator[list[Token]] | None = None
            while True:
                with self._turn:
                    if running is None:
                        merge_size = self.processor.config.vision.spatial_merge_size
                        running = generate_rows(self.backend, cache, rows, merge_size, timings)
                    step = next(running, None)
                if step is None:
                    return
                if "prefill" in timings.phases:
                    timings.mark_token()
                else:
                    timings.mark("prefill")
                    # no token leaves before the weights it was made with are known to be the manifest's
                    self._check.wait()
                    timings.mark("weight_check")
                yield step
        finally:
            if own:
                self._idle[len(rows)] = cache

    def _borrow(self, rows: int) -> Any:
        with self._turn:
            cache = self._idle.pop(rows, None)
            if cache is None:
                # caches of other sizes make room
                self._idle.clear()
                cache = self.backend.allocate(rows)
            return cache

    def close(self) -> None:
        """Close the artifact's files. What is mapped stays usable until the model itself is gone."""
        self._check.wait()
        self.artifact.close()
