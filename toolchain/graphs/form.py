"""Which operators the graphs use, where more than one form exists."""

from dataclasses import dataclass

OPERATORS = ("fused", "recipe")
VISUAL_ATTENTION = ("tnd", "masked")


@dataclass(frozen=True)
class Form:
    """operators: "fused" attends with FusedInferAttentionScore, "recipe" with PromptFlashAttention over a dense mask
    and IncreFlashAttention. visual_attention: "tnd" attends within sequence lengths, "masked" over a dense mask.

    The second of each is for CANN versions that refuse the first: head_dim 80 in the TND layout, say.
    """

    operators: str = "fused"
    visual_attention: str = "tnd"
