"""The language of the rules' conditions: small prefix expressions over the facts of a node.

    (and (eq layout 'BSH') (le d 512))

A name is a fact, a name in single quotes is itself, a number is itself; so is all that follows the fact in
(in d 64 128). A fact that a node does not have is None: it equals no value, is neither less nor more than one, and is
written "-" in the rows of a library.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...artifacts.errors import ArtifactError

Lookup = Callable[[str], Any]
_TOKENS = re.compile(r"[()]|[^\s()]+")


def holds(expression: Any, look: Lookup) -> bool:
    """Whether a condition holds of the facts that `look` finds. Raises ArtifactError for one that is no condition."""
    return bool(_value(parsed(expression) if isinstance(expression, str) else expression, look))


@functools.cache
def parsed(text: str) -> Any:
    """The tuples, names and numbers that a condition's text says. Raises ArtifactError for one that says none."""
    stack: list[list[Any]] = [[]]
    for token in _TOKENS.findall(text):
        if token == "(":
            stack.append([])
        elif token == ")" and len(stack) > 1:
            form = tuple(stack.pop())
            stack[-1].append(form)
        else:
            stack[-1].append(int(token) if token.isdecimal() else token)
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ArtifactError(f"the rules of check: no condition: {text!r:.80}")
    return stack[0][0]


def _value(expression: Any, look: Lookup) -> Any:
    if isinstance(expression, str):
        quoted = len(expression) > 1 and expression[0] == expression[-1] == "'"
        return expression[1:-1] if quoted else look(expression)
    if isinstance(expression, int):
        return expression
    if not isinstance(expression, tuple) or not expression or expression[0] not in _FORMS:
        raise ArtifactError(f"the rules of check: no condition: {expression!r:.80}")
    return _FORMS[expression[0]](look, *expression[1:])


def _compared(test: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    def compare(look: Lookup, left: Any, right: Any) -> bool:
        a, b = _value(left, look), _value(right, look)
        return a is not None and b is not None and test(a, b)

    return compare


def _computed(operation: Callable[[Any, Any], int]) -> Callable[..., int | None]:
    def compute(look: Lookup, left: Any, right: Any) -> int | None:
        a, b = _value(left, look), _value(right, look)
        return None if a is None or b is None else operation(a, b)

    return compute


def _row(look: Lookup, facts: list[str], rows: list[str]) -> bool:
    return " ".join("-" if (value := look(fact)) is None else str(value) for fact in facts) in rows


_FORMS: Mapping[str, Callable[..., Any]] = {
    "true": lambda look: True,
    "false": lambda look: False,
    "and": lambda look, *parts: all(holds(part, look) for part in parts),
    "or": lambda look, *parts: any(holds(part, look) for part in parts),
    "not": lambda look, part: not holds(part, look),
    "if": lambda look, test, yes, no: _value(yes if holds(test, look) else no, look),
    "eq": _compared(lambda a, b: a == b),
    "lt": _compared(lambda a, b: a < b),
    "le": _compared(lambda a, b: a <= b),
    "gt": _compared(lambda a, b: a > b),
    "ge": _compared(lambda a, b: a >= b),
    "mult": _compared(lambda a, b: b != 0 and a % b == 0),
    "mul": _computed(lambda a, b: a * b),
    "div": _computed(lambda a, b: a // b),
    "in": lambda look, fact, *values: _value(fact, look) in values,
    # the facts, joined, are one of the rows: how a library lists the dtypes that go together
    "row": _row,
    "hasattr": lambda look, name: look(f"attr.{name}") is not None,
    "hasdesc": lambda look, *names: any(look(f"in.{name}.described") for name in names),
    "hasop": lambda look, name: name in (look("graph.operators") or ()),
    # how many -1 a constant holds; one that is not known counts as none
    "minus1": lambda look, fact: (look(f"{fact}.values") or ()).count(-1),
}
