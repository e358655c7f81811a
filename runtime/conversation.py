"""A conversation whose KV cache outlives the turn: the next turn prefills only what is new."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from .generate import Generation, Row, Timings, Token, texts
from .messages import Message, VideoSource, given_items
from .prompt import Prompt
from .vision import ImageSource

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .model import Model, OnToken
    from .settings import GivenSettings


class Conversation:
    """Turns of user and assistant. Every answer is the one that a fresh request with all messages would get.

    The new turn's token ids, those of all messages, are compared with the cache's: what they share at their start is
    kept, the rest is prefilled. messages: what was said so far, pictures as patches.
    """

    def __init__(self, model: "Model", system: str | None = None) -> None:
        self._model = model
        self._system = system
        self._cache: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._prompt: Prompt | None = None
        self._in_cache = np.zeros(0, np.int64)

    def send(
        self,
        text: str,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        on_token: "OnToken | None" = None,
        **settings: "Unpack[GivenSettings]",
    ) -> Generation:
        """Say something, with pictures and clips before the text, and get the answer.

        Interrupted (Ctrl-C, or an exception from on_token), the conversation goes on from what was answered by then.
        Raises what Model.generate raises; a turn that is refused leaves no trace.
        """
        timings = Timings()
        row, messages = self._next(text, images, videos, settings)
        timings.mark("preprocess")
        with closing(self._answer(row, messages, timings)) as steps:
            for step in steps:
                for token in step:
                    if on_token is not None:
                        on_token(token)
        return row.generation(timings)

    def stream(
        self,
        text: str,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        **settings: "Unpack[GivenSettings]",
    ) -> Generator[str, None, None]:
        """Like `send`, but yields pieces of text; closing the iterator interrupts the answer."""
        row, messages = self._next(text, images, videos, settings)
        return texts(self._answer(row, messages, Timings()))

    def _next(
        self, text: str, images: Sequence[ImageSource], videos: Sequence[VideoSource], settings: "GivenSettings"
    ) -> tuple[Row, list[Message]]:
        """The turn's row, and all messages up to it."""
        model = self._model
        items = [*given_items("image", images), *given_items("video", videos)]
        said = {"type": "text", "text": text}
        content: list[dict[str, Any]] = [{"type": item.kind, item.kind: item.source} for item in items]
        prompt = model.processor.prepare([*self.messages, {"role": "user", "content": [*content, said]}])
        row = model.row(prompt, model.settings(settings), self._kept(prompt))
        # the next turns neither open nor resize these pictures again
        pictures = [*zip(prompt.vision_kinds, prompt.pictures(), strict=True)]
        for kind, count in (("image", len(images)), ("video", len(videos))):
            cut = [picture for found, picture in pictures if found == kind]
            for part, picture in zip([part for part in content if kind in part], cut[len(cut) - count :], strict=True):
                part[kind] = picture
        return row, [*self.messages, {"role": "user", "content": [*content, said]}]

    def _kept(self, prompt: Prompt) -> int:
        """How many of the prompt's first tokens the cache holds; the last one is always run anew, for its logits."""
        if self._prompt is None:
            return 0
        most = min(len(self._in_cache), len(prompt.token_ids) - 1)
        departs = np.flatnonzero(self._in_cache[:most] != prompt.token_ids[:most])
        kept = int(departs[0]) if departs.size else most
        spans = prompt.picture_spans(self._model.processor.config.vision.spatial_merge_size)
        for (start, end), old, new in zip(spans, self._prompt.pictures(), prompt.pictures(), strict=False):
            # equal placeholders may stand for another picture, and a picture is run whole
            if start < kept and (end > kept or not old.same(new)):
                return start
        return kept

    def _answer(self, row: Row, messages: list[Message], timings: Timings) -> Generator[list[Token], None, None]:
        if self._cache is None:
            self._cache = self._model.backend.allocate(1)
        # until prefill is done, what lies behind the kept part is neither the old turn's nor the new one's
        self._in_cache = row.prompt.token_ids[: row.cached_tokens]
        self._prompt = row.prompt
        try:
            with closing(self._model.steps([row], timings, self._cache)) as steps:
                yield from steps
        finally:
            if row.made:
                # the last token was never fed, and is not in the cache
                self._in_cache = np.concatenate([row.prompt.token_ids, np.array(row.made[:-1], np.int64)])
                self.messages = [*messages, {"role": "assistant", "content": "".join(row.texts)}]
