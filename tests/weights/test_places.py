"""Where several files may say one thing, convert takes what transformers takes: compared for every combination."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.synthetic import tiny_config, write_checkpoint
from transformers import AutoTokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen2vl_tc.artifacts.errors import ConfigError
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.runtime.text.prompt import Processor
from qwen2vl_tc.toolchain.weights.processor import ProcessorFiles, read_processor

# the tokenizer's own size: a new token gets the next id
PLAIN = tiny_config(vocab_size=294)
CONFIG = config_from_hf(PLAIN)
ADDED = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without its weights."""
    folder = write_checkpoint(tmp_path_factory.mktemp("places") / "hf", PLAIN, tokenizer=True)
    (folder / "model.safetensors").unlink()
    (folder / "chat_template.json").unlink()
    edit(folder / "tokenizer_config.json", lambda plain: plain.pop("chat_template"))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def read(folder: Path) -> ProcessorFiles:
    return read_processor(folder, CONFIG, PLAIN)


def subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for count in range(len(names) + 1):
        yield from itertools.combinations(names, count)


def tokenizer_config(folder: Path, **values: Any) -> None:
    edit(folder / "tokenizer_config.json", lambda plain: plain.update(values))


def text(path: Path, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode())


TEMPLATES: dict[str, Callable[[Path], None]] = {
    "joint": lambda f: text(f / "processor_config.json", '{"chat_template": "of processor_config"}'),
    "json": lambda f: text(f / "chat_template.json", '{"chat_template": "of json"}'),
    "jinja": lambda f: text(f / "chat_template.jinja", "of jinja\r\nin two lines"),
    "named default": lambda f: text(f / "additional_chat_templates/default.jinja", "of default.jinja"),
    "named": lambda f: text(f / "additional_chat_templates/rag.jinja", "of rag.jinja"),
    "tokenizer": lambda f: tokenizer_config(f, chat_template="of tokenizer_config"),
}


@pytest.mark.parametrize("places", list(subsets(tuple(TEMPLATES))), ids="+".join)
def test_the_chat_template_is_the_one_of_transformers_processor(folder: Path, places: tuple[str, ...]) -> None:
    for place in places:
        TEMPLATES[place](folder)
    try:
        wanted = Qwen2VLProcessor.get_processor_dict(str(folder))[0].get("chat_template")
    except ValueError:
        with pytest.raises(ConfigError, match=r"transformers refuses chat_template\.json beside"):
            read(folder)
        return
    if wanted is None:
        # the processor then has none, and its tokenizer is asked
        wanted = AutoTokenizer.from_pretrained(str(folder)).chat_template
    if isinstance(wanted, dict) and "default" not in wanted:
        with pytest.raises(ConfigError, match="none of them called default"):
            read(folder)
        return
    found = read(folder)
    source = found.files.get("chat_template.jinja")
    assert (source and source.decode()) == (wanted["default"] if isinstance(wanted, dict) else wanted)
    rivals = [place for place in places if place != "named"]
    assert any("chat template" in note for note in found.notes) == (len(rivals) > 1)


@pytest.mark.parametrize(
    "value",
    [
        {"default": "first", "rag": "second"},
        [{"name": "rag", "template": "second"}, {"name": "default", "template": "first"}],
        "first",
    ],
)
def test_named_templates_of_the_tokenizer_count_by_their_default(folder: Path, value: Any) -> None:
    tokenizer_config(folder, chat_template=value)
    wanted = AutoTokenizer.from_pretrained(str(folder)).get_chat_template()
    assert read(folder).files["chat_template.jinja"].decode() == wanted == "first"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", "{}"),
        ("chat_template.json", '{"chat_template": ["x"]}'),
        ("chat_template.json", '{"chat_template": {"rag": "x"}}'),
        ("processor_config.json", '{"chat_template": 5}'),
        ("chat_template.json", '{"chat_template": "{% if %}"}'),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(folder: Path, name: str, content: str) -> None:
    text(folder / name, content)
    with pytest.raises(ConfigError, match="chat_template"):
        read(folder)


BOUNDS = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
PICTURES: dict[str, dict[str, Any]] = {
    "processor_config.json": {
        "min_pixels": None,
        "max_pixels": None,
        "image_mean": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 3136, "longest_edge": 50176},
        **BOUNDS,
    },
    "preprocessor_config.json": {"max_pixels": 401408, "size": {"shortest_edge": 784, "longest_edge": 12544}, **BOUNDS},
    "video_preprocessor_config.json": {"max_pixels": 7840},
}


