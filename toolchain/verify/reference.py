"""transformers as the measure of correctness: the original model on CPU, in fp32, on the artifact's rounded weights."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...artifacts.errors import ConfigError
from .cases import Case
from .hf_processor import default_image_processor
from .transformers_import import import_transformers

VISUAL, PREFILL = "visual", "prefill"


@dataclass(frozen=True, eq=False)
class HfInputs:
    """What transformers makes of a case: token_ids int64 [tokens], grids int64 [pictures and clips, 3], pixels (what
    its model takes by keyword: fp32 [patches, patch_dim] and grids), positions int64 [3, tokens] and delta (M-RoPE).
    """

    token_ids: NDArray[np.int64]
    grids: NDArray[np.int64]
    pixels: Mapping[str, Tensor]
    positions: NDArray[np.int64]
    delta: int


@dataclass(frozen=True, eq=False)
class Expected:
    """transformers' outputs: visual [merged patches, H] or None; logits [1 + steps, V], of the prompt's last token and
    of every teacher-forced step; tokens [1 + steps], each the one that the logits of the same row make largest.
    """

    visual: Tensor | None
    logits: Tensor
    tokens: tuple[int, ...]

    def output(self, graph: str, step: int | None) -> Tensor:
        """What one call gave: the visual output of a request with pictures, or the logits [V] of a step."""
        return self.visual if graph == VISUAL and self.visual is not None else self.logits[step or 0]


class Watch:
    """Keeps inputs and outputs of chosen modules during one call of the model.

    modules: parts of each landmark, by landmark, as module paths whose outputs stand side by side (q, k and v for qkv).
    call: "visual", "prefill" or the number of the decode step. Afterwards `inputs` and `outputs` hold [rows, width],
    and `keys` one [tokens, kv_dim] a layer, of this call's tokens, rotary applied.
    """

    def __init__(self, modules: Mapping[str, tuple[str, ...]], call: str | int) -> None:
        self.modules = modules
        self.call = call
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.keys: list[Tensor] = []

    @contextmanager
    def during(self, model: Any, call: str | int) -> Iterator[None]:
        """Attach the hooks if this is the call to watch: the visual tower runs inside the prefill."""
        if call != self.call and not (call == PREFILL and self.call == VISUAL):
            yield
            return
        parts: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        hooks = []
        for name, paths in self.modules.items():
            for path in paths:

                def seen(
                    module: Any, given: tuple[Any, ...], keywords: dict[str, Any], out: Any, n: str = name
                ) -> None:
                    first = given[0] if given else keywords.get("hidden_states")
                    if isinstance(first, Tensor) and first.is_floating_point():
                        self.inputs[n] = _rows(first)
                    parts[n].append(_rows(out))

                hooks.append(model.get_submodule(path).register_forward_hook(seen, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.outputs = {name: torch.cat(seen, -1) for name, seen in parts.items() if seen}

    def take_keys(self, call: str | int, cache: Any, tokens: int) -> None:
        if call == self.call:
            # [1, heads, length, dim] to [tokens, heads * dim]
            self.keys = [_rows(layer.keys[0, :, -tokens:].transpose(0, 1).flatten(1)) for layer in cache.layers]


def trained_positions(
    placed: Tensor, grids: NDArray[np.int64], merge_size: int, per_step: float = 1.0
) -> tuple[NDArray[np.int64], int]:
    """M-RoPE positions int64 [3, tokens] and delta by the rule that the checkpoints were trained with.

    placed: bool [tokens], true where tokens stand for a clip; per_step: positions from one step of it to the next.
    get_rope_index of transformers 4.45 to 5.2: whatever follows a clip begins behind the largest position of all three
    axes. Later versions begin inside long clips.
    """
    parts: list[Tensor] = []
    waiting, at = iter(grids.tolist()), 0
    while at < len(placed):
        start = int(parts[-1].max()) + 1 if parts else 0
        if placed[at]:
            t, h, w = next(waiting)
            axes = ((torch.arange(t) * per_step).long(), torch.arange(h // merge_size), torch.arange(w // merge_size))
            part = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        else:
            part = torch.zeros(3, 1, dtype=torch.int64)
        parts.append(part + start)
        at += part.shape[1]
    positions = torch.cat(parts, 1)
    return positions.numpy(), int(positions.max()) + 1 - len(placed)


def _rows(tensor: Tensor) -> Tensor:
    """A copy [rows, width] in fp32. A convolution's output [rows, width, 1, 1, 1] counts too."""
    tensor = tensor.flatten(1) if tensor.dim() == 5 else tensor
    return tensor.detach().float().reshape(-1, tensor.shape[-1]).clone()


