"""config.json: what is left out is transformers' default, what cannot be computed is refused by name, no traceback."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from helpers.synthetic import nested_config, published, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLConfig

from qwen2vl_tc.artifacts.errors import ConfigError
from qwen2vl_tc.runtime.models import config_from_hf
from qwen2vl_tc.runtime.models.config import ModelConfig
from qwen2vl_tc.runtime.models.qwen2 import TEXT_DEFAULTS, WHOLE_DEFAULTS
from qwen2vl_tc.runtime.models.qwen2_vl import VISION_DEFAULTS
from qwen2vl_tc.toolchain.weights.notes import config_notes

PUBLISHED = [published("2b"), published("7b"), published("72b")]


def as_transformers(plain: dict[str, Any]) -> ModelConfig:
    """What transformers' classes make of it, in our words."""
    # they change the objects they are given
    config = Qwen2VLConfig(**copy.deepcopy(plain))
    text, vision = config.text_config, config.vision_config
    return ModelConfig(
        model_type=config.model_type,
        text=type(config_from_hf(published("7b")).text)(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            vocab_size=text.vocab_size,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=text.rope_parameters["rope_theta"],
            # Qwen2VLRotaryEmbedding's default
            mrope_section=tuple(text.rope_parameters.get("mrope_section", [16, 24, 24])),
            tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=text.max_position_embeddings,
        ),
        vision=type(config_from_hf(published("7b")).vision)(
            depth=vision.depth,
            embed_dim=vision.embed_dim,
            num_heads=vision.num_heads,
            mlp_dim=int(vision.embed_dim * vision.mlp_ratio),
            in_channels=vision.in_channels,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            hidden_size=vision.hidden_size,
        ),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
    )


def layouts(plain: dict[str, Any]) -> list[dict[str, Any]]:
    return [copy.deepcopy(plain), nested_config(copy.deepcopy(plain))]


