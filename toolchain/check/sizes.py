"""The smallest and the largest sizes of an artifact's graphs: what holds at both ends is taken to hold between."""

from collections.abc import Iterator

from ...artifacts.ge.ops import MOST_PATCHES
from ...runtime.models.base import GraphSpec
from ...runtime.models.config import ModelConfig
from ..inspect.cost import Lengths

# one token is what decode is for
FEWEST_TOKENS = 2


def pictures(count: int, patches: int) -> Lengths:
    """Of the visual graph: so many pictures of so many patches each."""
    return Lengths(count * patches, (patches,) * count, FEWEST_TOKENS, 1)


def prompt(tokens: int, image_tokens: int) -> Lengths:
    """Of the prefill graph."""
    return Lengths(image_tokens, (image_tokens,), tokens, image_tokens)


def extremes(spec: GraphSpec, config: ModelConfig, max_length: int) -> Iterator[tuple[str, Lengths]]:
    """The sizes to check a graph at, in words and numbers; decode has one, since nothing in it is free."""
    merge = config.vision.spatial_merge_size**2
    if spec.kind == "visual":
        most = MOST_PATCHES // merge * merge
        yield f"one picture of {merge} patches", pictures(1, merge)
        yield f"one picture of {most:,} patches", pictures(1, most)
        yield f"{most // merge:,} pictures of {merge} patches", pictures(most // merge, merge)
    elif spec.kind == "prefill":
        yield f"a prompt of {FEWEST_TOKENS} tokens", prompt(FEWEST_TOKENS, 1)
        yield f"a prompt of {max_length:,} tokens", prompt(max_length, max_length)
    else:
        yield "every step", prompt(FEWEST_TOKENS, 1)
