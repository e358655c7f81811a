"""What a wrong answer looks like, what is known to look like that, and the form to compile instead."""

from collections.abc import Collection
from dataclasses import dataclass

from ...artifacts.manifest import GePart
from .inputs import MASK_POSITION, SCRIPTS, VISUAL_CALLS
from .observe import DECODE, KINDS, PREFILL, VISUAL

# Signs that are read off one output ...
NOT_FINITE, UNWRITTEN, REPEATED, TOKEN = "not finite", "unwritten", "repeated", "token"
# ... and off which of a graph's outputs are wrong.
SEVERAL_ONLY, LONG_ONLY, PICTURES_ONLY, ROWS_ONLY = "several only", "long only", "pictures only", "rows only"
SIGNS = {
    NOT_FINITE: "the output holds NaN or infinity",
    UNWRITTEN: "every number of the output is the same",
    REPEATED: "the output is, bit for bit, that of an earlier call with other inputs",
    TOKEN: "the token that the graph chose is not the largest of its own logits",
    SEVERAL_ONLY: f"{VISUAL_CALLS[0]} is right, {VISUAL_CALLS[1]} in one call are not",
    LONG_ONLY: f"only the prompt that goes beyond position {MASK_POSITION} is wrong",
    PICTURES_ONLY: "only sequences with pictures are wrong, and the embeddings of the pictures are right",
    ROWS_ONLY: "what is wrong in one row of the batch is right in another, or in a batch of another size",
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
    Symptom(KINDS, NOT_FINITE, "an output left as it was in fresh memory, or an overflow of fp16", f"{_FORM}, or bf16"),
    Symptom(KINDS, UNWRITTEN, "an output left as it was: a kernel that was not launched", _FORM),
    Symptom(KINDS, REPEATED, "an output left as it was: a kernel that was not launched", _FORM),
    Symptom((PREFILL, DECODE), NOT_FINITE, "keys and values written one position off, beside fresh memory", _FORM),
    Symptom((PREFILL, DECODE), TOKEN, "ArgMax that reads another tensor, or ends early", "update CANN"),
    Symptom((VISUAL,), SEVERAL_ONLY, "an output left as it was, where a call takes several runs", _FORM),
    Symptom((VISUAL,), SEVERAL_ONLY, "cumulative lengths taken as plain ones, or plain ones as cumulative", _FORM),
    Symptom((PREFILL,), LONG_ONLY, f"a mask that is ignored beyond position {MASK_POSITION}", _FORM),
    Symptom((PREFILL,), PICTURES_ONLY, "embeddings of pictures written to the wrong tokens", "update CANN"),
    Symptom((DECODE,), ROWS_ONLY, "one row's lengths or cache taken for another's, or rows split wrongly", _FORM),
    Symptom(KINDS, None, "attention that returns the uniform average of the values", _FORM),
    Symptom(KINDS, None, "two heads, or two groups of them, swapped", _FORM),
    Symptom(KINDS, None, "an output inside the graph left as it was", _FORM),
    Symptom(
        (VISUAL,),
        None,
        "a rotation that leaves the last columns of each head unturned (16 of 80)",
        "update CANN; graphs of this version rotate by RotaryPositionEmbedding",
    ),
    Symptom((PREFILL, DECODE), None, "keys and values written one position off, or lengths one too small", _FORM),
)


def known_symptoms(kind: str, signs: Collection[str]) -> tuple[Symptom, ...]:
    """What is known to look like this: by its signs where any of them is known, by the kind of graph otherwise."""
    mine = [symptom for symptom in _SYMPTOMS if kind in symptom.kinds]
    told = tuple(symptom for symptom in mine if symptom.sign in signs)
    return told or tuple(symptom for symptom in mine if symptom.sign is None)


def pattern_sign(
    kind: str, wrong: Collection[tuple[int, int]], right: Collection[tuple[int, int]], some_rows: bool
) -> str | None:
    """The sign that a graph's wrong calls show together, beside those that were right in any graph of its kind.

    some_rows: whether rows of the graph's batch, but not all of them, are wrong.
    """
    long, short, middle = range(len(SCRIPTS))
    scripts, fine = {script for script, _ in wrong}, {script for script, _ in right}
    if kind == VISUAL and right:
        return SEVERAL_ONLY if {call for _, call in wrong} == {1} else None
    if kind == PREFILL and scripts == {long} and fine == {long, short, middle} - scripts:
        return LONG_ONLY
    if kind == PREFILL and scripts == {long, middle} and fine == {short}:
        return PICTURES_ONLY
    return ROWS_ONLY if kind == DECODE and some_rows and set(wrong) <= set(right) else None


def form_instead(kind: str, part: GePart) -> str:
    """The options of `compile` that give this graph another form than it has, and leave the rest as it is."""
    visual, operators = part.visual_attention, part.operators
    if kind == VISUAL:
        visual = "tnd" if visual == "segments" else "segments"
    else:
        operators = "fused" if operators == "recipe" else "recipe"
    form = f"--visual-attention {visual} --operators {operators}"
    rest = f"--soc {part.soc} --max-length {part.max_length} --batch {','.join(map(str, part.batches))}"
    return f"{form} {rest}" + (" (CANN 9.0 or newer)" if kind == VISUAL and visual == "tnd" else "")
