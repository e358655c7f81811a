"""Artifacts of released schemas that stay here as they were built, and what they have answered ever since."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_DATA = Path(__file__).parents[1] / "data"
_ROWS, _COLUMNS = np.mgrid[0:56, 0:84]
PICTURE = np.stack([_ROWS * 3 % 256, _COLUMNS * 2 % 256, (_ROWS + _COLUMNS) % 256], -1).astype(np.uint8)
# conversations, and their pictures
_QUESTIONS: tuple[tuple[list[dict[str, Any]], list[Any]], ...] = (
    ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}], [PICTURE]),
    ([{"role": "user", "content": "Say something."}], []),
)
# The first tokens of each answer. Schema 1 is fp32 with decode graphs of 1 and 2 rows; 2 is bf16, biases included.
ANSWERS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: (
        (227, 211, 35, 115, 128, 189, 188, 316, 293, 224, 146, 62),
        (134, 66, 168, 150, 268, 64, 58, 68, 109, 228, 127, 227),
    ),
    2: (
        (316, 87, 90, 93, 90, 93, 90, 297, 20, 104, 193, 274),
        (193, 258, 184, 119, 259, 266, 189, 34, 43, 227, 254, 244),
    ),
}
# conversation, pictures, and the first tokens of schema 1's answer
REQUESTS = tuple((*question, answer) for question, answer in zip(_QUESTIONS, ANSWERS[1], strict=True))


def requests(schema: int) -> list[tuple[list[dict[str, Any]], list[Any], tuple[int, ...]]]:
    """As REQUESTS, of any schema."""
    return [(*question, answer) for question, answer in zip(_QUESTIONS, ANSWERS[schema], strict=True)]


def unpack(folder: Path, schema: int | str = 1) -> Path:
    """The artifact, as plain files in `folder`. "3-onnx" has the int8 ONNX models of schema 2's weights alone."""
    with zipfile.ZipFile(_DATA / f"schema-{schema}.zip") as archive:
        archive.extractall(folder)
    return folder
