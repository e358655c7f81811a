"""Attributes of operators that no release reads as written: of another type than GE's definition has, or out of range.

By name, as operators share them; an attribute that is not here is none that an exported graph has, or is left to the
rules. An integer has the least value that makes sense.
"""

from collections.abc import Iterable, Iterator
from math import isfinite
from typing import Any

from ...artifacts.ge.graph import Node

_LEAST = {
    **dict.fromkeys(("num_heads", "num_split", "N"), 1),
    **dict.fromkeys(
        (
            *(
                "antiquant_mode",
                "block_size",
                "inner_precise",
                "key_antiquant_mode",
                "num_key_value_heads",
                "out_dtype",
            ),
            *("pse_type", "query_quant_mode", "sparse_mode", "value_antiquant_mode", "mode", "dst_type", "index"),
            *("pre_tokens", "next_tokens"),
        ),
        0,
    ),
    # from the end where negative; a rank is at most 16
    **dict.fromkeys(("axis", "dim", "batch_dims", "num_axes"), -16),
}
_FLOATS = ("scale", "scale_value", "epsilon")
_FLAGS = (
    *("additional_output", "is_preprocessed", "keep_dims", "negative_index_support", "softmax_lse_flag"),
    *("transpose_x1", "transpose_x2", "use_locking", "validate_indices"),
)
# the layouts that there are: which of them an operator takes, the rules say
_WORDS = {"input_layout": ("BSH", "BSND", "BNSD", "TND", "NTD", "SH", "NSD"), "reduce": ("update",)}


def nonsense(nodes: Iterable[Node]) -> Iterator[tuple[str, str, str]]:
    """Each attribute that makes no sense: its node's name, the operator's and its own, and what is wrong in words."""
    for node in nodes:
        for attribute, value in node.attributes.items():
            if (expected := _expected(attribute, value)) is not None:
                yield node.name, f"{node.op}.{attribute}", f"{attribute} is {value!r:.40}, expected {expected}"


def _expected(attribute: str, value: Any) -> str | None:
    """What was expected; None where the value is that."""
    if attribute in _LEAST:
        least = _LEAST[attribute]
        return None if type(value) is int and value >= least else f"an integer of at least {least}"
    if attribute in _FLOATS:
        # 0 would make all scores equal, and divide by nothing
        return None if type(value) in (float, int) and isfinite(value) and value > 0 else "a positive number"
    if attribute in _FLAGS:
        return None if type(value) is bool else "true or false"
    if attribute in _WORDS:
        return None if value in _WORDS[attribute] else f"one of {', '.join(_WORDS[attribute])}"
    return None
