"""GE's operators, one file each: an operator called SwiGlu is `OPERATOR` in swi_glu.py, and nothing else lists it."""

import functools
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping

from ...artifacts.errors import ArtifactError
from ...artifacts.ge.graph import Node
from ...artifacts.ge.ops import CONSTANT, FILE_CONSTANT, INPUTS, OUTPUT
from ...artifacts.soc import DEFAULT_SOC
from .base import DATA, Operator
from .kernel import Kernel

_WORD = re.compile(r"(?<!^)(?=[A-Z])")


class Operators(Mapping[str, Operator]):
    """The operators by their GE types. A file is imported when its operator is first asked for; `changed` holds those
    that stand in for a file's."""

    def __init__(self) -> None:
        self.changed: dict[str, Operator] = {}
        self._read: dict[str, Operator] = {}

    def __getitem__(self, name: str) -> Operator:
        if operator := self.changed.get(name) or self._read.get(name):
            return operator
        module = _WORD.sub("_", name).lower()
        # a graph may name anything: only what lies here is imported
        operator = _record(module) if module in _modules() else None
        if operator is None or operator.ge != name:
            raise KeyError(name)
        self._read[name] = operator
        return operator

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(operator.ge for module in _modules() if (operator := _record(module))))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _modules() -> frozenset[str]:
    return _files(tuple(__path__))


@functools.cache
def _files(folders: tuple[str, ...]) -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(folders))


def _record(module: str) -> Operator | None:
    """The operator that a file states; None of a file that others share."""
    operator: Operator | None = getattr(importlib.import_module(f".{module}", __name__), "OPERATOR", None)
    return operator


OPERATORS = Operators()
_DATA = {name: Operator(name, kind=DATA) for name in (*INPUTS, CONSTANT, FILE_CONSTANT, OUTPUT)}


def known(name: str) -> Operator:
    """What is known of an operator: of one without a file, that it is data, or else a kernel."""
    return _DATA.get(name) or OPERATORS.get(name) or Operator(name)


def computed() -> Iterable[str]:
    """The operators that a finished graph may hold, all with a shape rule and a kernel on CPU."""
    return [name for name, each in OPERATORS.items() if each.run]


def kernel_of(node: Node, where: str, soc: str = DEFAULT_SOC) -> Kernel:
    """The function for a node, as `soc` computes it. Raises ArtifactError for an operator that this runtime does not
    know."""
    operator = OPERATORS.get(node.op)
    if operator is None or operator.run is None:
        known = ", ".join(computed())
        raise ArtifactError(f"{where}: {node.where} is not an operator of the reference backend; it knows {known}")
    return operator.kernel(soc)
