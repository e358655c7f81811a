"""Compile Qwen2-VL and Qwen2.5-VL for Ascend NPUs, ahead of time: .toolchain, .exporters, .runtime and .artifacts.

This folder is the root of the import package; setuptools maps the four folders beside it into it.
"""

# of the installed package, looked up when it is asked for: reading its metadata takes longer than all of this import
__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("qwen2vl-tc")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
