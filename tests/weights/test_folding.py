"""Folded normalisation costs no accuracy, on the pixels that pictures have."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_tc.artifacts.manifest import Folding
from qwen2vl_tc.runtime.pictures.patches import image_patches
from qwen2vl_tc.runtime.pictures.vision import ImageSettings
from qwen2vl_tc.toolchain.verify.hf_processor import default_image_processor
from qwen2vl_tc.toolchain.weights.folding import fold_bias, fold_weight

CLIP = Folding(1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SETTINGS = ImageSettings(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2)
WIDTH = 320


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (280, 392, 3), dtype=np.uint8)


def photograph() -> np.ndarray:
    """Smooth areas, edges, a little noise: a spectrum that falls, as that of photographs does."""
    rng = np.random.default_rng(1)
    layers = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((392, 280), 2)) / n**0.5
        for n in (3, 9, 27, 81)
    ]
    mixed = sum(layers) / sum(1 / n**0.5 for n in (3, 9, 27, 81))
    mixed[100:180, 120:260] = (30, 90, 200)
    return np.clip(mixed + rng.normal(0, 2, mixed.shape), 0, 255).astype(np.uint8)


def smooth_grey() -> np.ndarray:
    ramp = np.linspace(110, 130, 280 * 392).reshape(280, 392, 1)
    return np.repeat(ramp, 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize("draw", [noise, photograph, smooth_grey], ids=lambda f: f.__name__)
def test_bf16_patch_embeddings_of_folded_pixels_are_as_exact_as_those_of_normalised_ones(draw) -> None:
    """The error against fp64 on the checkpoint's own bf16 kernel, with transformers' pixels as the unfolded side.

    1.2: the operator's bound. Folding rounds W / std once more, but no pixel: integers to 255 are exact in bf16.
    """
    picture = Image.fromarray(draw())
    kernel = torch.randn(WIDTH, 3, 2, 14, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.02
    kernel = kernel.to(torch.bfloat16).double()
    theirs = default_image_processor(min_pixels=SETTINGS.min_pixels, max_pixels=SETTINGS.max_pixels)
    normalised = torch.from_numpy(np.array(theirs(picture, return_tensors="np")["pixel_values"]))
    patches = torch.from_numpy(image_patches(picture, SETTINGS)[0])
    scale = torch.tensor(CLIP.image_std, dtype=torch.float64).repeat_interleave(2 * 14 * 14)
    mean = torch.tensor(CLIP.image_mean, dtype=torch.float64).repeat_interleave(2 * 14 * 14)
    exact = ((patches.double() * CLIP.rescale_factor - mean) / scale) @ kernel.flatten(1).T

    # products of bf16 summed in fp32 and rounded once, as matrix units do
    unfolded = normalised.to(torch.bfloat16).float() @ kernel.flatten(1).float().T
    weight = fold_weight(kernel.numpy(), CLIP, np.dtype(np.float32))
    weight = torch.from_numpy(weight).to(torch.bfloat16).float()
    bias = torch.from_numpy(fold_bias(weight.numpy(), CLIP, 3))
    folded = patches.to(torch.bfloat16).float() @ weight.T + bias

    def error(made: torch.Tensor) -> float:
        return float((made.to(torch.bfloat16).double() - exact).square().mean().sqrt())

    assert patches.to(torch.bfloat16).to(torch.uint8).equal(patches)
    print(f"{draw.__name__}: {error(folded) / error(unfolded):.2f} times the unfolded error")
    assert error(folded) <= 1.2 * error(unfolded)
