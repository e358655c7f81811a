"""The small files of a checkpoint: links, sizes and contents that no load could use are refused at convert."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.synthetic import tiny_config, write_checkpoint

from qwen2vl_tc.artifacts.errors import ConfigError, ToolchainError
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.runtime.loader import open_processor
from qwen2vl_tc.toolchain.weights.convert import convert
from qwen2vl_tc.toolchain.weights.files import MAX_BYTES

READ = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "chat_template.jinja", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "generation_config.json", "additional_chat_templates/default.jinja"),
)
TEXTS = tuple(name for name in READ if name.endswith(".jinja"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("files") / "hf", tiny_config(), tokenizer=True)
    # transformers refuses named templates beside it
    (folder / "chat_template.json").unlink()
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


def refused(folder: Path, said: str, error: type[ToolchainError] = ConfigError) -> None:
    with pytest.raises(error, match=said) as caught:
        convert(folder, folder.parent / "out", sync=False)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith((".", "out"))) == []


def put(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("name", READ)
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    shutil.move(folder / name, secret) if (folder / name).exists() else secret.write_text("{}")
    put(folder, name).symlink_to(secret)
    refused(folder, rf"{name}: leads out of the checkpoint's folder, to .*secret; copy the file there instead")


def test_a_folder_of_templates_that_leads_elsewhere_is_refused(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "default.jinja").write_text("hi")
    (folder / "additional_chat_templates").symlink_to(folder.parent / "elsewhere")
    refused(folder, r"additional_chat_templates/default\.jinja: leads out of the checkpoint's folder")


@pytest.mark.parametrize("name", READ)
def test_a_link_within_the_folder_is_followed(folder: Path, name: str) -> None:
    path = put(folder, name) if not (folder / name).exists() else folder / name
    if path.exists():
        path.rename(folder / "kept")
    else:
        (folder / "kept").write_text('{"chat_template": "hi"}')
    path.symlink_to(os.path.relpath(folder / "kept", path.parent))
    convert(folder, folder.parent / "out", sync=False)


def test_a_snapshot_in_hugging_faces_cache_is_read_through_its_links(folder: Path) -> None:
    model = folder.parent / "models--Qwen--tiny"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(model / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, folder.parent / "out", sync=False)


@pytest.mark.parametrize("name", READ)
def test_a_file_of_absurd_size_is_refused_without_reading_it(folder: Path, name: str) -> None:
    path = put(folder, name)
    path.touch()
    os.truncate(path, 3 << 30)
    refused(folder, rf"{name}: has {3 << 30} bytes, at most {MAX_BYTES}")


@pytest.mark.parametrize("name", [name for name in READ if name != "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    make(put(folder, name))
    refused(folder, rf"{name}: is not a regular file")


def test_links_in_a_circle_and_to_nothing_are_refused(folder: Path) -> None:
    put(folder, "added_tokens.json").symlink_to("added_tokens.json")
    refused(folder, r"added_tokens\.json: cannot read: links in a circle")
    put(folder, "added_tokens.json").symlink_to("absent")
    refused(folder, r"added_tokens\.json: is a link to a file that is not there")


CONTENTS = {
    "no JSON": (b"not json", "not valid JSON"),
    "binary": (b"\x00\xff\xfe", "not valid JSON"),
    "byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark"),
    "duplicates": (b'{"a": 1, "a": 2}', "'a' appears twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "a list": (b"[]", "expected a JSON object"),
    "too deep": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", [name for name in READ if name not in (*TEXTS, "tokenizer.json")])
def test_text_that_is_no_strict_json_is_refused(folder: Path, name: str, content: str) -> None:
    data, said = CONTENTS[content]
    put(folder, name).write_bytes(data)
    refused(folder, rf"{name}: .*{said}")


@pytest.mark.parametrize("name", TEXTS)
def test_a_template_that_is_no_text_is_refused(folder: Path, name: str) -> None:
    put(folder, name).write_bytes(b"\xff\xfe")
    refused(folder, rf"{name}: not UTF-8")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"num_beams": 4},
            r"num_beams is 4, which is not supported; remove it from the checkpoint's generation_config",
        ),
        ({"no_repeat_ngram_size": 3}, r"no_repeat_ngram_size is 3"),
        ({"bad_words_ids": [[1]]}, r"bad_words_ids is"),
        ({"eos_token_id": 320}, r"eos_token_id is 320, expected a token id below 320"),
        ({"temperature": "hot"}, r"temperature is 'hot'"),
        ({"do_sample": True, "temperature": 1e-40}, r"temperature is 1e-40, expected"),
        ({"top_p": 2}, r"top_p is 2"),
        ({"stop_strings": [""]}, r"stop_strings is \[''\]"),
    ],
)
def test_generation_settings_that_a_request_would_refuse_are_refused(
    folder: Path, values: dict[str, object], said: str
) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    refused(folder, rf"hf/generation_config\.json: {said}")


def preprocessor(values: dict[str, object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        plain = json.loads(path.read_text())
        for name in ("min_pixels", "max_pixels"):
            if "size" in values:
                plain.pop(name)
        path.write_text(json.dumps({**plain, **values}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (preprocessor({"do_resize": False}), r"preprocessor_config\.json: do_resize is False"),
        (preprocessor({"do_convert_rgb": "no"}), r"do_convert_rgb is 'no'"),
        (preprocessor({"resample": 0}), r"resample is 0, expected 3"),
        (preprocessor({"size": {"height": 28, "width": 28}}), r"size has \['height', 'width'\] and no shortest_edge"),
        (preprocessor({"size": {"shortest_edge": 3136}}), r"size has \['shortest_edge'\] and no longest_edge"),
        (preprocessor({"size": 448}), r"size is 448"),
        (preprocessor({"min_pixels": 10**9}), r"min_pixels 1000000000 is above max_pixels"),
        (lambda f: (f / "chat_template.jinja").write_text("{% for %}"), r"chat_template\.jinja: "),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].nothing.more }}"), r"chat_template\.jinja: "),
    ],
)
def test_what_a_load_or_a_request_would_refuse_is_refused(
    folder: Path, change: Callable[[Path], object], said: str
) -> None:
    change(folder)
    refused(folder, said)


def test_a_template_may_refuse_a_conversation(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('a picture is needed') }}")
    convert(folder, folder.parent / "out", sync=False)


def test_a_load_finds_each_thing_said_once(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "added_tokens.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ eos_token }}!")
    convert(folder, folder.parent / "out", sync=False)
    with open_artifact(folder.parent / "out") as artifact:
        assert {Path(entry.path).name for entry in artifact.manifest.processor} == {
            *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
            *("preprocessor_config.json", "generation_config.json"),
        }
        processor = open_processor(artifact)
        assert processor.prepare([{"role": "user", "content": "hi"}]).text == "<|im_end|>!"
