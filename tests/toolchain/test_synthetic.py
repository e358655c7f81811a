"""Random checkpoints are what transformers takes for a Qwen2-VL checkpoint, and what their options say."""

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.synthetic import nested_config, published, tiny_config, write_checkpoint
from helpers.synthetic_tokenizer import SPECIAL_TOKENS
from safetensors.numpy import load_file

from qwen2vl_tc.runtime.models import config_from_hf


@pytest.mark.parametrize(
    ("layout", "names", "tied"), list(itertools.product(("flat", "nested"), ("legacy", "new"), (False, True)))
)
def test_transformers_loads_every_form_whole_with_logits_of_order_5(
    tmp_path: Path, layout: str, names: str, tied: bool
) -> None:
    import torch
    import transformers

    write_checkpoint(
        tmp_path, tiny_config(tie_word_embeddings=tied), dtype="fp32", layout=layout, names=names, tokenizer=True
    )
    model, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    logits = model(input_ids=torch.arange(40)[None]).logits
    assert 3 < logits.std() < 8


def test_the_tokenizer_round_trips_text_and_special_tokens(tmp_path: Path) -> None:
    import transformers

    config = tiny_config()
    write_checkpoint(tmp_path, config, tokenizer=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "The thing: ünï 北京 42"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids.count(config["image_token_id"]) == 1
    assert max(ids) < config["vocab_size"]
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config["video_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == config["eos_token_id"]


def test_published_special_tokens_have_their_ids() -> None:
    config = published("7b")
    assert config["image_token_id"] == 151655 == 151643 + SPECIAL_TOKENS.index("<|image_pad|>")
    assert published("2b")["rope_scaling"]["mrope_section"] == [16, 24, 24]


@pytest.mark.parametrize("size", ["2b", "7b", "72b"])
def test_both_config_layouts_describe_one_model(size: str) -> None:
    assert config_from_hf(published(size)) == config_from_hf(nested_config(published(size)))


def test_values_depend_on_the_seed_alone(tmp_path: Path) -> None:
    single = load_file(write_checkpoint(tmp_path / "a", tiny_config(), dtype="fp32") / "model.safetensors")
    folder = write_checkpoint(tmp_path / "b", tiny_config(), dtype="fp32", shards=3)
    sharded = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    assert single.keys() == sharded.keys()
    assert all(np.array_equal(single[name], sharded[name]) for name in single)
    rounded = load_file(write_checkpoint(tmp_path / "c", tiny_config(), dtype="bf16") / "model.safetensors")
    assert all(np.array_equal(single[name].astype(ml_dtypes.bfloat16), rounded[name]) for name in single)
    other = load_file(write_checkpoint(tmp_path / "d", tiny_config(), dtype="fp32", seed=1) / "model.safetensors")
    assert not any(np.array_equal(single[name], other[name]) for name in single)
