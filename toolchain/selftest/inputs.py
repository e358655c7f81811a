"""What the self-test asks: two calls of the vision tower and three sequences of tokens, made for one model's sizes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import TargetError
from ...runtime.backends.base import Ints
from ...runtime.models import family_of
from ...runtime.models.base import Picture
from ...runtime.models.config import ModelConfig
from ...runtime.pictures.patches import PatchGrid
from ...runtime.pictures.vision import ImageSettings
from ..verify.cases import picture

# Decode steps of every sequence, on tokens that are given: a first choice that flips derails nothing.
STEPS = 4
# A device was seen to ignore a mask beyond this key. A quarter as many tokens stand behind it: what all others wrongly
# see of them reaches the token whose logits are read through the layers' keys and values, 3 to 5 times the limit.
MASK_POSITION = 512
_LONGEST = 640
# Names of the calls, in the order of the file. Sizes (rows, columns) in merge windows: one picture; and four, of which
# the first two are near enough to run as rows of one batch, the second padded, and the others have one size.
VISUAL_CALLS = ("one picture", "four pictures")
_SIZES = (((3, 4),), ((3, 3), (2, 4), (1, 3), (1, 3)))
SCRIPTS = ("long", "short", "middle")
# Of text alone, what is wrong with pictures is not; and where a few keys are all there are, one that is missing or
# misplaced moves the answer much: both are "short". "middle" has a picture, and no position beyond the mask's.
_SHORT_TURNS, _MIDDLE_TURN = (7, 3), 21
_SECOND_TURN = 18
MOST_TOKENS = _LONGEST + _SECOND_TURN + STEPS
_SEED = 20


@dataclass(frozen=True, eq=False)
class SelftestPictures:
    """One call of the vision tower: patches uint8 [n, patch_dim], grids int64 [pictures, 3]."""

    patches: NDArray[np.uint8]
    grids: Ints


@dataclass(frozen=True, eq=False)
class Script:
    """One row of a batch, from an empty cache: every turn is prefilled behind the one before, STEPS tokens are decoded.

    token_ids int64 [tokens], positions int64 [3, tokens] (M-RoPE), of turns and steps together. turns: tokens of each.
    visual: which VISUAL_CALLS's embeddings each turn's placeholders take; None for text.
    """

    token_ids: Ints
    positions: Ints
    turns: tuple[int, ...]
    visual: tuple[int | None, ...]

    @property
    def prompt(self) -> int:
        """Tokens that are prefilled."""
        return sum(self.turns)

    def read(self) -> list[int]:
        """The token that each call's logits follow: the last of every turn, then every decoded one."""
        return [*(np.cumsum(self.turns) - 1).tolist(), *range(self.prompt, self.prompt + STEPS)]


@dataclass(frozen=True, eq=False)
class SelftestInputs:
    """All that is fed: one entry for each of VISUAL_CALLS, one for each of SCRIPTS."""

    visual: tuple[SelftestPictures, ...]
    scripts: tuple[Script, ...]

    def longest(self) -> int:
        """Cache positions that the longest script takes."""
        return max(len(script.token_ids) for script in self.scripts)

    def not_covered(self) -> tuple[str, ...]:
        """What a cache of this length leaves out, in words."""
        if self.scripts[0].turns[0] > MASK_POSITION:
            return ()
        return (
            f"a mask that is ignored beyond position {MASK_POSITION}: the longest prompt has "
            f"{self.scripts[0].turns[0]} tokens, as many as the cache lets it have",
        )


def make_inputs(config: ModelConfig, max_length: int) -> SelftestInputs:
    """The self-test's inputs for a model and a cache of max_length positions. Raises TargetError for a tiny cache."""
    merge = config.vision.spatial_merge_size
    settings = ImageSettings(1, 1, config.vision.patch_size, config.vision.temporal_patch_size, merge)
    visual = tuple(_visual(sizes, settings, 10 * i) for i, sizes in enumerate(_SIZES))
    spans = [_span(call, config) for call in visual]
    least = len(spans[1]) + 2
    first = min(_LONGEST, max_length - STEPS - _SECOND_TURN)
    if first < least:
        raise TargetError(
            f"the self-test needs a cache of {least + _SECOND_TURN + STEPS} tokens, the artifact has {max_length}; "
            f"compile it with --max-length {least + _SECOND_TURN + STEPS} or more"
        )
    words = _words(config)
    # the second turn brings the lone picture to a start position above 0
    long = [*_turn(words, first, spans[1]), *_turn(words, _SECOND_TURN, spans[0])]
    grids = np.concatenate([visual[1].grids, visual[0].grids])
    middle = _turn(words, _MIDDLE_TURN, spans[0])
    return SelftestInputs(
        visual,
        (
            _script(config, [*long, *_some(words, STEPS)], grids, (first, _SECOND_TURN), (1, 0)),
            _script(config, _some(words, sum(_SHORT_TURNS) + STEPS), grids[:0], _SHORT_TURNS, (None, None)),
            _script(config, [*middle, *_some(words, STEPS)], visual[0].grids, (_MIDDLE_TURN,), (0,)),
        ),
    )


def _visual(sizes: tuple[tuple[int, int], ...], settings: ImageSettings, seed: int) -> SelftestPictures:
    patches, grids = [], []
    for i, (rows, columns) in enumerate(sizes):
        height, width = rows * settings.factor, columns * settings.factor
        cut = PatchGrid(1, height, width, settings)
        cut.write(0, picture(width, height, seed + i))
        patches.append(cut.patches)
        grids.append(cut.grid)
    return SelftestPictures(np.concatenate(patches), np.array(grids, np.int64))


def _span(call: SelftestPictures, config: ModelConfig) -> list[int]:
    """The tokens of a call's pictures, each between its marks."""
    counts = call.grids.prod(1) // config.vision.spatial_merge_size**2
    start, pad, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    return [token for count in counts.tolist() for token in (start, *[pad] * count, end)]


def _words(config: ModelConfig) -> Iterator[int]:
    """Ids without end, drawn evenly from the vocabulary: as different keys as there are, and no placeholder."""
    marks = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    random = np.random.default_rng(_SEED)
    while True:
        yield from (i for i in random.integers(0, config.text.vocab_size, 64).tolist() if i not in marks)


def _some(words: Iterator[int], count: int) -> list[int]:
    return [next(words) for _ in range(count)]


def _turn(words: Iterator[int], count: int, span: list[int]) -> list[int]:
    """`count` tokens: one word, the pictures, words."""
    return [next(words), *span, *_some(words, count - len(span) - 1)]


def _script(
    config: ModelConfig, ids: list[int], grids: Ints, turns: tuple[int, ...], visual: tuple[int | None, ...]
) -> Script:
    token_ids = np.array(ids, np.int64)
    pictures = [Picture("image", (t, h, w)) for t, h, w in grids.tolist()]
    positions, _ = family_of(config).inputs(config).positions(token_ids, pictures)
    return Script(token_ids, positions, turns, visual)