@pytest.mark.parametrize("inside", [None, {}, PICTURES["processor_config.json"], {"do_rescale": False}], ids=str)
@pytest.mark.parametrize("beside", [None, {}, PICTURES["preprocessor_config.json"]], ids=str)
@pytest.mark.parametrize("joint", [False, True])
def test_the_image_processor_is_transformers(folder: Path, joint: bool, inside: Any, beside: Any) -> None:
    (folder / "preprocessor_config.json").unlink()
    if joint:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": inside}))
    if beside is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(beside))
    try:
        wanted = Qwen2VLImageProcessorPil.from_pretrained(str(folder))
    except OSError:
        with pytest.raises(ConfigError, match=r"preprocessor_config\.json is missing"):
            read(folder)
        return
    found = read(folder)
    settings = Processor(found.files, CONFIG).settings
    assert (settings.min_pixels, settings.max_pixels) == (wanted.size["shortest_edge"], wanted.size["longest_edge"])
    assert list(found.folding.image_mean) == list(wanted.image_mean)
    assert found.folding.rescale_factor == (wanted.rescale_factor if wanted.do_rescale else 1)
    both = joint and inside is not None and beside is not None
    assert any("image_processor" in note for note in found.notes) == (both and inside != beside)


def test_clips_that_are_normalized_otherwise_than_pictures_are_refused(folder: Path) -> None:
    (folder / "video_preprocessor_config.json").write_text('{"max_pixels": 7840}')
    read(folder)
    (folder / "video_preprocessor_config.json").write_text('{"image_std": [0.5, 0.5, 0.5]}')
    with pytest.raises(ConfigError, match=r"video_preprocessor_config\.json: rescales or normalizes clips otherwise"):
        read(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "image_processor_type is 'CLIPImageProcessor', expected Qwen2VL",
        ),
        ({"do_center_crop": True}, "do_center_crop is true without a crop_size"),
        ({"do_pad": 1}, "do_pad is 1, expected true or false"),
        ({"do_resize": None}, "do_resize is null"),
        ({"do_rescale": None}, "do_rescale is null"),
        ({"do_normalize": None}, "do_normalize is null"),
        ({"image_mean": None}, "image_mean is null"),
    ],
)
def test_pictures_of_another_processor_are_refused(folder: Path, values: dict[str, Any], said: str) -> None:
    edit(folder / "preprocessor_config.json", lambda plain: plain.update(values))
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: {said}"):
        read(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"do_center_crop": True, "crop_size": {"height": 56, "width": 56}}, "do_center_crop does not count"),
        ({"do_pad": True}, "do_pad does not count"),
        (
            {"size": {"shortest_edge": 9000, "longest_edge": 100}, "min_pixels": 3136, "max_pixels": 12544},
            "size's shortest_edge 9000 does not count, min_pixels 3136 does",
        ),
    ],
)
def test_fields_that_change_no_picture_in_transformers_are_named(
    folder: Path, values: dict[str, Any], said: str
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (100, 140, 3), np.uint8)
    plain = json.loads((folder / "preprocessor_config.json").read_text())
    changed = {**plain, **values}
    without = {name: value for name, value in changed.items() if name != "size" and name not in values.keys() - plain}
    (folder / "preprocessor_config.json").write_text(json.dumps(changed))
    before, after = (Qwen2VLImageProcessorPil(**each)(picture)["pixel_values"] for each in (without, changed))
    assert np.array_equal(before, after)
    assert any(f"preprocessor_config.json: {said}" in note for note in read(folder).notes)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"fps": "two"}, "fps is 'two', expected a positive number"),
        ({"fps": 0}, "fps is 0"),
        ({"min_frames": -1}, "min_frames is -1, expected a positive integer"),
        ({"max_frames": 2.5}, r"max_frames is 2\.5"),
        ({"do_sample_frames": "yes"}, "do_sample_frames is 'yes'"),
        ({"video_processor_type": "LlavaVideoProcessor"}, "video_processor_type is 'LlavaVideoProcessor'"),
    ],
)
@pytest.mark.parametrize("joint", [False, True])
def test_clips_of_another_processor_are_refused(folder: Path, values: dict[str, Any], said: str, joint: bool) -> None:
    name = "processor_config.json" if joint else "video_preprocessor_config.json"
    (folder / name).write_text(json.dumps({"video_processor": values} if joint else values))
    with pytest.raises(ConfigError, match=rf"{name}.*: {said}"):
        read(folder)


def test_how_the_checkpoint_samples_clips_is_said_not_to_count(folder: Path) -> None:
    path = folder / "video_preprocessor_config.json"
    path.write_text('{"fps": 1.5, "min_frames": 4, "max_frames": 768, "num_frames": null}')
    (note,) = read(folder).notes
    assert "fps 1.5 does not count; a request says how its clips are sampled" in note


def eos_in_map(folder: Path, value: Any) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": value, "bos_token": "<|im_start|>"}))


