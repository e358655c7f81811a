"""Makes the self-test: what transformers says in fp32, or the reference backend in fp32, and how far rounding goes."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...artifacts.errors import ArtifactError, TargetError
from ...artifacts.host.process import prepare_process
from ...artifacts.manifest import MOST_OWN_RMS, SELFTEST_SOURCES, Folding, Manifest, OwnError, SelftestPart
from ...artifacts.staging import Staging, amend
from ...artifacts.store import Artifact, ge_part, open_artifact
from ...runtime.backends.base import Backend
from ...runtime.models import config_of
from .compare import Distance, distance
from .file import to_bytes
from .inputs import SelftestInputs, SelftestPictures, make_inputs
from .known import Floats, Known, known_of, whole_outputs
from .observe import KINDS, Call, observe

if TYPE_CHECKING:
    from ..progress import StepProgress
    from ..verify.reference import HfReference

SELFTEST_PATH = "selftest/selftest.safetensors"
TRANSFORMERS, REFERENCE = SELFTEST_SOURCES


@dataclasses.dataclass(frozen=True, eq=False)
class MadeSelftest:
    """A self-test that is not in an artifact yet. own: the reference backend's error, by kind of graph."""

    source: str
    known: Known
    own: dict[str, OwnError]

    def stage(self, staging: Staging) -> SelftestPart:
        """Stage the file; returns the manifest's part, for the caller to commit."""
        return SelftestPart(self.source, **self.own, file=staging.add(SELFTEST_PATH, to_bytes(self.known)))


def make_selftest(path: Path, progress: "StepProgress", *, sync: bool = True) -> Manifest:
    """Put a self-test into the artifact at `path` that the reference backend alone computed, in fp32.

    For models that transformers cannot hold in fp32 here: beside the mapped weights it takes less than 4 GB.
    Raises ArtifactError for an artifact without weights or GE graphs, TargetError for a cache that is too short.
    """
    with amend(path, sync=sync) as (staging, base):
        with open_artifact(path) as artifact:
            made = by_reference(artifact, progress)
        manifest = dataclasses.replace(base, selftest=made.stage(staging))
        staging.commit(manifest)
    return manifest


def by_reference(artifact: Artifact, progress: "StepProgress") -> MadeSelftest:
    """The reference backend's outputs in fp32, and its error in the graphs' dtype."""
    part = ge_part(artifact.manifest, artifact.path)
    inputs = make_inputs(config_of(artifact.manifest), part.max_length)
    prepare_process()
    from ...runtime.backends.reference import ReferenceBackend
    from .wide import WideBackend

    progress("reference in fp32", 0, 2)
    wide = WideBackend(artifact)
    outputs = whole_outputs(observe(wide, config_of(artifact.manifest), inputs, [min(part.batches)]))
    del wide
    progress(f"reference in {part.dtype}", 1, 2)
    # the weights' hashes were checked a moment ago
    made = _measured(artifact, ReferenceBackend(artifact, check_weights=False), REFERENCE, known_of(inputs, outputs))
    progress("done", 2, 2)
    return made


def by_transformers(artifact: Artifact, against: Path) -> MadeSelftest:
    """What transformers computes in fp32 of the checkpoint in the folder `against`, rounded as the artifact's weights
    are, and the error of the reference backend. Raises TargetError for a tiny cache."""
    part, weights = ge_part(artifact.manifest, artifact.path), artifact.manifest.weights
    if weights is None:
        raise ArtifactError(f"{artifact.path}: has no weights; run `qwen2vl-tc convert` first")
    inputs = make_inputs(config_of(artifact.manifest), part.max_length)
    prepare_process()
    from ...runtime.backends.reference import ReferenceBackend
    from ...runtime.dtypes import torch_dtype
    from ..verify.reference import open_reference

    known = known_of(inputs, _originals(open_reference(against, torch_dtype(part.dtype)), inputs, weights.folding))
    return _measured(artifact, ReferenceBackend(artifact, check_weights=False), TRANSFORMERS, known)


def _measured(artifact: Artifact, backend: Backend, source: str, known: Known) -> MadeSelftest:
    part = ge_part(artifact.manifest, artifact.path)
    worst = {kind: Distance(0.0, 0.0) for kind in KINDS}
    for each in observe(backend, config_of(artifact.manifest), known.inputs, [min(part.batches)]):
        worst[each.kind] = worst[each.kind].worse(distance(known, each))
    for kind, error in worst.items():
        if not error.finite:
            raise ArtifactError(
                f"{artifact.path}: {kind}: the reference backend gives numbers that are not finite in {part.dtype}; "
                "build it with --dtype bf16 or fp32"
            )
        if error.rms > MOST_OWN_RMS:
            raise TargetError(
                f"{artifact.path}: {kind}: rounding to {part.dtype} alone moves the reference's outputs by "
                f"{100 * error.rms:.0f} % (RMS), so a self-test would hardly fail, and it has none; build it with "
                "--dtype fp32"
            )
    return MadeSelftest(source, known, {kind: OwnError(error.rms, error.largest) for kind, error in worst.items()})


def _originals(reference: "HfReference", inputs: SelftestInputs, folding: Folding) -> dict[Call, Floats]:
    """transformers' outputs of every call: each script in one pass, without a cache of its own."""
    import torch

    outputs: dict[Call, Floats] = {}
    pixels = [_pixels(call, folding) for call in inputs.visual]
    grids = [torch.from_numpy(call.grids) for call in inputs.visual]
    model = reference.model
    with torch.no_grad():
        for i, (each, grid) in enumerate(zip(pixels, grids, strict=True)):
            outputs[-1, i] = model.model.visual(torch.from_numpy(each), grid_thw=grid).pooler_output.float().numpy()
        for i, script in enumerate(inputs.scripts):
            ids, extra = torch.from_numpy(script.token_ids.copy())[None], {}
            if taken := [place for place in script.visual if place is not None]:
                extra = {
                    "pixel_values": torch.from_numpy(np.concatenate([pixels[place] for place in taken])),
                    "image_grid_thw": torch.cat([grids[place] for place in taken]),
                    "mm_token_type_ids": (ids == model.config.image_token_id).int(),
                }
            # a picture's offset would otherwise be kept for a later request without one
            model.model.rope_deltas = None
            at = torch.tensor(script.read())
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=at, return_dict=True, **extra).logits[0]
            for j, row in enumerate(logits.float().numpy()):
                outputs[i, j] = row[None]
    return outputs


def _pixels(call: SelftestPictures, folding: Folding) -> Floats:
    """What transformers' image processor makes of the patches' bytes: channel by channel, rescaled and normalised."""
    channels = call.patches.reshape(len(call.patches), 3, -1).astype(np.float32) * np.float32(folding.rescale_factor)
    mean, std = (np.array(each, np.float32)[None, :, None] for each in (folding.image_mean, folding.image_std))
    pixels: Floats = ((channels - mean) / std).reshape(call.patches.shape)
    return pixels
