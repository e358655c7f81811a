"""A request to what the graphs take: token ids, patches, M-RoPE positions; equal to transformers' Qwen2VLProcessor."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import ArtifactError, RequestError
from ...artifacts.schema import parse_json
from ..models import family_of
from ..models.config import ModelConfig
from ..pictures.images import ImageSource
from ..pictures.items import cut_item
from ..pictures.patches import CutPicture, Kind, Patches
from ..pictures.request import DEFAULT_VISION, VideoSource, VisionItem, VisionOptions
from ..pictures.vision import image_settings_from_hf
from ..requests.defaults import generation_defaults_from_hf
from .messages import Message, given_items, vision_items, without_sources
from .stream import TextStream
from .template import ChatTemplate, Renderer
from .tokenizer import open_tokenizer, refuse

TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One request, ready for the graphs.

    token_ids int64 [tokens]: every placeholder repeated once per merged patch. pictures: in order of appearance; spans:
    the first token of each, and the one behind its last. positions int64 [3, tokens] and delta: see rope_positions.
    text: what was tokenised, placeholders not repeated.
    """

    text: str
    token_ids: NDArray[np.int64]
    pictures: tuple[CutPicture, ...]
    spans: tuple[tuple[int, int], ...]
    positions: NDArray[np.int64]
    delta: int

    @property
    def patches(self) -> Patches:
        """uint8 [n, patch_dim]: those of all pictures; a lone one's are not copied."""
        parts = [each.patches for each in self.pictures] or [np.empty((0, 0), np.uint8)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def grids(self) -> NDArray[np.int64]:
        """int64 [pictures and clips, 3]: their (t, h, w)."""
        return np.array([each.grid for each in self.pictures], np.int64).reshape(-1, 3)

    @property
    def vision_slots(self) -> NDArray[np.int64]:
        """int64 [merged patches]: which token_ids the rows of the visual output replace, in order."""
        return np.concatenate([np.empty(0, np.int64), *(np.arange(*span) for span in self.spans)])

    def after(self, start: int) -> "Prompt":
        """What is left behind the first `start` tokens, which must not end inside a picture."""
        left = [i for i, (first, _) in enumerate(self.spans) if first >= start]
        pictures = tuple(self.pictures[i] for i in left)
        spans = tuple((self.spans[i][0] - start, self.spans[i][1] - start) for i in left)
        positions = self.positions[:, start:]
        return replace(self, token_ids=self.token_ids[start:], pictures=pictures, spans=spans, positions=positions)


class Processor:
    """Everything before and after the graphs, from the bytes of an artifact's processor files."""

    def __init__(self, files: Mapping[str, bytes], config: ModelConfig, renderer: Renderer | None = None) -> None:
        """`files`: tokenizer.json, preprocessor_config.json and, where there, tokenizer_config.json,
        chat_template.jinja or chat_template.json, generation_config.json; by these names. renderer: the chat
        template's, where it was started already.

        Raises ArtifactError when one is missing or damaged, or contradicts the model's config.
        """
        for name in ("tokenizer.json", "preprocessor_config.json"):
            if name not in files:
                raise ArtifactError(f"{name} is missing from the processor files; convert again")
        self.tokenizer = open_tokenizer(files["tokenizer.json"])
        self.config = config
        self.inputs = family_of(config).inputs(config)
        self.settings = image_settings_from_hf(files["preprocessor_config.json"])
        vision = config.vision
        got = (self.settings.patch_size, self.settings.temporal_patch_size, self.settings.merge_size)
        expected = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        if got != expected:
            raise ArtifactError(
                f"preprocessor_config.json: patch_size, temporal_patch_size, merge_size are {got}, "
                f"the model has {expected}"
            )
        self.placeholders: dict[str, Kind] = {
            self._token_text(config.image_token_id): "image",
            self._token_text(config.video_token_id): "video",
        }
        known_ends = (self.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
        self.generation = generation_defaults_from_hf(
            files.get("generation_config.json"),
            tuple(i for i in known_ends if i is not None),
            config.text.vocab_size,
        )
        plain = parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
        if not isinstance(plain, dict):
            raise ArtifactError(f"tokenizer_config.json: got {type(plain).__name__}, expected an object")
        self._template_variables = _template_variables(plain)
        self._template_source = _template_source(files, plain)
        self._renderer = renderer
        self._template: ChatTemplate | None = None

    @property
    def template(self) -> ChatTemplate:
        """Compiled at first use: loading a model needs no template."""
        if self._template is None:
            name, source = self._template_source
            if source is None:
                raise ArtifactError(
                    "no chat template in the processor files; add chat_template.json, or give the prompt as text"
                )
            self._renderer = self._renderer or Renderer()
            self._template = ChatTemplate(source, name, renderer=self._renderer)
        return self._template

    def close(self) -> None:
        """End the process that renders the chat template."""
        if self._renderer is not None:
            self._renderer.close()

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A new decoder of generated ids."""
        return TextStream(self.tokenizer, skip_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def prepare(
        self,
        request: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        vision: VisionOptions = DEFAULT_VISION,
    ) -> Prompt:
        """Turn one request into a Prompt.

        Messages: {"role": ..., "content": text or a list of {"type": "text", "text": ...}, {"type": "image", "image":
        path, bytes, PIL image or array}, {"type": "video", "video": path, bytes or [frames]}}; images and videos take
        what qwen-vl-utils lets them take (see SizeRequest and FrameRequest). One without its data takes the next of
        `images` or `videos`. `vision` holds for all of them, where the messages do not say.

        A string: tokenised as it is, the chat template's tokens included; its placeholders take `images` and `videos`.

        Control tokens typed inside a text, <|im_end|> say, count as control tokens, as in transformers by default:
        strip them from text you do not trust. Placeholders typed inside a message's text are refused, because
        they would have no picture.

        Raises RequestError saying what is wrong and where.
        """
        if isinstance(request, str):
            text, items = request, [*given_items("image", images), *given_items("video", videos)]
        else:
            items = vision_items(request, images, videos, self.placeholders)
            text = self.template.render(
                without_sources(request),
                add_generation_prompt=add_generation_prompt,
                add_vision_id=add_vision_id,
                **self._template_variables,
            )
        pictures = tuple(cut_item(item, self.settings, vision) for item in self._in_order(text, items))
        token_ids, spans = self._token_ids(text, pictures)
        return Prompt(text, token_ids, pictures, spans, *self.inputs.positions(token_ids, pictures))

    def _token_text(self, token_id: int) -> str:
        text = self.tokenizer.id_to_token(token_id)
        if text is None:
            raise ArtifactError(f"tokenizer.json: has no token {token_id}, which config.json names as a placeholder")
        return str(text)

    def _in_order(self, text: str, items: list[VisionItem]) -> list[VisionItem]:
        """Hand the items out to the text's placeholders, each kind in its own order."""
        pattern = "|".join(map(re.escape, self.placeholders))
        wanted = [self.placeholders[match.group()] for match in re.finditer(pattern, text)]
        waiting: dict[Kind, list[VisionItem]] = {"image": [], "video": []}
        for item in items:
            waiting[item.kind].append(item)
        for placeholder, kind in self.placeholders.items():
            if wanted.count(kind) != len(waiting[kind]):
                raise RequestError(
                    f"the prompt has {wanted.count(kind)} {placeholder} for {len(waiting[kind])} {kind}(s); "
                    f"give one {kind} for each"
                )
        queues = {kind: iter(queue) for kind, queue in waiting.items()}
        return [next(queues[kind]) for kind in wanted]

    def _token_ids(
        self, text: str, pictures: Sequence[CutPicture]
    ) -> tuple[NDArray[np.int64], tuple[tuple[int, int], ...]]:
        """Token ids with repeated placeholders, and where those of each picture begin and end."""
        # transformers leaves the post-processor out where the template already wrote the token it would add
        bos = self._template_variables.get("bos_token")
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))
        except Exception as error:  # lone surrogates; the library raises nothing narrower
            raise RequestError(f"the prompt cannot be tokenised, it is not UTF-8: {error}") from error
        except BaseException as error:
            refuse(error, "tokenizer.json: failed on the prompt")
        ids = np.array(encoding.ids, dtype=np.int64)
        if not ids.size:
            raise RequestError("the prompt is empty")
        if (largest := int(ids.max())) >= self.config.text.vocab_size:
            raise ArtifactError(
                f"tokenizer.json: gives the token {largest}, outside the vocabulary of {self.config.text.vocab_size}"
            )
        placeholder_ids = [self.config.image_token_id, self.config.video_token_id]
        slots = np.flatnonzero(np.isin(ids, placeholder_ids))
        if len(slots) != len(pictures):
            raise ArtifactError(f"tokenizer.json: {len(pictures)} placeholders in the text became {len(slots)} tokens")
        # repeating ids equals tokenising repeated placeholders, which never merge with what is beside them
        repeats = np.ones(ids.size, dtype=np.int64)
        repeats[slots] = [each.tokens(self.settings.merge_size) for each in pictures]
        ends = np.cumsum(repeats)[slots].tolist()
        starts = [end - count for end, count in zip(ends, repeats[slots].tolist(), strict=True)]
        return np.repeat(ids, repeats), tuple(zip(starts, ends, strict=True))


def _template_variables(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that transformers hands to a template."""
    values = ((name, tokenizer_config.get(name)) for name in TEMPLATE_TOKENS)
    # saved either as text or as an AddedToken
    texts = ((name, value.get("content") if isinstance(value, dict) else value) for name, value in values)
    return {name: text for name, text in texts if isinstance(text, str)}


def _template_source(files: Mapping[str, bytes], tokenizer_config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The chat template and where it came from; the processor's own goes before the tokenizer's, as in transformers."""
    if "chat_template.jinja" in files:
        try:
            return "chat_template.jinja", files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"chat_template.jinja: not UTF-8: {error}") from error
    name, holder = "tokenizer_config.json", tokenizer_config
    if "chat_template.json" in files:
        name, holder = "chat_template.json", parse_json(files["chat_template.json"], "chat_template.json")
    source = holder.get("chat_template") if isinstance(holder, Mapping) else None
    if isinstance(source, list):
        named = [
            entry.get("template") for entry in source if isinstance(entry, dict) and entry.get("name") == "default"
        ]
        source = named[0] if named else None
    if source is not None and not isinstance(source, str):
        raise ArtifactError(f"{name}: chat_template is {type(source).__name__}, expected a string")
    return name, source
