"""Generation as a program uses it: hooks, streams, interruption, what is kept between requests and turns."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from helpers.synthetic import tiny_config
from PIL import Image

from qwen2vl_tc.artifacts.errors import ArtifactError, RequestError
from qwen2vl_tc.runtime import Model, load
from qwen2vl_tc.runtime.pictures.request import VisionOptions
from qwen2vl_tc.runtime.requests.answer import Row, Token

QUESTION = [{"role": "user", "content": "Say something."}]
OTHER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And what about the cat?"}]
RED, BLUE = (Image.new("RGB", (84, 84), colour) for colour in ("red", "blue"))


@pytest.fixture(scope="module")
def artifact(build: Any) -> Path:
    _, path = build("requests", tiny_config(), batches="1,4", max_length=2304)
    assert isinstance(path, Path)
    return path


@pytest.fixture
def model(artifact: Path) -> Model:
    return load(artifact)


def test_the_hook_gets_every_token_of_every_row_with_its_text(model: Model) -> None:
    seen: list[Token] = []
    answers = model.generate_batch([QUESTION, OTHER, QUESTION], max_new_tokens=9, on_token=seen.append)
    for row, answer in enumerate(answers):
        assert tuple(token.id for token in seen if token.row == row) == answer.token_ids
        assert "".join(token.text for token in seen if token.row == row) == answer.text
    assert answers[0].token_ids == answers[2].token_ids != answers[1].token_ids
    # as they are made: the rows' tokens come step by step, not row by row
    assert [token.row for token in seen[:6]] == [0, 1, 2, 0, 1, 2]


def test_an_exception_in_the_hook_ends_the_generation_and_the_next_one_works(model: Model) -> None:
    whole = model.generate(QUESTION, max_new_tokens=9)
    seen: list[int] = []

    def interrupt(token: Token) -> None:
        seen.append(token.id)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(QUESTION, max_new_tokens=9, on_token=interrupt)
    assert tuple(seen) == whole.token_ids[:3]
    assert model.generate(QUESTION, max_new_tokens=9).token_ids == whole.token_ids


def test_a_closed_stream_computes_no_further(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    backend: Any = model.backend
    run = backend.run_graph
    monkeypatch.setattr(backend, "run_graph", lambda name, inputs: (steps.append(name), run(name, inputs))[1])
    pieces = model.stream(QUESTION, max_new_tokens=500, ignore_eos=True)
    next(pieces)
    pieces.close()
    done = len(steps)
    assert 0 < done < 50
    assert list(pieces) == []
    assert len(steps) == done


def test_a_request_that_cannot_be_served_is_refused_when_the_stream_is_made(model: Model) -> None:
    with pytest.raises(RequestError, match="need a cache of"):
        model.stream(QUESTION, max_new_tokens=5000)


def test_one_bad_request_of_a_batch_is_named_before_any_compute(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.backend), "run_graph", lambda *args: pytest.fail("computed"))
    with pytest.raises(RequestError, match=r"requests\[1\]: .*the prompt has .* tokens, the artifact's cache 2304"):
        model.generate_batch([QUESTION, [{"role": "user", "content": "word " * 900}]])
    with pytest.raises(RequestError, match=r"requests\[0\]: messages: expected a non-empty list"):
        model.generate_batch([[]])
    with pytest.raises(RequestError, match="requests: expected a non-empty list"):
        model.generate_batch([])
    with pytest.raises(RequestError, match="unknown setting tempreature"):
        model.generate(QUESTION, tempreature=1)  # type: ignore[call-arg]


def test_an_async_loop_goes_on_while_text_is_made(model: Model) -> None:
    async def talk() -> tuple[str, int]:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        beating = asyncio.ensure_future(beat())
        text = "".join([piece async for piece in model.astream(QUESTION, max_new_tokens=24)])
        beating.cancel()
        return text, beats

    text, beats = asyncio.run(talk())
    assert text == model.generate(QUESTION, max_new_tokens=24).text
    assert beats > 24


def test_a_cancelled_task_ends_its_generation(model: Model) -> None:
    steps: list[str] = []
    backend: Any = model.backend
    run = backend.run_graph
    backend.run_graph = lambda name, inputs: (steps.append(name), run(name, inputs))[1]

    async def cancelled() -> None:
        got = asyncio.Event()

        async def talk() -> None:
            async for _ in model.astream(QUESTION, max_new_tokens=1500, ignore_eos=True):
                got.set()

        task = asyncio.ensure_future(talk())
        await got.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    done = len(steps)
    assert done < 1000
    assert model.generate(QUESTION, max_new_tokens=2).token_ids
    assert len(steps) == done + 2, "nothing ran on in a thread"


def test_threads_take_turns_and_get_what_each_gets_alone(model: Model) -> None:
    requests = [QUESTION, OTHER]
    alone = [model.generate(request, max_new_tokens=40).token_ids for request in requests]
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = model.generate(requests[i], max_new_tokens=40).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == alone


def test_the_kv_cache_is_allocated_once_for_many_requests(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    allocate = model.backend.allocate
    monkeypatch.setattr(model.backend, "allocate", lambda count: (rows.append(count), allocate(count))[1])
    for _ in range(3):
        model.generate(QUESTION, max_new_tokens=3)
        list(model.stream(OTHER, max_new_tokens=3))
    assert rows == [1]
    # two and three rows run in the decode graph of four; another size makes room, so that no more than one is held
    for size in (4, 3, 2):
        model.generate_batch([QUESTION] * size, max_new_tokens=3)
    assert rows == [1, 4]
    assert len(model._idle) == 1
    model.chat().send("Hello", max_new_tokens=2)
    assert rows == [1, 4, 1]
    assert not model._idle


def test_the_recipe_s_operators_meet_no_value_of_an_earlier_request(build: Any) -> None:
    """They multiply what the mask hides by zero, and zero times a NaN is NaN."""
    _, path = build("requests_recipe", tiny_config(), operators="recipe", visual_attention="tnd")
    model = load(path)
    expected = model.generate(QUESTION, max_new_tokens=4).token_ids
    caches: list[Any] = []
    allocate = model.backend.allocate
    model.backend.allocate = lambda rows: (caches.append(allocate(rows)), caches[-1])[1]  # type: ignore[method-assign]
    for _ in range(2):
        assert model.generate(QUESTION, max_new_tokens=4).token_ids == expected
        for tensor in (*caches[-1].keys, *caches[-1].values):
            tensor.fill_(float("nan"))


def tensor_bytes() -> int:
    import torch

    gc.collect()
    storages = {
        o.untyped_storage().data_ptr(): o.untyped_storage().nbytes()
        for o in gc.get_objects()
        if type(o) is torch.Tensor
    }
    return sum(storages.values())


def test_memory_stays_flat_over_2000_tokens(model: Model) -> None:
    """Live tensors: what one more token keeps would be seen, without the allocator's noise."""
    counts: list[int] = []
    made: list[Token] = []

    def count(token: Token) -> None:
        made.append(token)
        if len(made) % 500 == 100:
            counts.append(tensor_bytes())

    model.generate(QUESTION, max_new_tokens=2000, ignore_eos=True, on_token=count)
    assert len(made) == 2000
    assert len(counts) == 4
    assert max(counts) == counts[0]