TOKENS: dict[str, Callable[[Path], None]] = {
    "no decoder": lambda f: edit(f / "tokenizer_config.json", lambda plain: plain.pop("added_tokens_decoder")),
    "config": lambda f: tokenizer_config(f, eos_token="<|im_start|>"),
    "map": lambda f: eos_in_map(f, "<|im_end|>"),
    "map of objects": lambda f: eos_in_map(f, {"content": "<|click|>", **ADDED}),
    "added": lambda f: text(f / "added_tokens.json", '{"<|click|>": 294, "word": 295}'),
    "as stored": lambda f: tokenizer_config(f, tokenizer_class="PreTrainedTokenizerFast"),
}
SENTENCE = "a <|click|> word<|im_end|><|tap|> <|image_pad|> <|vision_pad|>\n"


def same_as_transformers(folder: Path) -> ProcessorFiles:
    """Read the folder; its tokenizer encodes, decodes and names special tokens as transformers' does."""
    wanted = AutoTokenizer.from_pretrained(str(folder))
    found = read(folder)
    ours = Processor(found.files, CONFIG)
    assert json.loads(found.files.get("tokenizer_config.json", b"{}")) == {
        name: value for name, value in wanted.special_tokens_map.items() if name not in ("image_token", "tap")
    }
    ids = wanted(SENTENCE)["input_ids"]
    assert ours.tokenizer.encode(SENTENCE).ids == ids
    for skip in (False, True):
        assert ours.decode(ids, skip) == wanted.decode(ids, skip_special_tokens=skip)
    assert "".join(map(ours.stream().feed, ids)) == wanted.decode(ids, skip_special_tokens=True)
    return found


@pytest.mark.parametrize("places", list(subsets(tuple(TOKENS))), ids="+".join)
def test_special_and_added_tokens_are_those_of_transformers(folder: Path, places: tuple[str, ...]) -> None:
    for place in places:
        TOKENS[place](folder)
    same_as_transformers(folder)


LISTS: dict[str, tuple[str, Any]] = {
    "config additional": ("tokenizer_config.json", {"additional_special_tokens": ["<|tap|>"]}),
    "config extra": ("tokenizer_config.json", {"extra_special_tokens": ["<|click|>"]}),
    "config extra empty": ("tokenizer_config.json", {"extra_special_tokens": []}),
    "config extra named": ("tokenizer_config.json", {"extra_special_tokens": {"tap": "<|click|>"}}),
    "map additional": ("special_tokens_map.json", {"additional_special_tokens": ["word"]}),
    "map extra": ("special_tokens_map.json", {"extra_special_tokens": ["<|click|>", {"content": "a", **ADDED}]}),
}


@pytest.mark.parametrize("more", ["", "decoder", "added"])
@pytest.mark.parametrize("places", list(subsets(tuple(LISTS))), ids="+".join)
def test_the_list_of_special_tokens_is_that_of_transformers(folder: Path, places: tuple[str, ...], more: str) -> None:
    if sum(place.startswith("config extra") for place in places) > 1:
        places = tuple(place for place in places if place != "config extra empty")
    config = folder / "tokenizer_config.json"
    for name in ("additional_special_tokens", *(["added_tokens_decoder"] if more != "decoder" else [])):
        edit(config, lambda plain, name=name: plain.pop(name))
    if more == "added":
        text(folder / "added_tokens.json", '{"word": 294, "<|click|>": 295, "<|tap|>": 296}')
    listed: dict[str, set[str]] = {}
    for place in places:
        name, values = LISTS[place]
        if not (folder / name).exists():
            (folder / name).write_text("{}")
        edit(folder / name, lambda plain, values=values: plain.update(values))
        if place == "map additional":
            listed[place] = {"word"}
    notes = same_as_transformers(folder).notes
    special = AutoTokenizer.from_pretrained(str(folder)).all_special_tokens
    if listed and "word" not in special:
        assert any("special_tokens_map.json: additional_special_tokens 'word' do not count" in note for note in notes)


@pytest.mark.parametrize(
    "values",
    [{"pad_token": None}, {"image_token": "<|image_pad|>", "extra_special_tokens": {"tap": "<|tap|>"}}],
    ids=str,
)
@pytest.mark.parametrize("places", list(subsets(("no decoder", "map", "as stored"))), ids="+".join)
def test_null_and_tokens_of_other_names_mean_what_they_mean_there(
    folder: Path, places: tuple[str, ...], values: dict[str, Any]
) -> None:
    tokenizer_config(folder, **values)
    test_special_and_added_tokens_are_those_of_transformers(folder, places)


def decoder(folder: Path, **tokens: dict[str, Any]) -> None:
    """Put tokens, by id, into added_tokens_decoder."""

    def change(plain: dict[str, Any]) -> None:
        for number, values in tokens.items():
            plain["added_tokens_decoder"][number.strip("_")] = {**ADDED, "special": True, **values}

    edit(folder / "tokenizer_config.json", change)


