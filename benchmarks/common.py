"""Checkpoints with random weights, for benchmarks: those that the tests use."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.synthetic import published, published_2_5, tiny_config, write_checkpoint

__all__ = ["SHAPES", "published", "tiny_config", "write_checkpoint"]

# config.json of each family's published sizes
SHAPES = {"qwen2_vl": published, "qwen2_5_vl": published_2_5}
