"""The smallest and the largest sizes of an artifact's graphs: what holds at both ends is taken to hold between."""

from collections.abc import Iterator
from dataclasses import dataclass

from ...artifacts.binding import LENGTHS, Binding, BoundInput
from ...artifacts.config import ModelConfig
from ...artifacts.errors import ArtifactError
from ..shapes import TensorSpec

MOST_PATCHES = 1 << 16
# one token is what decode is for
FEWEST_TOKENS = 2


@dataclass(frozen=True)
class Sizes:
    """One assignment of a graph's free sizes: `segments` of `patches` each, or a prompt's tokens and image tokens."""

    title: str
    segments: int = 0
    patches: int = 0
    tokens: int = 0
    image_tokens: int = 0


def extremes(graph: str, config: ModelConfig, max_length: int) -> Iterator[Sizes]:
    """The sizes to check a graph at; decode has one, since nothing in it is free."""
    merge = config.vision.spatial_merge_size**2
    if graph == "visual":
        most = MOST_PATCHES // merge * merge
        yield Sizes(f"one picture of {merge} patches", segments=1, patches=merge)
        yield Sizes(f"one picture of {most:,} patches", segments=1, patches=most)
        yield Sizes(f"{most // merge:,} pictures of {merge} patches", segments=most // merge, patches=merge)
    elif graph == "prefill":
        yield Sizes(f"a prompt of {FEWEST_TOKENS} tokens", tokens=FEWEST_TOKENS, image_tokens=1)
        yield Sizes(f"a prompt of {max_length:,} tokens", tokens=max_length, image_tokens=max_length)
    else:
        yield Sizes("every step")


def input_specs_at(binding: Binding, sizes: Sizes, where: str) -> list[TensorSpec]:
    """The inputs of a graph with every free size filled in. Raises ArtifactError for one that nothing fills."""
    return [TensorSpec(bound.dtype, _filled(binding.graph, bound, sizes, where)) for bound in binding.inputs]


def _filled(graph: str, bound: BoundInput, sizes: Sizes, where: str) -> tuple[int, ...]:
    free = bound.shape.count(-1)
    if graph == "visual" and bound.kind == LENGTHS:
        known: tuple[int, ...] = (sizes.segments,)
    elif graph == "visual":
        # segments by patches, or all patches in one row
        known = (sizes.segments, sizes.patches) if free == 2 else (sizes.segments * sizes.patches,)
    elif graph == "prefill" and bound.name in ("image_embeds", "image_index"):
        known = (sizes.image_tokens,)
    else:
        known = (sizes.tokens,) if sizes.tokens else ()
    if free not in (0, len(known)):
        raise ArtifactError(f"{where}: {bound.name} has the free sizes {list(bound.shape)}; compile the artifact again")
    filling = iter(known)
    return tuple(next(filling) if size == -1 else size for size in bound.shape)
