"""Importing transformers, the measure of correctness, where torch-npu is installed without an NPU."""

import sys
from types import ModuleType

from ...artifacts.errors import MissingDependencyError
from ...artifacts.host.process import npu_usable, prepare_process


def import_transformers() -> ModuleType:
    """Import transformers such that it neither imports torch-npu nor takes its emulated device for an NPU.

    transformers asks once whether torch-npu is installed, imports it to find out more, and keeps the answer: without
    CANN that import fails, and with the emulated device loaded it would choose NPU code paths for CPU tensors. So the
    question is asked here, while torch-npu looks absent, and the answer stays. Where a real NPU is usable, transformers
    may see it.

    Raises MissingDependencyError when transformers is not installed.
    """
    prepare_process()
    try:
        import transformers
        from transformers.utils import import_utils
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"comparing with the original model needs transformers ({error}); pip install 'qwen2vl-tc[compile]'"
        ) from error
    if not npu_usable():
        _answer_no(import_utils)
    return transformers


def _answer_no(import_utils: ModuleType) -> None:
    """Fill the cache of `is_torch_npu_available` with False, for each of the ways in which transformers calls it."""
    probe = import_utils.is_torch_npu_available
    probe.cache_clear()
    absent = object()
    loaded = sys.modules.get("torch_npu", absent)
    # None in sys.modules is how Python marks a module that must not be found; find_spec honours it
    sys.modules["torch_npu"] = None  # type: ignore[assignment]
    try:
        probe()
        probe(True)
        probe(False)
        probe(check_device=True)
        probe(check_device=False)
    finally:
        if loaded is absent:
            del sys.modules["torch_npu"]
        else:
            sys.modules["torch_npu"] = loaded  # type: ignore[assignment]
