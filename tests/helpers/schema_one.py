"""The artifact of schema 1 that stays here as it was built, and what it has answered ever since."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

ARCHIVE = Path(__file__).parents[1] / "data" / "schema-1.zip"
_ROWS, _COLUMNS = np.mgrid[0:56, 0:84]
PICTURE = np.stack([_ROWS * 3 % 256, _COLUMNS * 2 % 256, (_ROWS + _COLUMNS) % 256], -1).astype(np.uint8)
# a conversation, its pictures, and the first tokens of the answer
REQUESTS: tuple[tuple[list[dict[str, Any]], list[Any], tuple[int, ...]], ...] = (
    (
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
        [PICTURE],
        (227, 211, 35, 115, 128, 189, 188, 316, 293, 224, 146, 62),
    ),
    (
        [{"role": "user", "content": "Say something."}],
        [],
        (134, 66, 168, 150, 268, 64, 58, 68, 109, 228, 127, 227),
    ),
)


def unpack(folder: Path) -> Path:
    """The artifact, as plain files in `folder`."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder
