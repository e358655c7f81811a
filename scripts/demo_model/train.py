"""Training the demo model from scratch with transformers' own Qwen2-VL.

Pictures and conversations are made as they are needed, so none is seen twice.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from qwen2vl_tc.artifacts.errors import ToolchainError
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.runtime.pictures.patches import image_patches
from qwen2vl_tc.runtime.text.prompt import Processor, Prompt
from qwen2vl_tc.toolchain.cli.console import result
from qwen2vl_tc.toolchain.demo.pictures import (
    AREA,
    COLOURS,
    NUMBERS,
    PLACES,
    SHAPES,
    Scene,
    conversation,
    draw,
    drill,
    greeting,
    sample,
    sentences,
    turns,
)
from qwen2vl_tc.toolchain.verify.transformers_import import import_transformers
from tests.helpers.synthetic import preprocessor_config, tiny_config
from tests.helpers.synthetic_tokenizer import learned_merges, write_json, write_tokenizer

from .inputs import HfInputs

VISION_STEPS = 400
VISION_BATCH = 48
STEPS = 2800
BATCH = 16
MOST_TURNS = 5
DRILLS = 0.6
RATE = 2e-3
WARM_UP = 60
# the share of steps at whose end the rate falls to nothing
COOL_DOWN = 0.3
SEED = 0
# pictures of the first stage are not those of the second
_VISION_SEED = 1 << 30
_REPORT = 50
_WORDS = ((*COLOURS, NUMBERS[0]), (*SHAPES, NUMBERS[0]), ("top", "bottom"), ("left", "right"))
_VOCABULARY = 448
_EMBEDDING_STD = 0.25
_DISTANCE_WEIGHT = 4.0
# these write into the residual stream
_RESIDUAL = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")


def model_config() -> dict[str, Any]:
    """The model's config.json."""
    return tiny_config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=_VOCABULARY,
        tie_word_embeddings=True,
        vision={"depth": 2, "embed_dim": 64, "mlp_ratio": 3, "num_heads": 2},
        # a head of 32 has 16 frequencies: with the published base and sections, rows and columns would be hardly apart
        rope_theta=1e4,
        rope_scaling={"type": "mrope", "mrope_section": [1, 2, 13]},
        max_position_embeddings=2048,
    )


def train(folder: Path) -> None:
    """Train and write the checkpoint into `folder`, made if absent; a quarter of an hour on one core.

    First the vision tower alone: what it makes of each merged patch shall be the sum of the embeddings of the words
    for what stands there. A published Qwen2-VL begins with a trained tower too. Then the language model, on
    conversations. Raises ToolchainError for a folder that is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ToolchainError(f"{folder}: is not empty; choose another --out")
    processor = _write_files(folder)
    model = _new_model(folder)
    inputs = HfInputs(processor)
    words = [_embeddings(model, processor, group) for group in _WORDS]

    def vision_loss(step: int) -> Tensor:
        scenes = [sample(_VISION_SEED + step * VISION_BATCH + i, held_out=False) for i in range(VISION_BATCH)]
        cut = [image_patches(draw(scene)[0], processor.settings) for scene in scenes]
        pixels = torch.from_numpy(inputs.normalised(np.concatenate([patches for patches, _ in cut])))
        merged = model.model.visual(pixels, grid_thw=torch.tensor([grid for _, grid in cut])).pooler_output
        targets = torch.tensor([labels for scene in scenes for labels in _cells(scene)])
        wanted = torch.stack([group[targets[:, i]] for i, group in enumerate(words)]).sum(0)
        # the classes lead the way; without the distance the tower would say colours louder than shapes
        told = torch.stack([cross_entropy(merged @ group.T, targets[:, i]) for i, group in enumerate(words)]).sum()
        return told + _DISTANCE_WEIGHT * mse_loss(merged, wanted)

    def conversation_loss(step: int) -> Tensor:
        prompts = [_conversation(processor, step * BATCH + i) for i in range(BATCH)]
        logits = model(**inputs.batch(prompts)).logits
        return cross_entropy(logits.flatten(0, 1), inputs.labels(prompts).flatten())

    _minimise("vision", vision_loss, list(model.model.visual.parameters()), VISION_STEPS)
    # a language model that does not look yet would only wear the tower down
    model.model.visual.requires_grad_(False)
    _minimise("conversations", conversation_loss, [p for p in model.parameters() if p.requires_grad], STEPS)
    model.to(torch.bfloat16).save_pretrained(folder)
    # save_pretrained wrote its own form of config.json
    _write_files(folder)


def _minimise(name: str, loss_of: Callable[[int], Tensor], parameters: list[Any], steps: int) -> None:
    """AdamW over `steps` batches: a warm-up, a constant rate, a linear decay."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / WARM_UP, 1.0, (steps - n) / (steps * COOL_DOWN))
    )
    begin, total = time.perf_counter(), 0.0
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % _REPORT == 0:
            result(
                f"{name}: step {step + 1} of {steps}, loss {total / _REPORT:.4f}, {time.perf_counter() - begin:.0f} s"
            )
            total = 0.0