@pytest.fixture
def prefilled(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens of each prefill, in order."""
    counts: list[int] = []
    prefill = model.backend.prefill

    def counted(cache: Any, row: int, start: int, token_ids: Any, *rest: Any) -> Any:
        counts.append(len(token_ids))
        return prefill(cache, row, start, token_ids, *rest)

    monkeypatch.setattr(model.backend, "prefill", counted)
    yield counts


def fresh(model: Model, messages: Any, **settings: Any) -> tuple[int, ...]:
    return model.generate(messages, **settings).token_ids


def test_each_turn_prefills_only_what_is_new(model: Model, prefilled: list[int]) -> None:
    chat = model.chat("Be brief.")
    first = chat.send("What is this?", [RED], max_new_tokens=6)
    second = chat.send("And this?", [BLUE], max_new_tokens=6)
    third = chat.send("Which is warmer?", max_new_tokens=6)
    assert first.cached_tokens == 0
    assert prefilled == [len(a.prompt_token_ids) - a.cached_tokens for a in (first, second, third)]
    assert prefilled[1] < len(second.prompt_token_ids) - len(first.prompt_token_ids) + 8
    assert third.token_ids == fresh(model, chat.messages[:-1], max_new_tokens=6)
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]


def test_pictures_of_earlier_turns_are_neither_opened_nor_encoded_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RED.save(tmp_path / "red.png")
    encoded: list[int] = []
    embed = model.backend.embed
    monkeypatch.setattr(
        model.backend,
        "embed",
        lambda inputs, patches, grids: (encoded.append(len(patches)), embed(inputs, patches, grids))[1],
    )
    chat = model.chat()
    chat.send("What is this?", [str(tmp_path / "red.png")], max_new_tokens=4)
    (tmp_path / "red.png").unlink()
    chat.send("And this?", [BLUE], max_new_tokens=4)
    chat.send("So?", max_new_tokens=4)
    assert encoded == [36, 36]


def forced(model: Model, monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> dict[str, Any]:
    """Settings with which answers are these tokens, whatever the logits say."""
    left = iter(tokens)
    monkeypatch.setattr(Row, "choose", lambda self, logits: next(left))
    # a penalty brings the choice to the host
    return {"repetition_penalty": 1.5, "max_new_tokens": len(tokens)}


def first_logits(model: Model, ask: Any, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The logits at the end of the prefill that `ask` does."""
    found: list[np.ndarray] = []
    prefill = model.backend.prefill
    with monkeypatch.context() as patch:
        patch.setattr(
            model.backend,
            "prefill",
            lambda *args: (found.append(model.backend.logits(step := prefill(*args))[0]), step)[1],
        )
        ask()
    (logits,) = found
    return logits


FRAMES = [Image.new("RGB", (56, 56), (4 * i, 90, 200)) for i in range(48)]


@pytest.mark.parametrize(
    "said",
    # the clip has more steps than rows and columns: text goes on behind its last one, in the answer and in the prompt
    [{}, {"images": [RED]}, {"videos": [FRAMES]}],
    ids=["text", "picture", "clip"],
)
def test_a_kept_answer_gives_the_logits_of_a_fresh_prompt(
    model: Model, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]
) -> None:
    # spelled as the tokenizer spells it, so that the answer's own cache entries serve the next turn
    answer = model.processor.tokenizer.encode("the cat sat on that, and so on; it is what it is.").ids
    small = VisionOptions(min_pixels=56 * 56, max_pixels=56 * 56)
    chat = model.chat(vision=small)
    with monkeypatch.context() as patch:
        first = chat.send(
            "Hello", **said, **forced(model, patch, [*answer, model.processor.generation.eos_token_ids[0]])
        )
    kept = first_logits(model, lambda: chat.send("Go on.", max_new_tokens=1), monkeypatch)
    assert chat._cached.token_ids.size
    whole = first_logits(model, lambda: fresh(model, chat.messages[:-1], max_new_tokens=1), monkeypatch)
    # fp32 sums of another order; a cache entry that is wrong shows above 0.1
    assert np.abs(kept - whole).max() < 1e-4
    again = chat.send("And?", max_new_tokens=1)
    assert again.cached_tokens > len(first.prompt_token_ids) + 9


