"""Artifacts with ONNX models and no other graphs."""

import dataclasses
import shutil
from pathlib import Path

from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.toolchain.build.onnx import OnnxOptions, export_onnx
from qwen2vl_tc.toolchain.demo import CHECKPOINT
from qwen2vl_tc.toolchain.weights.convert import convert


def onnx_artifact(folder: Path) -> Path:
    """The demo model's weights in int8, written to `folder`."""
    convert(CHECKPOINT, folder, None, sync=False)
    export_onnx(folder, OnnxOptions("int8", False, 256), sync=False)
    return folder


def exported(traced: Path, out: Path, options: OnnxOptions) -> Path:
    """A copy of an artifact with ONNX models for the GE graphs that it has: as if they had been traced for these."""
    shutil.copytree(traced, out)
    export_onnx(out, options, sync=False)
    shutil.rmtree(out / "graphs/ge")
    manifest = dataclasses.replace(read_manifest(out), ge=None)
    (out / "manifest.json").write_bytes(manifest.to_bytes())
    return out
