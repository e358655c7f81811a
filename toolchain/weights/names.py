"""How checkpoints name their tensors, and what else they store."""

# as it is stored, and under what published checkpoints had it: transformers from 4.52 on, and trainers that save the
# decoder as a model of its own
_PREFIXES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def legacy_name(stored: str) -> str:
    """The name under which published checkpoints store it."""
    for prefix, legacy in _PREFIXES:
        if stored.startswith(prefix):
            return legacy + stored.removeprefix(prefix)
    return stored


def new_name(legacy: str) -> str:
    """The inverse of `legacy_name` for checkpoints with the new names."""
    if legacy.startswith("visual."):
        return f"model.{legacy}"
    if legacy.startswith("model."):
        return "model.language_model." + legacy.removeprefix("model.")
    return legacy


def is_recomputed(name: str) -> bool:
    """Buffers that old checkpoints store and every implementation computes from config.json: rotary frequencies."""
    return name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"))


def is_quantized(name: str) -> bool:
    """Tensors of GPTQ, AWQ and compressed checkpoints."""
    return name.endswith((".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_packed"))
