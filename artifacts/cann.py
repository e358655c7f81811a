"""CANN's releases, as the rules name them and as CANN reports them."""

import re

# The releases that the rules of `check` speak of, oldest first. Release candidates count as their release.
RELEASES = ("8.0", "8.1", "8.2", "8.3", "8.5", "9.0", "9.1")
_VERSION = re.compile(r"\D*?(\d+)\.(\d+)(?!\d).*", re.DOTALL)


class CannWarning(UserWarning):
    """Said of a CANN that is newer than the rules: the graphs may run, and nothing is known."""


def cann_release(version: str) -> str | None:
    """The release of a version: 9.0 of "9.0.0", "9.0.RC1" and "V9.0.0-beta.2"; None of what has no such number."""
    match = _VERSION.fullmatch(version.strip())
    return f"{int(match[1])}.{int(match[2])}" if match else None


def is_newer(release: str) -> bool:
    """Whether a release, such as "9.2", is past all that the rules speak of."""
    return _numbers(release) > _numbers(RELEASES[-1])


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
