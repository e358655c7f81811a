"""Messages as Qwen's users write them: checked, and their pictures and clips listed in order."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ...artifacts.errors import RequestError
from ..pictures.frames import FrameRequest
from ..pictures.images import ImageSource
from ..pictures.patches import Kind
from ..pictures.request import VideoSource, VisionItem
from ..pictures.resize import SizeRequest
from ..pictures.sources import describe

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_EXPECTED = '{"type": "text", "text": ...}, {"type": "image", "image": ...} or {"type": "video", "video": ...}'
_SOURCE_KEYS: dict[str, tuple[str, ...]] = {
    "image": ("image", "url", "path"),
    "image_url": ("image_url",),
    "video": ("video",),
}
_SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_FRAME_KEYS = tuple(each.name for each in fields(FrameRequest))
# what qwen-vl-utils takes for a list of frames: the rate of the video that they were sampled from
_IGNORED_KEYS = ("raw_fps",)
# OpenAI's hint to its own models
_IGNORED_URL_KEYS = ("detail",)
_KEYS: dict[str, tuple[str, ...]] = {
    "image": _SIZE_KEYS,
    "image_url": _SIZE_KEYS,
    "video": (*_SIZE_KEYS, "total_pixels", *_FRAME_KEYS, *_IGNORED_KEYS),
}


def given_items(kind: Kind, sources: Sequence[Any]) -> list[VisionItem]:
    """The items of prepare's images=[...] or videos=[...]. Raises RequestError when that is no list."""
    if isinstance(sources, str | bytes) or not isinstance(sources, Sequence):
        raise RequestError(f"{kind}s: got {type(sources).__name__}, expected a list")
    return [VisionItem(kind, source, f"{kind}s[{i}]") for i, source in enumerate(sources)]


def vision_items(
    messages: Sequence[Message],
    images: Sequence[ImageSource],
    videos: Sequence[VideoSource],
    placeholders: Mapping[str, Kind],
) -> list[VisionItem]:
    """Check the messages and list their pictures and clips, filled up from `images` and `videos`.

    `placeholders` are the tokens that no text may contain. Raises RequestError naming the message and item.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise RequestError('messages: expected a non-empty list of {"role": ..., "content": ...}')
    spare = {"image": iter(given_items("image", images)), "video": iter(given_items("video", videos))}
    items = []
    for i, message in enumerate(messages):
        for item in _message_items(message, f"messages[{i}]", placeholders):
            filled = next(spare[item.kind], None) if item.source is None else item
            if filled is None:
                raise RequestError(f'{item.where}: has no "{item.kind}"; add it, or pass {item.kind}s=[...]')
            items.append(replace(item, source=filled.source))
    for left in (*spare["image"], *spare["video"]):
        raise RequestError(f"{left.where}: has no place in the messages; add an item of type {left.kind!r}")
    return items


def without_sources(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as the chat template sees them: that there is a picture, but not its data."""

    def hidden(part: Any) -> Any:
        keys = _SOURCE_KEYS.get(part.get("type"), ())
        return {key: f"<{part['type']}>" if key in keys else value for key, value in part.items()}

    return [
        {
            "role": message["role"],
            "content": message["content"]
            if isinstance(message["content"], str)
            else [hidden(part) for part in message["content"]],
        }
        for message in messages
    ]


def _message_items(message: Message, where: str, placeholders: Mapping[str, Kind]) -> Iterator[VisionItem]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise RequestError(f'{where}: got {_shape_of(message)}, expected {{"role": ..., "content": ...}}')
    if message["role"] not in ROLES:
        raise RequestError(f"{where}: role {message['role']!r}, expected one of {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, str):
        _check_text(content, f"{where}.content", placeholders)
        return
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where}.content: got {type(content).__name__}, expected a string or a list of items")
    for i, part in enumerate(content):
        here = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and set(part) == {"type", "text"}:
            _check_text(part["text"], here, placeholders)
        elif isinstance(kind, str) and kind in _SOURCE_KEYS:
            yield _vision_item(kind, part, here)
        else:
            raise RequestError(f"{here}: got {_shape_of(part)}, expected {_EXPECTED}")


def _check_text(text: Any, where: str, placeholders: Collection[str]) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{where}: text is {type(text).__name__}, expected a string")
    for placeholder in placeholders:
        if placeholder in text:
            raise RequestError(
                f"{where}: the text contains {placeholder}, which stands for a picture or clip; remove it, and give "
                f"that as an item: {_EXPECTED}"
            )


def _vision_item(kind: str, part: Mapping[str, Any], where: str) -> VisionItem:
    """Read {"type": "image" | "image_url" | "video", its data, its keys of _KEYS}."""
    known = (*_SOURCE_KEYS[kind], *_KEYS[kind])
    if unknown := sorted(set(map(str, part)) - {"type", *known}):
        raise RequestError(f"{where}: unknown {', '.join(unknown)}; an item of type {kind} takes {', '.join(known)}")
    sources = [part[key] for key in _SOURCE_KEYS[kind] if part.get(key) is not None]
    if len(sources) > 1:
        raise RequestError(f"{where}: more than one {kind}; keep one of {', '.join(_SOURCE_KEYS[kind])}")
    source = sources[0] if sources else None
    # OpenAI's form: {"image_url": {"url": ...}}
    if kind == "image_url" and isinstance(source, Mapping):
        if source.get("url") is None or set(source) - {"url", *_IGNORED_URL_KEYS}:
            raise RequestError(f"{where}: image_url has {', '.join(map(str, source)) or 'nothing'}, expected url")
        source = source["url"]
    plain_kind: Kind = "video" if kind == "video" else "image"
    size = SizeRequest(**{name: part.get(name) for name in (*_SIZE_KEYS, "total_pixels")})
    frames = FrameRequest(**{name: part.get(name) for name in _FRAME_KEYS})
    return VisionItem(plain_kind, source, where, size, frames)


def _shape_of(part: Any) -> str:
    if not isinstance(part, Mapping):
        # a URL or data: URI is named as errors name it everywhere; what is in a list may be one, too
        return f"str {describe(part, 'text')[:40]!r}" if isinstance(part, str) else type(part).__name__
    kind = f"type {part['type']!r}" if "type" in part else "no type"
    return f"{kind} with the keys {', '.join(map(str, part)) or '(none)'}"
