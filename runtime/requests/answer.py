"""One request while it is answered, and its answer."""

from dataclasses import dataclass, field
from functools import cached_property

from ...artifacts.errors import ArtifactError, RequestError
from ..phases import PhaseTimes
from ..text.prompt import Processor, Prompt
from ..text.stream import StopStrings
from .sampling import Logits, Sampler, check_logits
from .settings import Settings

STOP = "stop"
LENGTH = "length"
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Token:
    """One generated token: the row of the batch it belongs to, and the text that it completes, often empty.

    The texts of a row's tokens, joined, are the answer.
    """

    row: int
    id: int
    text: str


@dataclass(frozen=True)
class Generation:
    """One answer. finish_reason is "stop" (an end token, not part of the text, or a stop string) or "length".

    timings_ms: preprocess, visual, prefill, weight_check (waiting for the weights' hashes; about 0 later),
    first_token (their sum), decode (all later tokens), per_token (its mean); token_ms: from each token to the next.
    Rows of one batch share them. cached_tokens: how many of the prompt's were in the KV cache already.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    timings_ms: dict[str, float]
    token_ms: tuple[float, ...] = ()
    cached_tokens: int = 0


@dataclass
class Timings(PhaseTimes):
    """What an answer took: phases, and from each token to the next."""

    token_ms: list[float] = field(default_factory=list)

    def mark_token(self) -> None:
        """A token after the first has come."""
        self.token_ms.append(self._since_last())

    def skip(self) -> None:
        """What passed since the last mark was the caller's."""
        self._since_last()

    def summary(self) -> dict[str, float]:
        """The phases in milliseconds, with the sums that Generation names."""
        before = ("preprocess", "visual", "prefill", "weight_check")
        sums = {"first_token": sum(self.phases.get(name, 0.0) for name in before), "decode": sum(self.token_ms)}
        if self.token_ms:
            sums["per_token"] = sums["decode"] / len(self.token_ms)
        return {name: round(value, 3) for name, value in {**self.phases, **sums}.items()}


def tokens_to_make(prompt_tokens: int, settings: Settings, max_length: int, delta: int = 0) -> int:
    """How many tokens may be generated. Raises RequestError when prompt and answer do not fit the KV cache, which has
    as many rotary positions as places. delta: the prompt's, of rotary positions; above 0 where a clip's clock runs
    faster than its tokens.

    The last token is never written to the cache: n tokens need prompt + n - 1 positions.
    """
    wanted = settings.max_new_tokens
    least = wanted or settings.min_new_tokens or 1
    taken = prompt_tokens + max(0, delta)
    room = max_length - taken + 1
    what = f"{prompt_tokens} tokens" + (f" up to rotary position {taken - 1}" if delta > 0 else "")
    if room < 1:
        raise RequestError(
            f"the prompt has {what}, the artifact's cache {max_length}; shorten it or compile with "
            f"--max-length {taken + least - 1}"
        )
    if least > room:
        raise RequestError(
            f"a prompt of {what} and {'max' if wanted else 'min'}_new_tokens {least} need a cache of "
            f"{taken + least - 1}, the artifact has {max_length}; ask for at most {room}, or compile "
            f"with --max-length {taken + least - 1}"
        )
    return wanted or min(max(settings.default_new_tokens or DEFAULT_NEW_TOKENS, least), room)


class Row:
    """One request of a batch while it is answered."""

    def __init__(
        self, prompt: Prompt, settings: Settings, processor: Processor, max_length: int, number: int = 0
    ) -> None:
        """number: the request's, as errors say it. Raises RequestError (tokens_to_make)."""
        self.prompt = prompt
        self.number = number
        self.settings = settings
        # the prompt's first tokens that the row's cache holds
        self.cached_tokens = 0
        self.limit = tokens_to_make(len(prompt.token_ids), settings, max_length, prompt.delta)
        self._vocab_size = processor.config.text.vocab_size
        self.made: list[int] = []
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        self._seen = set(prompt.token_ids.tolist())
        self._stream = processor.stream()
        self._stops = StopStrings(processor.stream(skip_special_tokens=False), settings.stop) if settings.stop else None

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.settings)

    @property
    def left(self) -> int:
        """Tokens that may still be made."""
        return 0 if self.finish_reason else self.limit - len(self.made)

    @property
    def step(self) -> str:
        """The next token's place, as errors say it."""
        return f"row {self.number}, token {len(self.made)}: {'decode' if self.made else 'prefill'}"

    def check(self, logits: Logits) -> None:
        """Raises ToolchainError when the logits of the next token, [vocabulary], hold NaN or infinity."""
        check_logits(logits, self.step)

    def choose(self, logits: Logits) -> int:
        """The next token, from logits [vocabulary]. Raises what `check` raises."""
        self.check(logits)
        return self._sampler.choose(logits, self._seen, len(self.made))

    def take(self, token: int, row: int) -> Token:
        """Note a token that was made; the row may have ended with it. Raises ArtifactError if it can be none."""
        if not 0 <= token < self._vocab_size:
            raise ArtifactError(f"a graph gave the token {token}, outside the vocabulary of {self._vocab_size}")
        self.made.append(token)
        self._seen.add(token)
        text = self._stream.feed(token)
        if token in self.settings.eos_token_ids or (self._stops is not None and self._stops.ended_by(token)):
            self.finish_reason = STOP
        elif len(self.made) == self.limit:
            self.finish_reason = LENGTH
        if self.finish_reason:
            text += self._stream.flush()
        self.texts.append(text)
        return Token(row, token, text)

    def generation(self, timings: Timings) -> Generation:
        """The finished answer."""
        return Generation(
            text="".join(self.texts),
            token_ids=tuple(self.made),
            prompt_token_ids=tuple(int(i) for i in self.prompt.token_ids),
            finish_reason=self.finish_reason or LENGTH,
            timings_ms=timings.summary(),
            token_ms=tuple(round(value, 3) for value in timings.token_ms),
            cached_tokens=self.cached_tokens,
        )