def test_an_answer_that_tokenises_otherwise_is_computed_anew_from_there(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may spell a text in other tokens than the tokenizer does: the next turn's own tokens count."""
    letters = [i for letter in "the cat is here" for i in model.processor.tokenizer.encode(letter).ids]
    assert letters != model.processor.tokenizer.encode("the cat is here").ids
    chat = model.chat()
    with monkeypatch.context() as patch:
        first = chat.send("Hello", **forced(model, patch, letters))
    kept = first_logits(model, lambda: chat.send("Go on.", max_new_tokens=1), monkeypatch)
    whole = first_logits(model, lambda: fresh(model, chat.messages[:-1], max_new_tokens=1), monkeypatch)
    assert np.abs(kept - whole).max() < 1e-4
    assert chat.messages[1]["content"] == "the cat is here"
    assert len(first.token_ids) == len(letters)


def test_a_placeholder_that_the_model_spells_out_does_not_end_the_conversation(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled = [i for letter in "so <|image_pad|> it is" for i in model.processor.tokenizer.encode(letter).ids]
    chat = model.chat()
    with monkeypatch.context() as patch:
        chat.send("Hello", **forced(model, patch, spelled))
    assert chat.messages[-1]["content"] == "so  it is"
    assert chat.send("Go on.", max_new_tokens=2).token_ids


def test_one_answer_of_a_conversation_at_a_time(model: Model) -> None:
    chat = model.chat()
    pieces = chat.stream("Tell me a story.", max_new_tokens=50, ignore_eos=True)
    next(pieces)
    for ask in (lambda: chat.send("And?"), lambda: chat.stream("And?"), chat.reset):
        with pytest.raises(RequestError, match="an answer of this conversation is unfinished"):
            ask()
    pieces.close()
    late = chat.stream("Two?", max_new_tokens=4)
    chat.send("Three?", max_new_tokens=4)
    with pytest.raises(RequestError, match="has gone on since"):
        next(late)
    second = chat.send("Four?", max_new_tokens=4)
    assert second.token_ids == fresh(model, chat.messages[:-1], max_new_tokens=4)


def test_a_turn_asked_again_in_a_full_cache_is_answered_again(build: Any) -> None:
    _, path = build("requests_64", tiny_config(), max_length=64)
    model = load(path)
    size = len(model.processor.prepare([{"role": "user", "content": ""}]).token_ids)
    text = "x" * (64 - size)
    chat = model.chat()
    first = chat.send(text, max_new_tokens=1)
    assert len(first.prompt_token_ids) == 64
    chat.messages = []
    assert chat.send(text, max_new_tokens=1).token_ids == first.token_ids
    with pytest.raises(RequestError, match=r"the artifact's cache 64; .*; or forget the turns before: reset"):
        chat.send("More")


def test_answers_from_altered_weights_enter_no_conversation(artifact: Path, tmp_path: Path) -> None:
    moved = Path(copytree(artifact, tmp_path / "moved"))
    (weights,) = (moved / "weights").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    model = load(moved)
    chat = model.chat()
    with pytest.raises(ArtifactError, match="altered or damaged"):
        chat.send("Hello", max_new_tokens=4)
    assert chat.messages == []
    with pytest.raises(ArtifactError, match="altered or damaged"):
        model.generate_batch([QUESTION, OTHER], max_new_tokens=4)


def test_patches_of_earlier_pictures_are_held_once(model: Model) -> None:
    chat = model.chat()
    for _ in range(6):
        chat.send("And this?", [RED], max_new_tokens=1)
    pictures = [part["image"] for message in chat.messages for part in message["content"] if "image" in part]
    assert len(pictures) == 6
    assert all(picture.patches.base is None for picture in pictures)


def test_a_picture_that_differs_is_not_taken_for_the_one_in_the_cache(model: Model) -> None:
    chat = model.chat()
    chat.send("What is this?", [RED], max_new_tokens=4)
    # the history edited by the program: another picture of the same size in the same place
    chat.messages[0]["content"][0]["image"] = BLUE
    second = chat.send("And now?", max_new_tokens=6)
    assert second.cached_tokens == second.prompt_token_ids.index(model.processor.config.image_token_id)
    assert second.token_ids == fresh(model, chat.messages[:-1], max_new_tokens=6)


def test_an_interrupted_answer_leaves_a_conversation_that_goes_on(model: Model) -> None:
    chat = model.chat()
    pieces = chat.stream("Tell me a story.", max_new_tokens=200, ignore_eos=True)
    said = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    second = chat.send("Shorter.", max_new_tokens=6)
    assert second.cached_tokens > 0
    assert second.token_ids == fresh(model, chat.messages[:-1], max_new_tokens=6)


def test_a_refused_turn_leaves_no_trace(model: Model) -> None:
    chat = model.chat()
    first = chat.send("Hello", max_new_tokens=4)
    before = list(chat.messages)
    for text, settings in (("word " * 2000, {}), ("Hi", {"max_new_tokens": 5000}), ("Hi", {"top_p": 3.0})):
        with pytest.raises(RequestError):
            chat.send(text, **settings)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="images: got str, expected a list"):
        chat.send("Hi", "red.png")
    assert chat.messages == before
    second = chat.send("Again", max_new_tokens=4)
    assert second.cached_tokens > len(first.prompt_token_ids) - 2
    assert second.token_ids == fresh(model, chat.messages[:-1], max_new_tokens=4)


def test_a_failure_in_prefill_does_not_poison_the_next_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = model.chat()
    chat.send("Hello", max_new_tokens=4)
    prefill = model.backend.prefill

    def fails(cache: Any, row: int, start: int, token_ids: Any, *rest: Any) -> Any:
        prefill(cache, row, start, token_ids, *rest)
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(model.backend, "prefill", fails)
        chat.send("Another thing altogether, which is long.", max_new_tokens=4)
    second = chat.send("Go on.", max_new_tokens=6)
    assert second.token_ids == fresh(model, chat.messages[:-1], max_new_tokens=6)


def test_reset_forgets_all_but_the_system_message(model: Model) -> None:
    chat = model.chat("Be brief.")
    first = chat.send("Hello", max_new_tokens=4)
    chat.reset()
    again = chat.send("Hello", max_new_tokens=4)
    assert again.cached_tokens == 0
    assert again.token_ids == first.token_ids


def test_draws_do_not_depend_on_what_else_is_in_the_batch(model: Model) -> None:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.4, "top_k": 0, "seed": 7, "max_new_tokens": 12}
    alone = [model.generate(request, **settings).token_ids for request in (QUESTION, OTHER)]
    together = model.generate_batch([QUESTION, OTHER], **settings)
    assert [answer.token_ids for answer in together] == alone
    assert np.unique(alone[0]).size > 3