class HfReference:
    """The original model and its processors."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def inputs(self, case: Case) -> HfInputs:
        """The case's text, pictures and clip through transformers' own processing."""
        config = self.model.config
        grids, pixels, placeholder = np.empty((0, 3), np.int64), {}, config.image_token_id
        if case.pictures:
            made = self.image_processor(images=list(case.pictures), return_tensors="pt")
            pixels = {"pixel_values": made["pixel_values"].float(), "image_grid_thw": made["image_grid_thw"]}
            grids = made["image_grid_thw"].numpy()
        elif case.clip:
            values, grid = self._clip(case)
            pixels = {"pixel_values_videos": values, "video_grid_thw": grid}
            grids, placeholder = grid.numpy(), config.video_token_id
        # as Qwen2VLProcessor expands placeholders; the class itself needs torchvision for its video half
        written = self.tokenizer.convert_ids_to_tokens(placeholder)
        first, *rest = case.prompt.text.split(written)
        counts = grids.prod(1) // self.image_processor.merge_size**2
        text = first + "".join(written * count + part for count, part in zip(counts, rest, strict=True))
        token_ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        if case.pictures:
            kinds = (token_ids == config.image_token_id).int()
            of_axes, behind = self.model.model.get_rope_index(
                token_ids, mm_token_type_ids=kinds, image_grid_thw=torch.from_numpy(grids)
            )
            positions, delta = of_axes[:, 0].numpy(), int(behind)
        else:
            # models without a clock count steps
            per_step = getattr(config.vision_config, "tokens_per_second", 1) * case.clip_seconds
            placed, merge = token_ids[0] == placeholder, self.image_processor.merge_size
            positions, delta = trained_positions(placed, grids, merge, per_step)
        return HfInputs(token_ids[0].numpy(), grids, pixels, positions, delta)

    def _clip(self, case: Case) -> tuple[Tensor, Tensor]:
        """Pixel values and grid of the case's clip.

        A step of a clip is so many frames as transformers repeats a picture: each frame's pixels come from its picture.
        Its own video processor needs torchvision.
        """
        together, area = self.image_processor.temporal_patch_size, self.image_processor.patch_size**2
        size = {"shortest_edge": case.clip_area, "longest_edge": case.clip_area}
        made = self.image_processor(images=list(case.clip), return_tensors="pt", size=size)
        grids = made["image_grid_thw"]
        # [steps, frames of a step, patches, channels, repeats, pixels]: each frame once, in its place
        values = made["pixel_values"].float().view(-1, together, int(grids[0].prod()), 3, together, area)
        frames = torch.stack([values[:, k, :, :, k] for k in range(together)], 3)
        grid = torch.tensor([[len(values), *grids[0, 1:].tolist()]])
        return frames.reshape(-1, made["pixel_values"].shape[-1]), grid

    @torch.no_grad()
    def run(
        self, inputs: HfInputs, steps: int, tokens: tuple[int, ...] | None = None, watch: Watch | None = None
    ) -> Expected:
        """Prefill and `steps` decode steps on `tokens`, or on the model's own greedy ones; end tokens are ignored."""
        ids = torch.from_numpy(inputs.token_ids)[None]
        # given, since the model's own of a clip are others than those it was trained with
        positions = torch.from_numpy(inputs.positions)[:, None]
        extra: Mapping[str, Tensor] = inputs.pixels
        visual: list[Tensor] = []
        hook = self.model.model.visual.register_forward_hook(
            lambda module, given, out: visual.append(out.pooler_output.float().clone())
        )
        logits, made, cache = [], [], None
        try:
            for step in range(1 + steps):
                call: str | int = PREFILL if step == 0 else step
                with watch.during(self.model, call) if watch else nullcontext():
                    out = self.model(
                        input_ids=ids,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                        return_dict=True,
                        **extra,
                    )
                cache, extra = out.past_key_values, {}
                if watch:
                    watch.take_keys(call, cache, ids.shape[1])
                logits.append(out.logits[0, -1].float())
                made.append(int(logits[-1].argmax()))
                ids = torch.tensor([[made[-1] if tokens is None else tokens[step]]])
                positions = torch.full((3, 1, 1), len(inputs.token_ids) + inputs.delta + step)
        finally:
            hook.remove()
        return Expected(visual[0] if visual else None, torch.stack(logits), tuple(made))

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """The model in the artifact's dtype, and in fp32 again afterwards: exact, as the weights are rounded to it."""
        self._convert(dtype)
        try:
            yield
        finally:
            self._convert(torch.float32)

    @torch.no_grad()
    def _convert(self, dtype: torch.dtype) -> None:
        # parameters only: like from_pretrained, it leaves the rotary frequencies in fp32
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal."""
    logging = import_transformers().utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def open_reference(folder: Path, dtype: torch.dtype) -> HfReference:
    """Load a checkpoint, already checked, from its folder alone: weights rounded to `dtype`, held in fp32.

    Raises ConfigError when transformers cannot read what is there, MissingDependencyError without transformers.
    """
    transformers = import_transformers()
    path = str(folder.resolve())
    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            image_processor = default_image_processor(path)
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                # plain matrix products: not the kernel that the reference backend calls
                attn_implementation="eager",
            ).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(f"{folder}: transformers cannot load it: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters() if dtype != torch.float32 else ():
            parameter.copy_(parameter.to(dtype))
    return HfReference(model, tokenizer, image_processor)
