"""--execute-mode and EXE_MODE: whether an artifact's compiled graphs run, or the modules they were traced from."""

import importlib.util
import os
from typing import TYPE_CHECKING

from ...artifacts.errors import MissingDependencyError, TargetError

if TYPE_CHECKING:
    from ...artifacts.store import Artifact
    from ...runtime.backends.base import Backend
    from ...runtime.loader import BackendChoice, EngineMaker

EXECUTE_MODES = ("dynamo", "eager")
VARIABLE = "EXE_MODE"
# where the modules can run; nothing else has kernels for their operators
_PLACES = ("reference", "npu")


def engine(mode: str | None = None, backend: str | None = None) -> "BackendChoice":
    """What `load` takes as its backend. mode: "dynamo" (the compiled graphs), "eager"; None: EXE_MODE's, or dynamo.

    backend: as load's; eager runs where "npu" or "reference" (the CPU) would, the best of them by default.
    Raises TargetError for another mode, and for eager with another backend.
    """
    given = mode if mode is not None else os.environ.get(VARIABLE) or EXECUTE_MODES[0]
    if given not in EXECUTE_MODES:
        source = f"--execute-mode {given}" if mode is not None else f"{VARIABLE}={given}"
        raise TargetError(f"{source}: expected one of {', '.join(EXECUTE_MODES)}")
    if given == "dynamo":
        return backend
    if backend not in (None, *_PLACES):
        raise TargetError(f"--execute-mode eager runs on --backend {' or '.join(_PLACES)}, not {backend}")
    return _eager(backend)


def _eager(backend: str | None) -> "EngineMaker":
    def make(artifact: "Artifact") -> "Backend":
        if importlib.util.find_spec("torch") is None:
            raise MissingDependencyError("--execute-mode eager needs torch; pip install 'qwen2vl-tc[reference]'")
        from ...runtime.loader import best_here
        from ..eager.eager import eager_on

        return eager_on(artifact, backend or best_here()[0])

    return make
