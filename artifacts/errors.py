"""The errors a user can cause. The command line prints them as one line and exits with 2; nothing else is caught."""


class ToolchainError(Exception):
    """Base of every error that is the input's or the machine's fault, not a bug of ours.

    The message says what, where, got, expected, and what to do.
    """


class ConfigError(ToolchainError):
    """config.json is not a model that this toolchain supports."""


class WeightError(ToolchainError):
    """A checkpoint's tensors are missing, unused, duplicated, wrongly shaped or truncated."""


class ArtifactError(ToolchainError):
    """An artifact is absent, incomplete, altered, or of another schema."""


class TargetError(ToolchainError):
    """What was asked does not fit this machine, this device or this artifact's target."""


class RequestError(ToolchainError):
    """A generation request that the loaded model cannot serve."""


class MissingDependencyError(ToolchainError):
    """An optional package or tool is not installed; the message says how to get it."""
