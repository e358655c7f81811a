"""What a wrong answer looks like, what is known to look like that, and the form to compile instead."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...artifacts.manifest import GePart
from .inputs import MASK_POSITION, SCRIPTS, VISUAL_CALLS
from .observe import DECODE, KINDS, PREFILL, VISUAL

# Signs that are read off one output ...
NOT_FINITE, UNWRITTEN, REPEATED, TOKEN = "not finite", "unwritten", "repeated", "token"
# ... and off which of a graph's outputs are wrong.
SEVERAL_ONLY, LONG_ONLY, ROWS_ONLY = "several only", "long only", "rows only"
SIGNS = {
    NOT_FINITE: "the output holds NaN or infinity",
    UNWRITTEN: "every number of the output is the same",
    REPEATED: "the output is, bit for bit, that of an earlier call with other inputs",
    TOKEN: "the token that the graph chose is not the largest of its own logits",
    SEVERAL_ONLY: f"{VISUAL_CALLS[0]} is right, {VISUAL_CALLS[1]} in one call are not",
    LONG_ONLY: f"only the prompt that goes beyond position {MASK_POSITION} is wrong",
    ROWS_ONLY: "the same request is right in one row of the batch and wrong in another",
}


@dataclass(frozen=True)
class Symptom:
    """One thing that goes wrong on devices: in which kinds of graph, with which of SIGNS (None: with none), and what
    to do about it."""

    kinds: tuple[str, ...]
    sign: str | None
    looks_like: str
    advice: str


_FORM = "compile the form below"
_SYMPTOMS = (
    Symptom(KINDS, NOT_FINITE, "an output left unwritten in fresh memory, or an overflow of fp16", f"{_FORM}, or bf16"),
    Symptom(KINDS, UNWRITTEN, "an output left as it was: a kernel that was not launched", f"{_FORM}"),
    Symptom(KINDS, REPEATED, "an output left as it was: a kernel that was not launched", f"{_FORM}"),
    Symptom((PREFILL, DECODE), TOKEN, "ArgMax that reads another tensor, or ends early", "update CANN"),
    Symptom((VISUAL,), SEVERAL_ONLY, "cumulative lengths taken as plain ones, or plain ones as cumulative", _FORM),
    Symptom((PREFILL,), LONG_ONLY, f"a mask that is ignored beyond position {MASK_POSITION}", _FORM),
    Symptom((DECODE,), ROWS_ONLY, "lengths of one row taken for another's, or rows split wrongly over cores", _FORM),
    Symptom(KINDS, None, "attention that returns the uniform average of the values", _FORM),
    Symptom(KINDS, None, "two heads, or two groups of them, swapped", _FORM),
    Symptom(
        (VISUAL,),
        None,
        "a rotation that leaves the last columns of each head unturned (16 of 80)",
        "compile again: this version rotates the tower by RotaryPositionEmbedding",
    ),
    Symptom((PREFILL, DECODE), None, "keys and values written one position off, or lengths one too small", _FORM),
)


def known_symptoms(kind: str, signs: Sequence[str]) -> tuple[Symptom, ...]:
    """What is known to look like this: by its signs where any of them is known, by the kind of graph otherwise."""
    mine = [symptom for symptom in _SYMPTOMS if kind in symptom.kinds]
    told = tuple(symptom for symptom in mine if symptom.sign in signs)
    return told or tuple(symptom for symptom in mine if symptom.sign is None)


def pattern_signs(kind: str, wrong: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Signs that a graph's calls show together: which of them were wrong at least once, which right at least once."""
    long = 0
    if kind == VISUAL and right and all(call == 1 for _, call in wrong):
        return (SEVERAL_ONLY,)
    if set(wrong) & set(right):
        return (ROWS_ONLY,)
    if kind == PREFILL and right and all(script == long for script, _ in wrong) and len(SCRIPTS) > 1:
        return (LONG_ONLY,)
    return ()


def form_instead(kind: str, part: GePart) -> str:
    """The options of `compile` that give this graph another form than it has."""
    if kind == VISUAL:
        other = "tnd" if part.visual_attention == "segments" else "segments"
        return f"--visual-attention {other}" + (" (CANN 9.0 or newer)" if other == "tnd" else "")
    return f"--operators {'fused' if part.operators == 'recipe' else 'recipe'}"
