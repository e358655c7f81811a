"""An artifact that is written into the current folder: what is said of it holds in the shell that stands there."""

import subprocess
import sys
from pathlib import Path

from qwen2vl_tc.artifacts.store import read_manifest

SCRIPT = Path(sys.executable).parent / "qwen2vl-tc"


def in_bash(folder: Path, script: str) -> "subprocess.CompletedProcess[str]":
    words = ["bash", "-c", script, SCRIPT]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)


def test_after_converting_into_it_the_shell_follows_as_it_is_told(checkpoint: Path, tmp_path: Path) -> None:
    done = in_bash(tmp_path, f"mkdir h; cd h; $0 convert --src '{checkpoint}' --out . --no-sync")
    assert done.returncode == 0
    assert f"warning: {tmp_path}/h: the current folder was replaced; in a shell, `cd .`" in done.stderr
    assert read_manifest(tmp_path / "h").weights is not None
    again = f"cd h; $0 convert --src '{checkpoint}' --out . --no-sync"
    followed = in_bash(tmp_path, f"{again}; cd .; $0 inspect . --json")
    assert followed.returncode == 0
    assert '"weights"' in followed.stdout
    stayed = in_bash(tmp_path, f"{again} 2>/dev/null >/dev/null; $0 inspect . --json")
    assert stayed.returncode == 2
    assert stayed.stdout == ""
    (line,) = (line for line in stayed.stderr.splitlines() if "shell-init" not in line)
    assert line.startswith("error: the current folder is deleted; `cd .` goes to the one that took its place")
