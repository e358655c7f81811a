"""What users ask for, through the command line, against transformers: batches, clips, chats, long prompts, sampling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import tiny_config
from PIL import Image
from typer.testing import CliRunner

from qwen2vl_tc.runtime import Model, load
from qwen2vl_tc.toolchain.cli.main import app

from .test_parity import FP32_TOLERANCE, Transformers, our_logits, picture

NEW_TOKENS = 24


class Oracle(Transformers):
    """transformers on messages with pictures, clips and several turns."""

    def inputs_of(self, model: Model, messages: Any) -> dict[str, Any]:
        """Token ids from our template and tokenizer, which have tests of their own; pixels from its own processor."""
        prompt = model.processor.prepare(messages)
        images, clips = [], []
        for message in messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image":
                    images.append(opened(part["image"]))
                elif part["type"] == "video":
                    clips.append([opened(frame) for frame in part["video"]])
        found = self.inputs(prompt, images)
        ids = found["input_ids"]
        found["mm_token_type_ids"] = found["mm_token_type_ids"] + 2 * (ids == self.video_token)
        if clips:
            # a clip is its frames, two to a patch: what the picture processor makes of each pair, put together
            values, grids = zip(*(self.clip(frames) for frames in clips), strict=True)
            found["pixel_values_videos"] = torch.cat(values)
            found["video_grid_thw"] = torch.tensor(grids)
        return found

    @property
    def video_token(self) -> int:
        token: int = self.model.config.video_token_id
        return token

    def clip(self, frames: list[Image.Image]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        frames = frames + frames[-1:] * (len(frames) % 2)
        patches = []
        for first, second in zip(frames[::2], frames[1::2], strict=True):
            pair = [self.processor(images=[frame], return_tensors="pt") for frame in (first, second)]
            grid = pair[0]["image_grid_thw"][0]
            a, b = (one["pixel_values"].view(len(one["pixel_values"]), 3, 2, -1) for one in pair)
            patches.append(torch.stack([a[:, :, 0], b[:, :, 0]], 2).flatten(1))
        return torch.cat(patches), (len(patches), int(grid[1]), int(grid[2]))

    def answer(self, model: Model, messages: Any, count: int = NEW_TOKENS, **settings: Any) -> list[int]:
        inputs = self.inputs_of(model, messages)
        with torch.no_grad():
            out = self.model.generate(
                **inputs, **{"max_new_tokens": count, "do_sample": False, "repetition_penalty": 1.0, **settings}
            )
        tokens: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens


def opened(source: Any) -> Image.Image:
    return Image.open(source).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        picture(84, 112, i).save(made / f"{i}.png")
    picture(56, 140, 9).save(made / "wide.png")
    return made


@pytest.fixture(scope="module")
def built(build: Any) -> tuple[Path, Path]:
    found: tuple[Path, Path] = build("requests", tiny_config(), batches="1,4", max_length=2304)
    return found


@pytest.fixture(scope="module")
def model(built: tuple[Path, Path]) -> Model:
    return load(built[1])


@pytest.fixture(scope="module")
def oracle(built: tuple[Path, Path]) -> Oracle:
    return Oracle(built[0])


def user(text: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def image(path: Path) -> dict[str, Any]:
    return {"type": "image", "image": str(path)}


def clip(folder: Path, *numbers: int) -> dict[str, Any]:
    # the pictures' own lower bound: that of videos would make each of these frames 128 tokens
    return {"type": "video", "video": [str(folder / f"{i}.png") for i in numbers], "min_pixels": 3136}


def requests_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    wide = image(folder / "wide.png")
    return {
        "picture": [user("What is this?", wide)],
        "text": [{"role": "system", "content": "Be brief."}, user("Hello there.")],
        "two videos": [user("What moves?", clip(folder, 0, 1, 2, 3), clip(folder, 4, 5, 6))],
        "image and video": [user("Which one?", wide, clip(folder, 1, 3))],
        "turns": [user("One?", wide), {"role": "assistant", "content": "Yes."}, user("Two?", image(folder / "0.png"))],
    }


def run(*words: Any, stdin: str | None = None) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    assert result.exit_code == 0, result.output
    return result


def answers(artifact: Path, requests: list[Any], file: Path, *options: Any) -> list[dict[str, Any]]:
    file.write_text("".join(json.dumps(request) + "\n" for request in requests))
    lines = run("generate", artifact, "--requests", file, "--json", *options).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_a_batch_of_unequal_requests_gives_each_the_tokens_of_transformers(
    built: tuple[Path, Path], model: Model, oracle: Oracle, folder: Path, tmp_path: Path
) -> None:
    """Pictures, clips, text and turns; five requests are a group of four and one alone."""
    requests = list(requests_of(folder).values())
    found = answers(built[1], requests, tmp_path / "requests.jsonl", "--max-new-tokens", NEW_TOKENS)
    assert len({len(answer["prompt_token_ids"]) for answer in found}) == len(requests), "of unequal length"
    for request, answer in zip(requests, found, strict=True):
        assert answer["token_ids"] == oracle.answer(model, request)


@pytest.mark.parametrize("name", ["two videos", "image and video"])
def test_clips_agree_with_transformers_in_every_logit(model: Model, oracle: Oracle, folder: Path, name: str) -> None:
    request = requests_of(folder)[name]
    inputs = oracle.inputs_of(model, request)
    tokens, logits = oracle.greedy(inputs, 8)
    for ours, theirs in zip(our_logits(model, model.processor.prepare(request), tokens[:-1]), logits, strict=True):
        assert np.abs(ours - theirs.numpy()).max() < FP32_TOLERANCE


def test_a_prompt_of_1500_tokens_agrees_with_transformers(
    built: tuple[Path, Path], model: Model, oracle: Oracle, folder: Path, tmp_path: Path
) -> None:
    request = [user("word " * 500 + "What is in the picture?", image(folder / "wide.png"))]
    (answer,) = answers(built[1], [request], tmp_path / "long.jsonl", "--max-new-tokens", NEW_TOKENS)
    assert len(answer["prompt_token_ids"]) > 1500
    assert answer["token_ids"] == oracle.answer(model, request)


def test_a_chat_of_three_turns_says_what_transformers_says_to_all_messages(
    built: tuple[Path, Path], model: Model, oracle: Oracle, folder: Path
) -> None:
    said = ["What is this?", "And this one?", "Which is larger?"]
    lines = [f"/image {folder / 'wide.png'}", said[0], f"/image {folder / '3.png'}", said[1], said[2], "/exit"]
    result = run("chat", built[1], "--max-new-tokens", 8, stdin="\n".join(lines) + "\n")
    turns: list[dict[str, Any]] = []
    expected = []
    for text, parts in zip(said, ([image(folder / "wide.png")], [image(folder / "3.png")], []), strict=True):
        turns.append(user(text, *parts))
        tokens = oracle.answer(model, turns, 8)
        expected.append(model.processor.decode(tokens))
        turns.append({"role": "assistant", "content": expected[-1]})
    assert result.stdout == "".join(text + "\n" for text in expected)
    kept = [int(line.split(" of ")[0].split()[-1]) for line in result.stderr.splitlines() if "prompt tokens" in line]
    assert kept[0] == 0 < kept[1] < kept[2], "each turn prefills only what is new"


def test_repetition_penalty_and_least_lengths_give_the_tokens_of_transformers(
    built: tuple[Path, Path], model: Model, oracle: Oracle, folder: Path, tmp_path: Path
) -> None:
    request = requests_of(folder)["picture"]
    penalised = oracle.answer(model, request, repetition_penalty=1.3)
    assert penalised != oracle.answer(model, request), "the penalty changes the answer"
    options = ("--repetition-penalty", 1.3, "--max-new-tokens", NEW_TOKENS)
    assert answers(built[1], [request], tmp_path / "a.jsonl", *options)[0]["token_ids"] == penalised
    # an end token that comes early, and one that may not yet
    free = oracle.answer(model, request)
    settings: dict[str, Any] = {"eos_token_id": free[2], "max_new_tokens": NEW_TOKENS}
    assert list(model.generate(request, **settings).token_ids) == free[:3]
    least = oracle.answer(model, request, min_new_tokens=9, eos_token_id=free[2])
    assert len(least) >= 9
    assert list(model.generate(request, min_new_tokens=9, **settings).token_ids) == least


def test_stop_strings_end_an_answer_where_transformers_ends_it(
    built: tuple[Path, Path], model: Model, oracle: Oracle, folder: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    request = requests_of(folder)["text"]
    text = model.generate(request, max_new_tokens=NEW_TOKENS, ignore_eos=True).text
    stop = next(text[i : i + 2] for i in range(6, len(text) - 2) if text[i : i + 2].isascii())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(built[0] / "tokenizer.json"))
    expected = oracle.answer(model, request, stop_strings=[stop], tokenizer=tokenizer)
    answer = model.generate(request, max_new_tokens=NEW_TOKENS, stop=["never said", stop])
    assert list(answer.token_ids) == expected
    assert answer.finish_reason == "stop"
    assert stop in answer.text


def test_sampled_tokens_are_drawn_from_the_logits_of_transformers(
    built: tuple[Path, Path], model: Model, oracle: Oracle, folder: Path, tmp_path: Path
) -> None:
    """The draw replayed on transformers' logits of the same text gives the same tokens."""
    from qwen2vl_tc.runtime.requests.sampling import Sampler

    request = requests_of(folder)["image and video"]
    options = ("--sample", "--temperature", 1.3, "--top-k", 40, "--top-p", 0.95, "--seed", 5, "--max-new-tokens", 12)
    (answer,) = answers(built[1], [request], tmp_path / "s.jsonl", *options)
    inputs = oracle.inputs_of(model, request)
    settings = model.settings({"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95, "seed": 5})
    sampler = Sampler(settings)
    prompt = inputs["input_ids"][0].tolist()
    for count, token in enumerate(answer["token_ids"]):
        ids = torch.tensor([prompt + answer["token_ids"][:count]])
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, count))
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        with torch.no_grad():
            logits = oracle.model(**whole).logits[0, -1].numpy()
        assert sampler.choose(logits, ids[0].tolist(), count) == token
    again, other = (
        answers(built[1], [request], tmp_path / "s.jsonl", *options, "--seed", seed)[0]["token_ids"] for seed in (5, 6)
    )
    assert again == answer["token_ids"] != other
