"""A tiny Qwen2-VL that has learned to describe pictures of coloured shapes; scripts/demo_model remakes it."""

from pathlib import Path

# in the form that Hugging Face publishes
CHECKPOINT = Path(__file__).parent / "checkpoint"
