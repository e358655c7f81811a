"""What of an artifact can be verified: its GE graphs, its ONNX models, and what differs between the two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...artifacts.errors import ArtifactError
from ...artifacts.manifest import FileEntry, Graph, Manifest
from ...artifacts.store import Artifact, onnx_part
from ...runtime.backends.base import Backend
from ...runtime.models import config_of, family_of
from ..selftest.inputs import MOST_TOKENS
from .cases import Case


@dataclass(frozen=True)
class Subject:
    """One part of an artifact.

    dtype: what its outputs are judged as. weights_dtype: what transformers' weights are rounded to.
    second_opinion: the dtype in which transformers itself is asked about what is outside the bounds, if any.
    batches: how many requests decode together, each in turn; none for all of them at once.
    graphs: those whose intermediates can be compared. decode: the name of the decode graph of so many rows.
    engines: packages, besides torch and transformers, whose versions the report names.
    """

    dtype: str
    weights_dtype: str
    second_opinion: str | None
    max_length: int
    batches: tuple[int, ...]
    graphs: tuple[Graph, ...]
    decode: Callable[[int], str]
    engines: tuple[str, ...]
    needed_memory: Callable[[Manifest, Sequence[Case], int], int]
    open: Callable[[Artifact], Backend]

    def calls(self, cases: int) -> int:
        """What progress counts: loading both, the original's answers to every case, ours at every batch size."""
        return 2 + cases * (1 + max(1, len(self.batches)))


@dataclass(frozen=True)
class VerifiedPart:
    """A kind of graphs that artifacts have: what is verified of it, and where report and verdict go."""

    subject: Callable[[Artifact], Subject]
    report_path: str
    with_verdict: Callable[[Manifest, str, FileEntry], Manifest]


def ge_subject(artifact: Artifact) -> Subject:
    """The GE graphs. Raises ArtifactError for an artifact without graphs or weights."""
    manifest = artifact.manifest
    if manifest.weights is None or manifest.ge is None:
        missing, command = ("weights", "convert") if manifest.weights is None else ("GE graphs", "compile")
        raise ArtifactError(
            f"{artifact.path}: has no {missing}, so there is nothing to verify; run `qwen2vl-tc {command}` first"
        )
    part = manifest.ge
    return Subject(
        dtype=part.dtype,
        weights_dtype=part.dtype,
        second_opinion=None if part.dtype == "fp32" else part.dtype,
        max_length=part.max_length,
        batches=tuple(sorted(part.batches)),
        graphs=part.graphs,
        decode=lambda rows: f"decode_b{rows}",
        engines=(),
        needed_memory=ge_memory,
        open=_open_graphs,
    )


def onnx_subject(artifact: Artifact) -> Subject:
    """The ONNX models. Raises ArtifactError for an artifact without them."""
    part, weights = onnx_part(artifact.manifest, artifact.path), artifact.manifest.weights
    return Subject(
        dtype=part.weights,
        weights_dtype=weights.dtype if weights else "fp32",
        # whatever is stored, onnxruntime computes in fp32
        second_opinion=None,
        max_length=part.max_length,
        batches=(),
        graphs=(),
        decode=lambda rows: "decode",
        engines=("onnxruntime",),
        needed_memory=onnx_memory,
        open=_open_models,
    )


PARTS = {
    "ge": VerifiedPart(ge_subject, "reports/verify.json", Manifest.with_verdict),
    "onnx": VerifiedPart(onnx_subject, "reports/verify-onnx.json", Manifest.with_onnx_verdict),
}


def parts_of(manifest: Manifest) -> tuple[str, ...]:
    """What there is to verify, by name; of an artifact with nothing, "ge", which says what to do."""
    here = {"ge": manifest.ge is not None or manifest.onnx is None, "onnx": manifest.onnx is not None}
    return tuple(name for name in PARTS if here[name])


def _open_graphs(artifact: Artifact) -> Backend:
    from ...runtime.backends.reference import ReferenceBackend

    return ReferenceBackend(artifact)


def _open_models(artifact: Artifact) -> Backend:
    from ...runtime.backends.onnxruntime import OnnxBackend

    for graph in onnx_part(artifact.manifest, artifact.path).graphs:
        artifact.check(graph.data)
    return OnnxBackend(artifact)


def ge_memory(manifest: Manifest, cases: Sequence[Case], steps: int) -> int:
    """Bytes that both models take together, before anything is loaded.

    transformers: 4 bytes a parameter. Ours: the mapped weights, the largest of them once more as fp32 (the reference
    backend computes half-precision products in fp32) and once rounded. Both: activations of the longest request,
    all kept while intermediates are compared, and the cache's used positions.
    """
    config = config_of(manifest)
    sizes = [weight.size for weight in family_of(config).weights(config)]
    mapped = sum(entry.bytes for entry in manifest.weights.files) if manifest.weights else 0
    text, vision = config.text, config.vision
    tokens = max(max(len(case.prompt.token_ids) for case in cases) + steps, MOST_TOKENS)
    patches = max(len(case.prompt.patches) for case in cases)
    per_token = text.num_layers * (12 * text.hidden_size + 4 * text.intermediate_size + 4 * text.kv_dim)
    per_patch = vision.depth * (14 * vision.embed_dim + 3 * vision.mlp_dim)
    scores = 3 * max(text.num_heads * tokens**2, vision.num_heads * patches**2)
    rows = max(manifest.ge.batches) if manifest.ge else 1
    logits = (len(cases) * (1 + steps) + 2 * rows) * text.vocab_size
    return 4 * sum(sizes) + mapped + 8 * max(sizes) + 8 * (tokens * per_token + patches * per_patch + scores + logits)


def onnx_memory(manifest: Manifest, cases: Sequence[Case], steps: int) -> int:
    """Bytes of both models together: transformers' in fp32, and ours as stored, once mapped and once laid out."""
    config = config_of(manifest)
    values = sum(weight.size for weight in family_of(config).weights(config))
    data = sum(graph.data.bytes for graph in manifest.onnx.graphs) if manifest.onnx else 0
    logits = 2 * len(cases) * (1 + steps) * config.text.vocab_size
    return 4 * (values + logits) + 2 * data