def _cells(scene: Scene) -> Iterator[list[int]]:
    """Of every merged patch, row by row: which of each group of _WORDS describes it."""
    here = {thing.where: thing for thing in scene.things}
    for place in PLACES:
        thing = here.get(place)
        told = [thing.colour, thing.shape] if thing else [NUMBERS[0]] * 2
        yield [group.index(word) for group, word in zip(_WORDS, [*told, *place.split()], strict=True)]


def _embeddings(model: Any, processor: Processor, group: Sequence[str]) -> Tensor:
    """The embeddings [words, hidden] of words that are one token each."""
    ids = [processor.tokenizer.encode(f" {word}").ids[0] for word in group]
    embeddings: Tensor = model.get_input_embeddings().weight[ids].detach().clone()
    return embeddings


def _write_files(folder: Path) -> Processor:
    """Write everything of the checkpoint but its weights; returns what reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config()
    model = config_from_hf(config)
    write_json(folder / "config.json", config)
    write_tokenizer(folder, config, learned_merges(sentences(), _VOCABULARY))
    write_json(
        folder / "preprocessor_config.json", {**preprocessor_config(model), "min_pixels": AREA, "max_pixels": AREA}
    )
    return Processor({path.name: path.read_bytes() for path in folder.glob("*.json")}, model)


def _new_model(folder: Path) -> Any:
    """transformers' model, scaled to each weight's fan-in: its own 0.02 is for models ten times as wide."""
    transformers = import_transformers()
    torch.manual_seed(SEED)
    model = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig.from_pretrained(folder)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 0.1 if name.endswith(_RESIDUAL) else 1.0
                std = _EMBEDDING_STD if "embed_tokens" in name else gain / math.sqrt(parameter[0].numel())
                parameter.normal_(0, std)
        for layer in model.model.language_model.layers:
            # a key begins as its group's first query, so that like attends to like
            attention = layer.self_attn
            keys = attention.k_proj.weight.view(-1, attention.head_dim, attention.k_proj.in_features)
            keys.copy_(attention.q_proj.weight.view(len(keys), -1, *keys.shape[1:])[:, 0])
    return model


def _conversation(processor: Processor, number: int) -> Prompt:
    """Training conversation `number`: of 32, one is a greeting, five are about clips, the rest about pictures."""
    rng = np.random.default_rng([SEED, number])
    kind = int(rng.integers(32))
    if kind == 0:
        messages = greeting(rng)
    else:
        scene = sample(number, held_out=False, moves=kind < 6)
        asked = turns(scene, rng)[: 1 + int(rng.integers(MOST_TURNS))]
        if rng.random() < DRILLS:
            asked.insert(int(rng.integers(len(asked) + 1)), drill(scene, rng))
        messages = conversation(scene, asked, answer_last=True)
    return processor.prepare(messages, add_generation_prompt=False)
