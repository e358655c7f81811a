"""How sizes, command lines and questions are written, wherever they are."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def format_bytes(count: int) -> str:
    """Decimal units, as the manifests' and the vendors' numbers are."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def command(*words: "str | int | Path") -> str:
    """A command line that can be copied into a shell."""
    return shlex.join(str(word) for word in words)


def question(
    text: str, images: Iterable[str] = (), videos: Iterable[str] = (), system: str | None = None
) -> list[dict[str, Any]]:
    """One question as the messages that the runtime takes: pictures first, as the model was trained."""
    pictures = [*(("image", path) for path in images), *(("video", path) for path in videos)]
    content = [*({"type": kind, kind: path} for kind, path in pictures), {"type": "text", "text": text}]
    asked = {"role": "user", "content": content}
    return [asked] if system is None else [{"role": "system", "content": system}, asked]
