"""Checkpoints with random weights, for benchmarks: those that the tests use."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.synthetic import published, tiny_config, write_checkpoint

__all__ = ["published", "tiny_config", "write_checkpoint"]
