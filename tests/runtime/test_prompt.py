"""A request becomes the ids, patches and positions that transformers' processor makes of it."""

import base64
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.synthetic import tiny_config, write_checkpoint
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from qwen2vl_tc.artifacts.errors import ArtifactError, RequestError
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.runtime.models.config import ModelConfig
from qwen2vl_tc.runtime.pictures.patches import PatchGrid, image_patches
from qwen2vl_tc.runtime.text.prompt import Processor
from qwen2vl_tc.toolchain.verify.hf_processor import default_image_processor

CONFIG = config_from_hf(tiny_config())


class PicturesOnly(Qwen2VLProcessor):
    """transformers' processor without its video half, which needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config(), tokenizer=True)


@pytest.fixture(scope="module")
def files(folder) -> dict[str, bytes]:
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json")
    return {name: (folder / name).read_bytes() for name in (*kept, "generation_config.json")}


@pytest.fixture(scope="module")
def processor(files) -> Processor:
    return Processor(files, CONFIG)


@pytest.fixture(scope="module")
def original(folder) -> PicturesOnly:
    pictures = default_image_processor(folder, do_rescale=False, do_normalize=False)
    return PicturesOnly(pictures, AutoTokenizer.from_pretrained(folder))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image(width: int, height: int, seed: int = 0) -> dict:
    return {"type": "image", "image": picture(width, height, seed)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*content: dict) -> dict:
    return {"role": "user", "content": list(content)}


CONVERSATIONS = {
    "text": [{"role": "user", "content": "What is the capital of France?"}],
    "system and turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "naïve café 日本語 👩‍👩‍👧 e\u0301"},
        {"role": "assistant", "content": "Hi there."},
        {"role": "user", "content": "  spaces \n\n and\tlines  "},
    ],
    "control tokens typed by the user": [
        {"role": "user", "content": "a<|im_end|>\n<|im_start|>system\n<|endoftext|>b"}
    ],
    "an image": [user(image(100, 60), text("What is this?"))],
    "an image after the text": [user(text("What is this?"), image(300, 500))],
    "two images": [user(image(100, 60), image(30, 400, 1), text("Compare."))],
    "images over turns": [
        {"role": "system", "content": [text("Look closely.")]},
        user(text("First "), image(64, 64), text(" and "), image(200, 90, 1)),
        {"role": "assistant", "content": [text("A cat.")]},
        user(image(28, 28, 2), text("And now?")),
    ],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("numbered", [False, True], ids=["plain", "add_vision_id"])
@pytest.mark.parametrize("answer", [True, False], ids=["to answer", "as it is"])
def test_a_request_becomes_what_transformers_makes_of_it(processor, original, messages, numbered, answer):
    prompt = processor.prepare(messages, add_vision_id=numbered, add_generation_prompt=answer)
    expected = original.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_vision_id=numbered, add_generation_prompt=answer
    )
    assert prompt.token_ids.dtype == np.int64 and prompt.patches.dtype == np.uint8
    assert prompt.token_ids.tolist() == expected["input_ids"][0]
    grids = np.asarray(expected.get("image_grid_thw", np.empty((0, 3))))
    np.testing.assert_array_equal(prompt.grids, grids)
    if len(grids):
        np.testing.assert_array_equal(prompt.patches, expected["pixel_values"])
    assert [each.kind for each in prompt.pictures] == ["image"] * len(grids)
    assert prompt.vision_slots.tolist() == np.flatnonzero(expected["mm_token_type_ids"][0]).tolist()
    assert prompt.positions.shape == (3, len(prompt.token_ids))
    assert prompt.positions.max() + 1 == len(prompt.token_ids) + prompt.delta


class Counted:
    """A picture that counts how often its pixels are asked for."""

    def __init__(self, pixels):
        self.pixels, self.reads = pixels, 0

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return self.pixels


def test_a_picture_is_read_and_its_grid_computed_once_however_often_it_is_used(processor, monkeypatch):
    cut, start = [], PatchGrid.__init__
    monkeypatch.setattr(PatchGrid, "__init__", lambda self, *given: cut.append(given[:3]) or start(self, *given))
    shown = [Counted(np.asarray(picture(56, 84, i))) for i in range(4)]
    content = [{"type": "image", "image": shown[0]}, {"type": "video", "video": shown[1:], "min_pixels": 3136}]
    prompt = processor.prepare([user(*content)])
    assert [each.reads for each in shown] == [1, 1, 1, 1]
    assert cut == [(1, 84, 56), (3, 84, 56)]
    # the records go into the next request as they are
    again = processor.prepare([user(*({"type": each.kind, each.kind: each} for each in prompt.pictures))])
    assert again.pictures == prompt.pictures and again.token_ids.tolist() == prompt.token_ids.tolist()
    assert [each.reads for each in shown] == [1, 1, 1, 1] and len(cut) == 2
    assert prompt.spans == tuple(
        (int(slots[0]), int(slots[-1]) + 1) for slots in np.split(prompt.vision_slots, [prompt.pictures[0].tokens(2)])
    )


def test_patches_of_a_clip_are_no_picture(processor):
    (clip,) = processor.prepare([user({"type": "video", "video": [picture(56, 56)] * 2})]).pictures
    with pytest.raises(RequestError, match=r"content\[0\]: its patches are of kind video, expected image"):
        processor.prepare([user({"type": "image", "image": clip})])


def test_a_prompt_as_text_takes_its_images_in_order(processor, original):
    words = "<|vision_start|><|image_pad|><|vision_end|>and<|vision_start|><|image_pad|><|vision_end|>: compare"
    pictures = [picture(100, 60), picture(60, 100, 1)]
    prompt = processor.prepare(words, pictures)
    expected = original(text=words, images=pictures)
    assert prompt.token_ids.tolist() == expected["input_ids"][0]
    np.testing.assert_array_equal(prompt.patches, expected["pixel_values"])


def test_pictures_and_clips_keep_their_order_of_appearance(processor):
    frames = [picture(56, 56, i) for i in range(3)]
    clip = {"type": "video", "video": frames, "min_pixels": 3136}
    prompt = processor.prepare([user(image(84, 56, 7), text("then"), clip, image(56, 84, 8))])
    assert [each.kind for each in prompt.pictures] == ["image", "video", "image"]
    assert prompt.grids.tolist() == [[1, 4, 6], [2, 4, 4], [1, 6, 4]]
    first, last = (image_patches(picture(*size), processor.settings)[0] for size in ((84, 56, 7), (56, 84, 8)))
    np.testing.assert_array_equal(prompt.patches[:24], first)
    np.testing.assert_array_equal(prompt.patches[-24:], last)
    kinds = prompt.token_ids[prompt.vision_slots]
    assert kinds.tolist() == [CONFIG.image_token_id] * 6 + [CONFIG.video_token_id] * 8 + [CONFIG.image_token_id] * 6
    # one position per merged row and column; time runs over the clip's two steps
    assert set(prompt.positions[0, prompt.vision_slots[6:14]] - prompt.positions[0, prompt.vision_slots[6]]) == {0, 1}


def test_a_clip_given_as_one_array_equals_its_frames(processor):
    frames = [picture(60, 90, i) for i in range(4)]
    one = processor.prepare([user({"type": "video", "video": np.stack([np.asarray(f) for f in frames])})])
    listed = processor.prepare([user({"type": "video", "video": frames})])
    np.testing.assert_array_equal(one.patches, listed.patches)
    assert one.token_ids.tolist() == listed.token_ids.tolist()


def test_items_without_data_take_the_pictures_given_beside_the_messages(processor):
    inside = processor.prepare([user(image(64, 64), text("and"), image(96, 64, 1))])
    beside = processor.prepare(
        [user({"type": "image"}, text("and"), {"type": "image"})], [picture(64, 64), picture(96, 64, 1)]
    )
    assert inside.token_ids.tolist() == beside.token_ids.tolist()
    np.testing.assert_array_equal(inside.patches, beside.patches)


@pytest.mark.parametrize("key", ["image", "url", "path"])
def test_a_picture_is_read_from_a_path_under_any_of_its_names(processor, tmp_path, key):
    picture(70, 50).save(tmp_path / "cat.png")
    expected = processor.prepare([user(image(70, 50))])
    prompt = processor.prepare([user({"type": "image", key: str(tmp_path / "cat.png")})])
    np.testing.assert_array_equal(prompt.patches, expected.patches)
    openai = {"type": "image_url", "image_url": {"url": (tmp_path / "cat.png").as_uri()}}
    np.testing.assert_array_equal(processor.prepare([user(openai)]).patches, expected.patches)


def test_a_large_picture_inside_the_message_does_not_count_as_text(processor, tmp_path):
    picture(900, 600).save(tmp_path / "large.png")
    data = base64.b64encode((tmp_path / "large.png").read_bytes()).decode()
    assert len(data) > 1 << 20
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}
    expected = processor.prepare([user(image(900, 600))])
    np.testing.assert_array_equal(processor.prepare([user(url)]).patches, expected.patches)


def test_pixel_bounds_stand_beside_each_picture(processor):
    small = {**image(400, 400), "max_pixels": 28 * 28 * 4}
    prompt = processor.prepare([user(small, image(400, 400))])
    assert prompt.grids.tolist() == [[1, 4, 4], [1, 28, 28]]
    assert len(prompt.vision_slots) == 4 + 196


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "non-empty"),
        ({"role": "user", "content": "hi"}, "non-empty"),
        (["hi"], r"messages\[0\].*role"),
        ([{"role": "user"}], r"messages\[0\]"),
        ([{"role": "user", "content": "hi", "tool_calls": []}], "tool_calls"),
        ([{"role": "robot", "content": "hi"}], "system, user, assistant"),
        ([{"role": ["user"], "content": "hi"}], "system, user, assistant"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([user("hi")], r"content\[0\].*'hi'"),
        ([user({"type": "audio", "audio": "x.wav"})], "audio"),
        ([user({"type": ["image"]})], r"content\[0\]"),
        ([user({"text": "hi"})], "no type"),
        ([user({"type": "text", "text": 3})], "int"),
        ([user({"type": "text", "text": "x", "image": "y"})], r"content\[0\]"),
        ([user({"type": "image"})], 'has no "image"'),
        ([user({**image(40, 40), "resized_height": 28})], "resized_height"),
        ([user({"type": "image", "image": "a.png", "path": "b.png"})], "more than one"),
        ([user({"type": "image", "image": "absent.png"})], r"messages\[0\]\.content\[0\]: absent\.png"),
        ([user({"type": "image", "image": "https://example.com/cat.png"})], "download it"),
        ([user({**image(40, 40), "min_pixels": "many"})], "min_pixels"),
        ([user({"type": "video", "video": "absent.mp4"})], r"content\[0\]: absent\.mp4"),
        ([user({"type": "video", "video": []})], "no frames"),
        ([user(text("a <|image_pad|> of mine"), image(40, 40))], r"content\[0\].*<\|image_pad\|>"),
        ([{"role": "user", "content": "<|video_pad|>"}], r"content.*<\|video_pad\|>"),
        ([{"role": "user", "content": "lone \ud800 surrogate"}], "tokenised"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_its_place(processor, messages, said):
    with pytest.raises(RequestError, match=said):
        processor.prepare(messages)


@pytest.mark.parametrize(
    ("request_", "images", "videos", "said"),
    [
        ("no place", [picture(40, 40)], [], "0 <|image_pad|> for 1 image"),
        ("<|image_pad|>", [], [], "1 <|image_pad|> for 0 image"),
        ("<|image_pad|><|video_pad|>", [picture(40, 40)], [], "1 <|video_pad|> for 0 video"),
        ([user(text("hi"))], [picture(40, 40)], [], "images[0]: has no place"),
        ([user({"type": "image"})], [picture(40, 40)] * 2, [], "images[1]: has no place"),
        ([user(text("hi"))], [], [[picture(40, 40)]], "videos[0]: has no place"),
        ("<|image_pad|>", "cat.png", [], "expected a list"),
        ("", [], [], "empty"),
    ],
)
def test_pictures_and_placeholders_must_match(processor, request_, images, videos, said):
    with pytest.raises(RequestError) as caught:
        processor.prepare(request_, images, videos)
    assert said in str(caught.value)


def test_a_template_that_drops_a_picture_is_noticed(files):
    dropping = Processor({**files, "chat_template.jinja": b"{{ messages[0].role }}"}, CONFIG)
    with pytest.raises(RequestError, match=r"0 <.image_pad.> for 1 image"):
        dropping.prepare([user(image(40, 40))])


def test_the_processors_own_template_goes_before_the_tokenizers(files):
    def source(*names: str) -> str:
        held = {
            "chat_template.jinja": b"jinja",
            "chat_template.json": b'{"chat_template": "json"}',
            "tokenizer_config.json": b'{"chat_template": [{"name": "default", "template": "tokenizer"}]}',
        }
        kept = {name: data for name, data in files.items() if name not in held}
        chosen = Processor({**kept, **{name: held[name] for name in names}}, CONFIG)
        return chosen.prepare([{"role": "user", "content": "hi"}]).text

    assert source("chat_template.jinja", "chat_template.json", "tokenizer_config.json") == "jinja"
    assert source("chat_template.json", "tokenizer_config.json") == "json"
    assert source("tokenizer_config.json") == "tokenizer"
    with pytest.raises(ArtifactError, match="chat template"):
        source()


def test_without_a_template_a_prompt_as_text_still_works(files):
    bare = {name: files[name] for name in ("tokenizer.json", "preprocessor_config.json")}
    assert len(Processor(bare, CONFIG).prepare("hello").token_ids) > 0


@pytest.mark.parametrize("missing", ["tokenizer.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(files, missing):
    with pytest.raises(ArtifactError, match=missing):
        Processor({name: data for name, data in files.items() if name != missing}, CONFIG)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("chat_template.json", b'{"chat_template": 3}'),
        ("chat_template.jinja", b"\xff"),
        ("preprocessor_config.json", b'{"patch_size": 16}'),
        ("generation_config.json", b'{"temperature": "hot"}'),
    ],
)
def test_a_damaged_file_is_named(files, name, data):
    with pytest.raises(ArtifactError, match=name):
        Processor({**files, name: data}, CONFIG)


def test_a_tokenizer_without_the_models_placeholders_is_refused(files):
    other = tiny_config(vocab_size=400)
    config: ModelConfig = config_from_hf(other)
    with pytest.raises(ArtifactError, match="placeholder"):
        Processor(files, config)


def test_the_published_generation_config_is_read_as_it_is(processor, files):
    plain = json.loads(files["generation_config.json"])
    defaults = processor.generation
    assert defaults.eos_token_ids == tuple(plain["eos_token_id"])
    assert (defaults.do_sample, defaults.top_k, defaults.top_p) == (True, 1, 0.001)
    assert defaults.temperature == 0.01
    assert (defaults.repetition_penalty, defaults.default_new_tokens) == (1.0, None)


def test_without_a_generation_config_answers_end_at_the_tokenizers_ends(files):
    bare = Processor({name: data for name, data in files.items() if name != "generation_config.json"}, CONFIG)
    ends = [bare.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert list(bare.generation.eos_token_ids) == ends
    assert not bare.generation.do_sample


@pytest.mark.parametrize(
    "plain",
    [
        {"eos_token_id": "151645"},
        {"eos_token_id": [5, 10**6]},
        {"eos_token_id": -1},
        {"eos_token_id": True},
        {"pad_token_id": 1.0},
        {"do_sample": 1},
        {"temperature": -0.1},
        {"temperature": True},
        {"temperature": 1e999},
        {"do_sample": True, "temperature": 0.0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.5},
        {"do_sample": True, "top_p": 0.0},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[1]]},
        [],
    ],
    ids=str,
)
def test_generation_settings_that_cannot_be_honoured_are_refused(files, plain):
    with pytest.raises(ArtifactError, match=r"generation_config\.json"):
        Processor({**files, "generation_config.json": json.dumps(plain).replace("Infinity", "1e999").encode()}, CONFIG)


def test_generated_ids_come_back_as_text(processor):
    ids = [*processor.prepare("the cat 日本").token_ids.tolist(), processor.generation.eos_token_ids[0]]
    assert processor.decode(ids) == "the cat 日本"
    stream = processor.stream()
    assert "".join(stream.feed(i) for i in ids) + stream.flush() == "the cat 日本"


def test_preparing_a_request_needs_neither_torch_nor_transformers(folder):
    code = """
import sys
from pathlib import Path
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.runtime.text.prompt import Processor
import json
folder = Path(sys.argv[1])
files = {path.name: path.read_bytes() for path in folder.glob("*.json")}
prompt = Processor(files, config_from_hf(json.loads(files["config.json"]))).prepare("hello")
assert len(prompt.token_ids)
loaded = {"torch", "torch_npu", "torchvision", "transformers"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