def test_a_token_of_added_tokens_decoder_alone_is_one_token(folder: Path) -> None:
    decoder(folder, _294={"content": "<|click|>"})
    found = same_as_transformers(folder)
    assert Processor(found.files, CONFIG).tokenizer.encode("<|click|>").ids == [294]
    assert any("outside the model's vocabulary" in note for note in found.notes)


def test_a_token_keeps_its_id_where_the_vocabulary_has_a_gap(tmp_path: Path) -> None:
    plain = tiny_config()
    folder = write_checkpoint(tmp_path / "hf", plain, tokenizer=True)
    tokenizer_config(folder, tokenizer_class="PreTrainedTokenizerFast")
    decoder(folder, _320={"content": "<|click|>"})
    found = read_processor(folder, config_from_hf(plain), plain)
    ours = Processor(found.files, config_from_hf(plain)).tokenizer.encode(SENTENCE).ids
    assert ours == AutoTokenizer.from_pretrained(str(folder))(SENTENCE)["input_ids"]
    assert 320 in ours


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized", "special"])
def test_flags_of_added_tokens_decoder_count(folder: Path, flag: str) -> None:
    decoder(folder, _280={"content": "<|endoftext|>"}, _294={"content": "word", flag: flag != "special"})
    same_as_transformers(folder)


@pytest.mark.parametrize("places", list(subsets(("no decoder", "as stored"))), ids="+".join)
def test_a_named_token_is_special_as_in_transformers_whatever_tokenizer_json_says(
    folder: Path, places: tuple[str, ...]
) -> None:
    def plain_text(plain: dict[str, Any]) -> None:
        for token in plain["added_tokens"]:
            token["special"] &= token["content"] != "<|im_end|>"

    edit(folder / "tokenizer.json", plain_text)
    test_special_and_added_tokens_are_those_of_transformers(folder, places)


def test_added_tokens_that_do_not_count_are_named(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda plain: plain["added_tokens_decoder"].pop("291"))
    edit(folder / "tokenizer_config.json", lambda plain: plain.pop("additional_special_tokens"))
    decoder(folder, _330={"content": "<|click|>"})
    (folder / "added_tokens.json").write_text('{"<|tap|>": 295}')
    notes = same_as_transformers(folder).notes
    assert any("'<|vision_pad|>' do not count" in note for note in notes)
    assert any("'<|tap|>' do not count" in note for note in notes)
    assert any("'<|click|> is 294'" in note for note in notes)


def test_a_checkpoint_as_published_gives_no_note_and_its_own_tokenizer(folder: Path) -> None:
    found = same_as_transformers(folder)
    assert found.notes == ()
    assert found.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["model"].update(dropout=0.1), r"model\.dropout is 0\.1"),
        (lambda p: p["model"].update(ignore_merges=True), r"model\.ignore_merges is True"),
        (lambda p: p["model"].update(byte_fallback=True), r"model\.byte_fallback is True"),
        (
            lambda p: p["model"].update(continuing_subword_prefix="##"),
            r"continuing_subword_prefix is ##|cannot be read",
        ),
        (lambda p: p.update(normalizer={"type": "NFKC"}), r"normalizer is .*NFKC"),
        (lambda p: p.update(normalizer=None), r"normalizer is \[\]"),
        (lambda p: p["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), r"pre_tokenizer is .*Removed"),
        (lambda p: p["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), r"add_prefix_space': True"),
    ],
)
def test_a_tokenizer_that_encodes_at_random_or_unlike_transformers_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    edit(folder / "tokenizer.json", change)
    with pytest.raises(ConfigError, match=rf"tokenizer\.json: .*({said})"):
        read(folder)


def test_no_dropout_is_no_dropout(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda plain: plain["model"].update(dropout=0.0))
    same_as_transformers(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"split_special_tokens": True}, "split_special_tokens is True"),
        ({"add_prefix_space": True}, "add_prefix_space is True"),
        ({"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class is 'LlamaTokenizer', expected Qwen2Tokenizer"),
        ({"eos_token": 5}, "eos_token is 5"),
        ({"added_tokens_decoder": []}, r"added_tokens_decoder is \[\]"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, r"added_tokens_decoder\.x: expected a token id"),
        ({"added_tokens_decoder": {"9": {"content": 1}}}, r"added_tokens_decoder\.9 is"),
        ({"additional_special_tokens": "x"}, "additional_special_tokens is 'x'"),
    ],
)
def test_tokenizer_settings_that_cannot_be_met_are_refused(folder: Path, values: dict[str, Any], said: str) -> None:
    tokenizer_config(folder, **values)
    with pytest.raises(ConfigError, match=rf"tokenizer_config\.json: {said}"):
        read(folder)
