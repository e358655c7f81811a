"""Sampling: the processed logits are those of transformers' own processors, and draws follow them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen2vl_tc.artifacts.errors import RequestError, ToolchainError
from qwen2vl_tc.runtime.requests.sampling import Sampler, check_logits, probabilities, process_logits
from qwen2vl_tc.runtime.requests.settings import SETTINGS, GivenSettings, Settings, settings_for

VOCAB = 211
DEFAULTS = Settings(eos_token_ids=(7, 9))


def theirs(logits: np.ndarray, settings: Settings, seen: list[int], prompt: int) -> np.ndarray:
    """What transformers' generate makes of these logits: its own choice and order of processors."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    config = GenerationConfig(
        do_sample=settings.do_sample,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        min_new_tokens=settings.min_new_tokens or None,
        eos_token_id=sorted(settings.eos_token_ids),
        num_beams=1,
    )
    config._eos_token_tensor = torch.tensor(sorted(settings.eos_token_ids))

    class Bare(GenerationMixin):  # type: ignore[misc]
        config = type("Config", (), {"is_encoder_decoder": False})
        device = torch.device("cpu")

    processors = Bare()._get_logits_processor(config, input_ids_seq_length=prompt, device="cpu")
    found: np.ndarray = processors(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])[0].numpy()
    return found


@hypothesis_settings(deadline=None)  # the first example imports transformers
@given(
    seed=st.integers(0, 10**6),
    do_sample=st.booleans(),
    temperature=st.sampled_from([0.01, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 50, VOCAB, 1000]),
    top_p=st.sampled_from([0.001, 0.3, 0.8, 0.99, 1.0]),
    penalty=st.sampled_from([0.8, 1.0, 1.05, 1.5]),
    made=st.integers(0, 4),
    least=st.sampled_from([0, 2]),
)
def test_processed_logits_are_those_of_transformers(
    seed: int, do_sample: bool, temperature: float, top_k: int, top_p: float, penalty: float, made: int, least: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, VOCAB).astype(np.float32)
    seen = rng.integers(0, VOCAB, 20).tolist()
    settings = Settings(
        eos_token_ids=(7, 9),
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        min_new_tokens=least,
    )
    ours = process_logits(logits, settings, seen, made)
    expected = theirs(logits, settings, seen, len(seen) - made)
    assert np.array_equal(np.isinf(ours), np.isinf(expected))
    # one division and one product in fp32, in the same order
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_the_comparison_sees_every_processor() -> None:
    """What the test above compares does depend on each setting."""
    logits = np.random.default_rng(0).normal(0, 4, VOCAB).astype(np.float32)
    seen = list(range(20))
    plain = Settings(eos_token_ids=(7,), do_sample=True, top_k=0)
    base = theirs(logits, plain, seen, 19)
    for name, value in (
        ("temperature", 0.7),
        ("top_k", 5),
        ("top_p", 0.5),
        ("repetition_penalty", 1.2),
        ("min_new_tokens", 3),
    ):
        assert not np.array_equal(theirs(logits, dataclasses.replace(plain, **{name: value}), seen, 19), base), name


def test_draws_follow_the_distribution() -> None:
    settings = Settings(eos_token_ids=(), do_sample=True, top_k=4, temperature=0.9, seed=11)
    logits = np.random.default_rng(1).normal(0, 2, VOCAB).astype(np.float32)
    expected = probabilities(process_logits(logits, settings, (), 0))
    sampler = Sampler(settings)
    draws = 4000
    counts = np.bincount([sampler.choose(logits, (), 0) for _ in range(draws)], minlength=VOCAB)
    assert np.flatnonzero(counts).tolist() == np.flatnonzero(expected).tolist()
    # 4 standard deviations of a binomial at its widest, 0.5 / sqrt(draws)
    assert np.abs(counts / draws - expected).max() < 4 * 0.5 / np.sqrt(draws)


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    logits = np.random.default_rng(2).normal(0, 1, VOCAB).astype(np.float32)

    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Settings(eos_token_ids=(), do_sample=True, top_k=0, seed=seed))
        return [sampler.choose(logits, (), 0) for _ in range(20)]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    assert drawn(None) != drawn(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_without_a_number_to_go_by_are_an_error(bad: float) -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[3] = bad
    with pytest.raises(ToolchainError, match=r"prefill: its logits hold (nan|inf)"):
        check_logits(logits, "prefill")


def test_what_a_request_leaves_out_comes_from_the_checkpoint() -> None:
    defaults = dataclasses.replace(
        DEFAULTS, do_sample=True, temperature=0.3, top_k=12, top_p=0.7, repetition_penalty=1.05, stop=("x",)
    )
    settings = settings_for(defaults, VOCAB, {"temperature": 0.5, "top_p": None})
    assert (settings.temperature, settings.top_k, settings.top_p) == (0.5, 12, 0.7)
    assert (settings.repetition_penalty, settings.stop, settings.eos_token_ids) == (1.05, ("x",), (7, 9))


def test_the_table_of_settings_is_what_callers_may_give() -> None:
    assert list(SETTINGS) == list(GivenSettings.__annotations__)


def test_the_published_settings_are_decoded_on_the_device() -> None:
    """Qwen2-VL is published with do_sample and top_k 1: the largest logit."""
    published = dataclasses.replace(DEFAULTS, do_sample=True, temperature=0.01, top_k=1, top_p=0.001)
    assert settings_for(published, VOCAB, {}).takes_largest_logit
    assert not settings_for(published, VOCAB, {"top_k": 2}).takes_largest_logit
    assert not settings_for(DEFAULTS, VOCAB, {"repetition_penalty": 1.1}).takes_largest_logit


def test_a_temperature_that_the_published_top_k_makes_idle_is_refused_by_name() -> None:
    published = dataclasses.replace(DEFAULTS, do_sample=True, temperature=0.01, top_k=1, top_p=0.001)
    with pytest.raises(RequestError, match=r"temperature given, but the checkpoint's own top_k is 1, .* top_k=50"):
        settings_for(published, VOCAB, {"temperature": 0.8, "seed": 1})
    assert not settings_for(published, VOCAB, {"temperature": 0.8, "top_k": 50}).takes_largest_logit


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"tempreature": 1.0}, "unknown setting tempreature; there are max_new_tokens, "),
        ({"do_sample": True, "temperature": 0}, "temperature is 0, .* do_sample=False"),
        ({"do_sample": True, "temperature": 1e-38}, "temperature is 1e-38, .* do_sample=False"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "temperature": 10**400}, "temperature is 1000"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot', expected a number above"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5, expected a number above 0 and at most 1"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1, expected an integer of at least 0"),
        ({"top_k": 5, "top_p": 0.5}, r"top_k, top_p given without sampling; add do_sample=True"),
        ({"do_sample": 1}, "do_sample is 1, expected True or False"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ["a", ""]}, "stop is .*none empty"),
        ({"stop": 3}, "stop is 3"),
        ({"eos_token_id": VOCAB}, "eos_token_id is .* expected token ids below 211"),
        ({"min_new_tokens": 9, "max_new_tokens": 4}, "min_new_tokens 9 is above max_new_tokens 4"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        settings_for(DEFAULTS, VOCAB, given_settings)
