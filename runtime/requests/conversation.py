"""A conversation whose KV cache outlives the turn: the next turn prefills only what is new."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import RequestError, ToolchainError
from ..pictures.images import ImageSource
from ..pictures.patches import CutPicture
from ..pictures.request import DEFAULT_VISION, VideoSource, VisionOptions
from ..text.messages import Message, given_items
from ..text.prompt import Prompt
from .answer import Generation, Row, Timings, Token
from .generate import run_out, texts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..model import Model, OnToken
    from .settings import GivenSettings


@dataclass(frozen=True, eq=False)
class _Cached:
    """What the KV cache holds: token ids [n], and the pictures among them, in order; these settle all positions."""

    token_ids: NDArray[np.int64]
    pictures: tuple[CutPicture, ...]


class Conversation:
    """Turns of user and assistant. Every answer is the one that a fresh request with all messages would get.

    The new turn's token ids and pictures, those of all messages, are compared with the cache's: what they share at
    their start is kept, the rest is prefilled. messages: what was said so far, pictures as patches. One answer at a
    time; each conversation holds a KV cache of one row.
    """

    def __init__(self, model: "Model", system: str | None = None, vision: VisionOptions = DEFAULT_VISION) -> None:
        self._model = model
        self._vision = vision
        self._system = system
        self._cache: Any = None
        self._answering = False
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays. Raises RequestError while an answer is unfinished."""
        self._check_idle()
        self.messages: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._cached = _Cached(np.zeros(0, np.int64), ())

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
        run_out(self._answer(row, messages, timings), on_token)
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

    def _check_idle(self) -> None:
        if self._answering:
            raise RequestError("an answer of this conversation is unfinished: read it to its end, or close it, first")

    def _next(
        self, text: str, images: Sequence[ImageSource], videos: Sequence[VideoSource], settings: "GivenSettings"
    ) -> tuple[Row, list[Message]]:
        """The turn's row, and all messages up to it."""
        self._check_idle()
        model = self._model
        items = [*given_items("image", images), *given_items("video", videos)]
        said = {"type": "text", "text": text}
        content: list[dict[str, Any]] = [{"type": item.kind, item.kind: item.source} for item in items]
        messages: list[Message] = [*self.messages, {"role": "user", "content": [*content, said]}]
        prompt = model.processor.prepare(messages, vision=self._vision)
        asked = model.settings(settings)
        try:
            row = model.row(prompt, asked)
        except RequestError as error:
            if not self.messages:
                raise
            raise RequestError(f"{error}; or forget the turns before: reset, /reset in a chat") from error
        # the next turns neither open nor resize these pictures again
        content = []
        for kind, count in (("image", len(images)), ("video", len(videos))):
            cut = [picture for picture in prompt.pictures if picture.kind == kind]
            content += [{"type": kind, kind: picture} for picture in cut[len(cut) - count :]]
        return row, [*self.messages, {"role": "user", "content": [*content, said]}]

    def _kept(self, prompt: Prompt) -> int:
        """How many of the prompt's first tokens the cache holds.

        The last one is always run anew, for its logits, and the one before: a lone token takes a second cache position
        in prefill (see GeBackend.prefill), which a full cache does not have.
        """
        cached = self._cached
        most = max(0, min(len(cached.token_ids), len(prompt.token_ids) - 2)) if self._cache is not None else 0
        differs = cached.token_ids[:most] != prompt.token_ids[:most]
        kept = int(np.argmax(differs)) if differs.any() else most
        for i, ((start, end), new) in enumerate(zip(prompt.spans, prompt.pictures, strict=True)):
            # equal placeholders may stand for another picture, or for none, and a picture is run whole
            same = i < len(cached.pictures) and new.same(cached.pictures[i])
            if start < kept and (end > kept or not same):
                return start
        return kept

    def _answer(self, row: Row, messages: list[Message], timings: Timings) -> Generator[list[Token], None, None]:
        self._check_idle()
        if list(map(id, messages[:-1])) != list(map(id, self.messages)):
            raise RequestError("the conversation has gone on since this answer was asked for; ask again")
        self._answering = True
        answered = False
        prompt = row.prompt
        known = row.cached_tokens = self._kept(prompt)
        try:
            if self._cache is None:
                self._cache = self._model.take_cache(1)
            # until prefill is done, what lies behind the kept part is neither the old turn's nor the new one's
            self._cached = _Cached(prompt.token_ids[:known], prompt.pictures)
            with closing(self._model.steps([row], timings, self._cache)) as steps:
                for step in steps:
                    # the weights that made it are known to be good
                    answered = True
                    yield step
        except ToolchainError:
            if not self._model.backend.reuses_caches:
                # a NaN that it may hold would reach the next answer, also from behind that one's end
                self._cache = None
            raise
        finally:
            self._answering = False
            if answered:
                # the last token was never fed, and is not in the cache
                fed = np.array(row.made[:-1], np.int64)
                self._cached = _Cached(np.concatenate([prompt.token_ids, fed]), self._cached.pictures)
                text = "".join(row.texts)
                # spelled out by the model, a placeholder would stand for a picture in the next turn
                while any(placeholder in text for placeholder in self._model.processor.placeholders):
                    for placeholder in self._model.processor.placeholders:
                        text = text.replace(placeholder, "")
                self.messages = [*messages, {"role": "assistant", "content": text}]
