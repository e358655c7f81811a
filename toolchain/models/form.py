"""Which operators the graphs use, where more than one form exists."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """operators: "fused" attends with FusedInferAttentionScore, "recipe" with PromptFlashAttention over a dense mask
    and IncreFlashAttention.

    visual_attention: "segments" attends in BSH with the segments as the batch, "tnd" over segments packed end to end,
    one run for pictures of any sizes, which CANN takes from 9.0 on.
    """

    operators: str = "fused"
    visual_attention: str = "segments"
