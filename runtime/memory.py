"""How much device memory an artifact takes, from its manifest alone."""

from dataclasses import dataclass

from ..artifacts.dtypes import DTYPES
from ..artifacts.errors import TargetError
from ..artifacts.manifest import GePart, Manifest
from .models import config_of, family_of

# High-bandwidth memory of one device, by prefix of the SoC name (Huawei's product pages); others are not known here.
_DEVICE_BYTES = {
    "Ascend910B4": 32 << 30,
    "Ascend910B": 64 << 30,
    "Ascend910_93": 64 << 30,
}
# Share of the memory that CANN, the graphs' workspaces and activations leave to weights and cache.
_USABLE = 0.9


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device: all weights, and the KV cache of the largest compiled batch."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def device_memory(manifest: Manifest, part: GePart) -> DeviceMemory:
    """What the graphs of `part` need on one device."""
    return memory_for(manifest, part.dtype, part.max_length, part.batches)


def memory_for(manifest: Manifest, dtype: str, max_length: int, batches: tuple[int, ...]) -> DeviceMemory:
    """What graphs compiled for these need on one device."""
    item, config = DTYPES[dtype].bytes, config_of(manifest)
    weights = sum(each.size * DTYPES[each.dtype(dtype)].bytes for each in family_of(config).weights(config))
    text = config.text
    cache = text.num_layers * 2 * max_length * text.kv_dim * item * max(batches)
    return DeviceMemory(weights, cache)


def soc_memory(soc: str) -> int | None:
    """Bytes of memory of one device of this SoC; None where it is not known."""
    fitting = [prefix for prefix in _DEVICE_BYTES if soc.startswith(prefix)]
    return _DEVICE_BYTES[max(fitting, key=len)] if fitting else None


def check_free(manifest: Manifest, part: GePart, free: int) -> None:
    """Raises TargetError if a device that could hold the model has too much of its memory taken."""
    needed = device_memory(manifest, part)
    if needed.total > free:
        room = _fitting_length(needed, part, free)
        raise TargetError(
            f"{manifest.name} needs {needed.total / 1e9:.1f} GB of device memory, {free / 1e9:.1f} GB are free; "
            "stop what else uses the NPU" + (f", or compile with --max-length {room}" if room else "")
        )


def check_fits(manifest: Manifest, part: GePart, available: int) -> None:
    """Raises TargetError, with what is needed and what would fit, if one device cannot hold the model."""
    needed = device_memory(manifest, part)
    usable = int(available * _USABLE)
    if needed.total <= usable:
        return
    room = _fitting_length(needed, part, usable)
    if room:
        advice = f"compile with --max-length {room} or a smaller --batch"
    else:
        ranks, share = _divided(manifest, part.dtype, usable)
        advice = (
            f"its weights alone do not fit one device; divided among {ranks} they would take {share / 1e9:.1f} GB of "
            "each, and this version does not divide a model"
        )
    raise TargetError(
        f"{manifest.name} needs {needed.total / 1e9:.1f} GB of device memory (weights {needed.weights / 1e9:.1f}, "
        f"KV cache {needed.cache / 1e9:.1f}); one {part.soc} leaves {usable / 1e9:.1f} GB: {advice}"
    )


def _divided(manifest: Manifest, dtype: str, available: int) -> tuple[int, int]:
    """The fewest devices, a power of two, on which the weights fit, and the bytes that each would hold."""
    config = config_of(manifest)
    weights = [(each, DTYPES[each.dtype(dtype)].bytes) for each in family_of(config).weights(config)]
    ranks, share = 1, available + 1
    # what is not divided is on every one
    while share > available and ranks < 64:
        ranks *= 2
        share = sum(weight.bytes_on(ranks, item) for weight, item in weights)
    return ranks, share


def _fitting_length(needed: DeviceMemory, part: GePart, available: int) -> int:
    """The longest cache that fits beside the weights; 0 where there is no room for one that can be compiled."""
    room = (available - needed.weights) // (needed.cache // part.max_length)
    return room if room >= 2 else 0
