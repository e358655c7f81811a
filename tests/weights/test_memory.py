"""Conversion streams: its anonymous memory does not grow with the model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.synthetic import published, write_checkpoint

LIMIT_BYTES = 1_500_000_000
MEASURED = """
import sys
from pathlib import Path
from qwen2vl_tc.toolchain.weights.convert import convert

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before = anonymous()
peak = before
def sample(done, total):
    global peak
    peak = max(peak, anonymous())

convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sync=False, progress=sample)
print(peak - before)
"""


def peak_bytes(source: Path, out: Path, dtype: str) -> int:
    """The most anonymous memory that a conversion holds above what its process has after imports."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(out), dtype], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_72b_widths_stay_under_the_limit_copied_and_cast(tmp_path: Path, dtype: str) -> None:
    config = {**published("72b"), "num_hidden_layers": 2}
    config["vision_config"]["depth"] = 2
    source = write_checkpoint(tmp_path / "hf", config, shards=3, tokenizer=True, zeros=True)
    peak = peak_bytes(source, tmp_path / "out", dtype)
    written = sum(path.stat().st_size for path in (tmp_path / "out" / "weights").iterdir())
    shutil.rmtree(tmp_path / "out")  # pytest keeps the folders of the last runs
    assert written > 8_000_000_000
    assert peak < LIMIT_BYTES
    # far below: no tensor is ever held whole, and the embedding alone has 2.5 GB
    assert peak < 200_000_000
