"""A small artifact with ONNX models: the demo model's weights in int8."""

from pathlib import Path

from qwen2vl_tc.toolchain.build.onnx import OnnxOptions, export_onnx
from qwen2vl_tc.toolchain.demo import CHECKPOINT
from qwen2vl_tc.toolchain.weights.convert import convert


def onnx_artifact(folder: Path) -> Path:
    """Written to `folder`; needs neither torch nor transformers."""
    convert(CHECKPOINT, folder, None, sync=False)
    export_onnx(folder, OnnxOptions("int8", False, 256), sync=False)
    return folder
