"""What CANN's releases ask of an operator: rules as data, each with the source that says so.

A condition is a small prefix expression over the facts of a node; `toolchain.check.predicate` has its language and
`toolchain.check.facts` the facts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...artifacts.cann import RELEASES

# refused: the release does not take the node. crash: the host process may end. wrong: taken, with a result that may be
# wrong. unproven: no source says that it is taken, and evidence may. All of these keep a release from being admitted.
# Two more do not. undocumented: the code takes it, the documentation does not say so. cost: one that can be avoided.
BLOCKING = ("refused", "crash", "wrong", "unproven")


@dataclass(frozen=True)
class Source:
    """Where a rule was read."""

    repository: str
    ref: str
    path: str


@dataclass(frozen=True)
class Rule:
    """What `releases` ask of an operator: wherever `applies` holds, `require` must. inserts: the operator that CANN
    adds for each node that violates it."""

    id: str
    rule: str
    require: Any
    fix: str
    source: Source
    applies: Any = "(true)"
    releases: tuple[str, ...] = RELEASES
    severity: str = "refused"
    inserts: str | None = None

    @property
    def lists(self) -> bool:
        """Whether it says with which dtypes the operator is in the releases' library."""
        return isinstance(self.require, tuple) and self.require[0] == "row"


def since(release: str) -> tuple[str, ...]:
    """The release and all after it."""
    return RELEASES[RELEASES.index(release) :]


def until(release: str) -> tuple[str, ...]:
    """The release and all before it."""
    return RELEASES[: RELEASES.index(release) + 1]


def transformer(ref: str, path: str) -> Source:
    return Source("cannmirror/ops-transformer", ref, path)


def nn(ref: str, path: str) -> Source:
    return Source("hicann/ops-nn", ref, path)


def math(ref: str, path: str) -> Source:
    return Source("hicann/ops-math", ref, path)


def ge(ref: str, path: str) -> Source:
    return Source("hicann/ge", ref, path)


def cann_8_1(path: str) -> Source:
    """A file of the operators that CANN 8.1 is shipped with."""
    return Source("leideng/CANN-8.1.RC1", "551ed27c", f"Ascend/ascend-toolkit/8.1.RC1/opp/built-in/{path}")


LIBRARY = cann_8_1("op_impl/ai_core/tbe/config/ascend910b/aic-ascend910b-ops-info.json")
_INDICES = ("int32", "int64")
_IN_LIBRARY = "is in the library of 8.1 and of 9.1 with these dtypes alike, and so in those between"
_HAS_KERNELS = (
    "has kernels of these dtypes in 8.1, its entry of 9.1 is the same, and so it is taken as in those between"
)


def listed(op: str, tensors: str, rows: Iterable[str], source: Source = LIBRARY, said: str = _IN_LIBRARY) -> Rule:
    """The dtypes that go together, a row each: of the inputs named in `tensors`, then of the outputs 0, 1, ..."""
    names = tensors.split()
    facts = [f"out.{name}.dtype" if name.isdigit() else f"in.{name}.dtype" for name in names]
    shown = ", ".join(f"output {name}" if name.isdigit() else name for name in names)
    fix = "feed dtypes that are listed together"
    require = ("row", facts, list(rows))
    return Rule(f"LIB-{op}", f"{op} {said}: {shown}", require, fix, source, releases=since("8.1"))


def built(op: str, file: str, tensors: str, rows: Iterable[str]) -> Rule:
    """As `listed`, of an operator whose kernels are built for each row."""
    source = cann_8_1(f"op_impl/ai_core/tbe/kernel/config/ascend910b/{file}.json")
    return listed(op, tensors, rows, source, _HAS_KERNELS)


def rows(pattern: str, dtypes: str) -> list[str]:
    """`pattern` for each of `dtypes` in place of T, with int32 or int64 for every I."""
    made = []
    for dtype in dtypes.split():
        words = [(dtype,) if word == "T" else _INDICES if word == "I" else (word,) for word in pattern.split()]
        made += [" ".join(row) for row in product(*words)]
    return made
