"""A warning of ours is one line of the command line; what others warn of stays as Python shows it."""

import warnings
from typing import Any

import pytest

from qwen2vl_tc.artifacts.cann import CannWarning
from qwen2vl_tc.toolchain.cli import locate


@pytest.mark.parametrize("category", [CannWarning, UserWarning])
def test_our_warning_is_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, category: type[Warning], tmp_path: Any
) -> None:
    def find(folder: Any) -> Any:
        warnings.warn("newer than the rules", category, stacklevel=1)
        return tmp_path

    shown: list[str] = []
    monkeypatch.setattr(locate, "find_artifact", find)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # pytest records warnings instead of showing them
        monkeypatch.setattr(warnings, "showwarning", lambda message, *where, **more: shown.append(str(message)))
        result = run("check")
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: newer")]
    assert len(lines) == (category is CannWarning)
    assert bool(shown) == (category is not CannWarning)
