"""The self-test's making: by verify from transformers, by --make from the reference in fp32; and its file."""

import dataclasses
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from helpers.altered import tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_tc.artifacts.config import model_config_from_hf
from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError
from qwen2vl_tc.artifacts.manifest import OwnError
from qwen2vl_tc.artifacts.safetensors import header_bytes
from qwen2vl_tc.artifacts.store import open_artifact, read_manifest
from qwen2vl_tc.toolchain.hf_reference import open_reference
from qwen2vl_tc.toolchain.selftest import wide
from qwen2vl_tc.toolchain.selftest.compare import FLOOR, distance, limit_of
from qwen2vl_tc.toolchain.selftest.file import from_bytes, to_bytes
from qwen2vl_tc.toolchain.selftest.inputs import make_inputs
from qwen2vl_tc.toolchain.selftest.known import known_of, whole_outputs
from qwen2vl_tc.toolchain.selftest.make import by_reference, by_transformers, make_selftest
from qwen2vl_tc.toolchain.selftest.observe import KINDS, Observed, observe
from qwen2vl_tc.toolchain.synthetic import published, tiny_config

from .conftest import TINY, Run

CONFIG = model_config_from_hf(TINY)
