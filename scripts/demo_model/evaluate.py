"""How often the demo model answers rightly, on pictures whose combinations it was never trained on."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen2vl_tc.artifacts.schema import parse_json
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.runtime.text.prompt import Message, Processor
from qwen2vl_tc.toolchain.demo.pictures import Turn, conversation, sample, turns

Answer = Callable[[Sequence[Message]], str]
# apart from any training seed
_FIRST_SEED = 1 << 40
_NEW_TOKENS = 64


@dataclass(frozen=True)
class Score:
    """How many answers of one kind were right, character for character."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


def held_out(scenes: int) -> Iterator[tuple[list[dict[str, Any]], Turn]]:
    """Conversations about held-out scenes with the turn that ends them; its answer is not in the messages.

    Every kind of question starts a conversation once a scene; one more is asked as a second turn ("follow-up").
    """
    for i in range(scenes):
        scene = sample(_FIRST_SEED + i, held_out=True, moves=i % 5 == 4)
        asked = turns(scene, np.random.default_rng([_FIRST_SEED, i]))
        for turn in asked:
            yield conversation(scene, [turn]), turn
        first, second = asked[:2]
        yield conversation(scene, [first, second]), Turn("follow-up", second.question, second.answer)


def score(answer: Answer, scenes: int) -> dict[str, Score]:
    """Ask everything of `held_out(scenes)`; scores by kind of question, in the order of first appearance."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for messages, turn in held_out(scenes):
        asked[turn.kind] += 1
        right[turn.kind] += answer(messages) == turn.answer
    return {kind: Score(right[kind], asked[kind]) for kind in asked}


def answer_by_transformers(folder: Path) -> Answer:
    """Greedy answers of transformers, in fp32 on the checkpoint's weights; raises what open_reference does."""
    import torch

    from qwen2vl_tc.toolchain.verify.reference import open_reference

    from .inputs import HfInputs

    model = open_reference(folder, torch.float32).model
    files = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    processor = Processor(files, config_from_hf(parse_json(files["config.json"], "config.json")))
    inputs = HfInputs(processor)

    def answer(messages: Sequence[Message]) -> str:
        given = inputs.batch([processor.prepare(messages)])
        with torch.no_grad():
            made = model.generate(
                **given, do_sample=False, top_k=None, top_p=None, temperature=None, max_new_tokens=_NEW_TOKENS
            )
        return processor.decode(made[0, given["input_ids"].shape[1] :].tolist())

    return answer


def answer_by_artifact(artifact: Path) -> Answer:
    """Greedy answers of an artifact, by the backend that `load` chooses here."""
    from qwen2vl_tc.runtime import load

    model = load(artifact)
    return lambda messages: model.generate(messages, max_new_tokens=_NEW_TOKENS).text
