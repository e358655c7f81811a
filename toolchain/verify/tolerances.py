"""How much error is right for each dtype and each kind of quantized weights, and what that was measured on."""

import math
from dataclasses import dataclass

_STD_OF_MAX_ERROR = 5.0


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What a comparison may show; None is not limited.

    max_error: absolute, for a reference whose standard deviation is up to 5; in proportion above that, as logits of
    real models have a deviation of up to 30 and fp32 rounds relative to the size. The others are relative to the
    standard deviation of the reference: relative_max its largest error, relative_rms the root of its mean square.
    """

    max_error: float | None = None
    relative_max: float | None = None
    relative_rms: float | None = None
    cosine: float | None = None
    reason: str
    # of next-token distributions over the whole report: the mean divergence in nats, the share of equal first choices
    kl: float | None = None
    top1: float | None = None

    def limit(self, std: float) -> float:
        """The largest absolute error allowed beside a reference of this standard deviation."""
        limits = []
        if self.max_error is not None:
            limits.append(self.max_error * max(1.0, std / _STD_OF_MAX_ERROR))
        if self.relative_max is not None:
            limits.append(self.relative_max * std)
        return min(limits, default=math.inf)


TOLERANCES = {
    "fp32": Tolerance(
        max_error=1e-4,
        reason="the same fp32 arithmetic in another order differs by some 1e-5 of logits; a wrong operator by 1e-2",
    ),
    # Measured on random models of 2 to 28 layers, widths 64 to 1536, vision depth 2 to 32: relative RMS 0.006 to 0.019,
    # relative_max up to 0.08; transformers itself computing in bf16 gives 0.006 to 0.020 and 0.09. Two swapped rows
    # give 0.06 to 0.4 at width 64; what is wrong by less than these bounds is left to the intermediates.
    "bf16": Tolerance(
        relative_max=0.15,
        relative_rms=0.03,
        cosine=0.999,
        reason="bf16 keeps 8 bits: transformers in bf16 is itself 0.6 to 2 % (RMS) from fp32, growing with depth",
    ),
    # 3 bits more, measured likewise: relative RMS 0.0007 to 0.0025, relative_max up to 0.010
    "fp16": Tolerance(
        relative_max=0.02,
        relative_rms=0.004,
        cosine=0.99998,
        reason="fp16 keeps 11 bits: transformers in fp16 is itself 0.07 to 0.3 % (RMS) from fp32, growing with depth",
    ),
}
# The kinds of quantized weights of ONNX models. What binds is the divergence and the first choices: of a model of
# random weights, whose first choices are often close, 0.003 (int8) and 0.13 nats (int4); of the trained demo model
# 0.0004 and 0.005, all first choices equal. A single step's logits may lie close together and then move far beside
# their spread, without another distribution: of the demo model by up to 8 and 47 % (RMS). Those limits are for what is
# grossly wrong.
TOLERANCES |= {
    "int8": Tolerance(
        relative_max=0.8,
        relative_rms=0.15,
        cosine=0.99,
        kl=0.02,
        top1=0.9,
        reason="8 bits of weights and of activations move logits by 1 to 8 % (RMS), and hardly their order",
    ),
    "int4": Tolerance(
        relative_max=2.0,
        relative_rms=0.75,
        cosine=0.85,
        kl=0.3,
        top1=0.6,
        reason="rounded to 4 bits, weights move logits by 10 to 50 % (RMS); of random weights also first choices",
    ),
}
_INT8_VISUAL = Tolerance(
    relative_max=0.5,
    relative_rms=0.05,
    cosine=0.998,
    reason="8 bits of weights and of activations move embeddings by 1 to 3 % (RMS)",
)
# Of the visual output, where the language model's limits are not its own: the vision tower is int8 in both.
_VISUAL_TOLERANCES = {"int8": _INT8_VISUAL, "int4": _INT8_VISUAL}


def output_tolerance(graph: str, dtype: str) -> Tolerance:
    """What an output of this graph may show, by the dtype or kind of weights that computed it."""
    allowed = TOLERANCES[dtype]
    return _VISUAL_TOLERANCES.get(dtype, allowed) if graph == "visual" else allowed


# Outside these bounds transformers computing in the artifact's dtype has the last word, for models whose activations
# round worse than those that were measured: up to this many times its own error passes.
OF_ORIGINAL = 1.5
# Intermediates in half precision: this many times the error of transformers computing in the same dtype departs. Right
# ones showed up to 1.7 times its RMS and 2.3 times its largest error; two swapped rows 12 times and more.
INTERMEDIATE_OF_ORIGINAL = 4.0
