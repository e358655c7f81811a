"""Names of SoCs, and which of them run the same kernels."""

DEFAULT_SOC = "Ascend910B2"
_FAMILIES = {
    "Ascend910B": "Ascend910B",
    "Ascend910_93": "Ascend910_93",
    # the name that Ascend950 had before it was sold
    "Ascend910_95": "Ascend950",
    "Ascend950": "Ascend950",
    "Ascend310P": "Ascend310P",
    "Ascend310B": "Ascend310B",
}


def soc_family(soc: str) -> str:
    """Ascend910B2 and Ascend910B4 run the same kernels; Ascend910_9382 and Ascend310P3 do not."""
    return next((family for start, family in _FAMILIES.items() if soc.startswith(start)), soc)