def text_of(plain: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plain.get("text_config", plain)
    return found


def holders(plain: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """Every object in which a field may stand."""
    text = text_of(plain)
    inner = [text.get(name) for name in ("rope_scaling", "rope_parameters")]
    return [each for each in (plain, text, plain["vision_config"], *inner) if isinstance(each, dict) and field in each]


FIELDS = sorted({*TEXT_DEFAULTS, *VISION_DEFAULTS, *WHOLE_DEFAULTS, "rope_scaling", "rope_parameters"})


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_left_out_has_the_default_of_transformers_class(field: str, layout: int) -> None:
    compared = 0
    for config in PUBLISHED:
        plain = layouts(config)[layout]
        for holder in holders(plain, field):
            changed = copy.deepcopy(plain)
            # the same object of the copy
            for each in holders(changed, field):
                if each == holder:
                    del each[field]
            wanted = as_transformers(changed)
            try:
                assert config_from_hf(changed) == wanted
            except ConfigError as error:
                # a default that contradicts the rest of this shape
                assert "must" in str(error) or "differs from" in str(error) or "sums to" in str(error), error
                continue
            compared += 1
    # hidden_size is 8192 and the vision tower's 3584, which fit no published model together
    assert compared or not holders(layouts(PUBLISHED[0])[layout], field) or field == "hidden_size"


def test_everything_left_out_is_the_default_class() -> None:
    fits = {"model_type": "qwen2_vl", "vision_config": {"hidden_size": 8192}}
    for plain in (fits, {**fits, "text_config": {}}, {**fits, "text_config": None}):
        assert config_from_hf(plain) == as_transformers(plain)
    plain = {**published("7b"), "vision_config": None}
    assert config_from_hf(plain) == config_from_hf(published("7b"))


def test_what_4_46_saved_of_7b_is_7b() -> None:
    """Only what differs from the class is in its vision_config, and the token ids are left out."""
    plain = published("7b")
    plain["vision_config"] = {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        del plain[name]
    plain["rope_scaling"] = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    assert config_from_hf(plain) == config_from_hf(published("7b"))


def test_null_means_one_key_value_head_per_head() -> None:
    plain = tiny_config(num_key_value_heads=None)
    assert config_from_hf(plain) == as_transformers(plain)
    assert config_from_hf(plain).text.num_kv_heads == 4


@pytest.mark.parametrize("outer", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_tied_as_transformers_ties(outer: bool | None, inner: bool | None) -> None:
    plain = nested_config(published("7b"))
    del plain["tie_word_embeddings"]
    if outer is not None:
        plain["tie_word_embeddings"] = outer
    if inner is not None:
        plain["text_config"]["tie_word_embeddings"] = inner
    assert config_from_hf(plain) == as_transformers(plain)
    assert bool(config_notes(plain)) == ({outer, inner} == {False, True})


PLAIN_ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
ROPES: dict[str, dict[str, Any]] = {
    "older": {"rope_scaling": PLAIN_ROPE},
    "older with theta": {"rope_scaling": {**PLAIN_ROPE, "rope_theta": 3e4}},
    "empty older": {"rope_scaling": {}},
    "null older": {"rope_scaling": None},
    "newer": {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 28, 28], "rope_theta": 2e4}},
    "newer without theta": {"rope_parameters": {"rope_type": "default", "type": "mrope"}},
    "theta": {"rope_theta": 1e4},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("older", [None, "older", "older with theta", "empty older", "null older"])
@pytest.mark.parametrize("newer", [None, "newer", "newer without theta"])
@pytest.mark.parametrize("theta", [None, "theta"])
def test_the_rotary_embedding_is_read_where_transformers_reads_it(
    nested: bool, older: str | None, newer: str | None, theta: str | None
) -> None:
    plain = nested_config(published("7b")) if nested else published("7b")
    for name in ("rope_scaling", "rope_parameters", "rope_theta"):
        text_of(plain).pop(name, None)
    for name in filter(None, (older, newer, theta)):
        text_of(plain).update(copy.deepcopy(ROPES[name]))
    wanted = as_transformers(plain)
    assert config_from_hf(plain) == wanted


def test_a_rotary_embedding_that_does_not_count_is_named() -> None:
    plain = published("7b")
    assert config_notes(plain) == ()
    plain["rope_parameters"] = {**PLAIN_ROPE, "mrope_section": [8, 28, 28]}
    assert any("rope_parameters says another mrope_section" in note for note in config_notes(plain))
    plain["rope_parameters"] = {**PLAIN_ROPE, "rope_type": "default", "rope_theta": 1e4}
    assert config_from_hf(plain) == as_transformers(plain)
    assert any("rope_parameters says another rope_theta" in note for note in config_notes(plain))
    plain["rope_theta"] = 1e4
    assert config_notes(plain) == ()


def test_fields_at_the_top_of_a_nested_config_that_do_not_count_are_named() -> None:
    plain = nested_config(published("7b"))
    assert config_notes(plain) == ()
    plain |= {"num_hidden_layers": 27, "hidden_size": 3584}
    plain["text_config"]["image_token_id"] = 5
    assert config_from_hf(plain) == as_transformers(plain)
    said = " ".join(config_notes(plain))
    assert "num_hidden_layers 27 at the top does not count" in said
    assert "image_token_id 5 does not count" in said
    assert "hidden_size" not in said


SCALINGS: list[dict[str, Any]] = [
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0},
    {"type": "mrope", "rope_type": "yarn", "factor": 2.0},
    {"rope_type": "default", "type": "yarn", "factor": 2.0},
    {"type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    {"rope_type": "llama3", "factor": 8.0},
    {"type": "su"},
    {"rope_type": ["yarn"]},
    {"rope_type": None},
    {"type": "mrope", "factor": 4.0},
    {"type": "default", "attention_factor": 1.2},
    {"type": "mrope", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "yarn", "factor": 2.0}},
    {"type": "mrope", "mrope_interleaved": True},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("place", ["flat", "text_config", "beside", "top of nested"])
def test_other_rotary_embeddings_are_refused_by_name_wherever_they_stand(
    place: str, name: str, scaling: dict[str, Any]
) -> None:
    plain = published("7b") if place == "flat" else nested_config(published("7b"))
    holder = plain if place == "top of nested" else text_of(plain)
    if place in ("flat", "text_config"):
        for other in ("rope_scaling", "rope_parameters"):
            holder.pop(other, None)
    elif place == "beside" and name == "rope_parameters":
        holder["rope_parameters"], name = holder["rope_parameters"], "rope_scaling"
    holder[name] = {"mrope_section": [16, 24, 24], **scaling}
    with pytest.raises(ConfigError, match=rf"config\.json: .*{name}"):
        config_from_hf(plain)


@pytest.mark.parametrize("nested", [False, True])
def test_a_scaling_beside_a_plain_rope_scaling_is_not_dropped(nested: bool) -> None:
    plain = nested_config(published("7b")) if nested else published("7b")
    text_of(plain)["rope_scaling"] = dict(PLAIN_ROPE)
    text_of(plain)["rope_parameters"] = {**PLAIN_ROPE, "rope_type": "yarn", "factor": 4.0}
    with pytest.raises(ConfigError, match=r"rope_parameters\.rope_type is 'yarn', which is not supported"):
        config_from_hf(plain)


def change_text(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: text_of(plain).update(values)


def change_vision(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["vision_config"].update(values)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_text(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
        (change_text(use_sliding_window=True), "use_sliding_window is True"),
        (change_text(use_sliding_window="false"), "use_sliding_window is 'false'"),
        (change_text(attention_bias=False), "attention_bias is False"),
        (change_text(mlp_bias=True), "mlp_bias is True"),
        (change_text(head_dim=256), "head_dim is 256, expected 128"),
        (change_text(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (change_text(layer_types=["full_attention"] * 27 + ["sliding_attention"]), "layer_types is"),
        (change_text(layer_types="full_attention"), "layer_types is"),
        (change_vision(hidden_act="gelu"), "vision_config.hidden_act is 'gelu', expected 'quick_gelu'"),
        (change_vision(in_chans=1), "vision_config.in_chans is 1"),
        (change_vision(num_hidden_layers=2), "vision_config.num_hidden_layers is 2, expected 32, like depth"),
        (change_vision(rope_parameters={"rope_theta": 5e5}), "vision_config.rope_parameters.rope_theta is 500000.0"),
        (lambda plain: plain.update(quantization_config={"quant_method": "gptq"}), r"quantization_config: .*\(gptq\)"),
        (lambda plain: plain.update(quantization_config=["x"]), r"quantization_config: .*\(unknown\)"),
    ],
)
def test_fields_that_would_change_the_arithmetic_are_refused_by_name(
    change: Callable[[dict[str, Any]], None], said: str, layout: int
) -> None:
    plain = layouts(published("7b"))[layout]
    change(plain)
    with pytest.raises(ConfigError, match=said):
        config_from_hf(plain)


WRONG = ["1", "x", [], [1], {}, {"a": 1}, None, True, -1, 0, 0.5, -0.5, 10**30, 1e308, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("field", FIELDS)
def test_a_value_of_a_wrong_type_or_size_is_an_error_that_names_the_field(field: str, layout: int) -> None:
    refused = 0
    for value in WRONG:
        plain = layouts(published("7b"))[layout]
        for holder in holders(plain, field):
            holder[field] = value
        try:
            config_from_hf(plain)
        except ConfigError as error:
            # a section that does not fit is told by its sum and the head's size
            words = (field, field.removeprefix("num_hidden_"), "mrope_section")
            assert any(word in str(error) for word in words), error
            assert len(str(error)) < 400
            refused += 1
    assert refused >= 8 or not holders(layouts(published("7b"))[layout], field)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.booleans(),
    st.dictionaries(
        st.sampled_from([*FIELDS, "text_config", "vision_config", "layer_types", "head_dim"]), JSON, max_size=3
    ),
    st.sampled_from(["", "text_config", "vision_config"]),
)
def test_no_config_at_all_raises_anything_else(nested: bool, values: dict[str, Any], where: str) -> None:
    plain = layouts(tiny_config())[nested]
    holder = plain.get(where, plain)
    holder.update(values)
    try:
        config = config_from_hf(plain)
    except ConfigError:
        return
    json.dumps(config.text.rope_theta)
    assert config.text.head_dim > 0
