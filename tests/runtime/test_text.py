"""Streaming gives, in pieces, the text that decoding at once gives."""

import pytest
from helpers.synthetic import tiny_config
from helpers.synthetic_tokenizer import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.runtime.text.stream import TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tiny_config())
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # tokens of one's own, which byte-level decoding does not spell in its alphabet
    loaded.add_tokens(["<my own token>", "日本 語"])
    return loaded


def pieces_of(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = TextStream(tokenizer, **options)
    return [*(stream.feed(token_id) for token_id in ids), stream.flush()]


TEXTS = [
    "",
    "the cat is in the water",
    "naïve café, Ωmega, 日本語のテキスト, עברית",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈 and \U0001f600",
    "<|im_start|>user\nhi<|im_end|>\n",
    "line\r\n\ttab\x00nul\ufffd replacement",
    "<my own token> and 日本 語",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_joined_are_the_decoded_text(tokenizer, text, skip):
    ids = tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_comes_whole_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("a日b").ids
    assert len(ids) == 5
    assert pieces_of(tokenizer, ids) == ["a", "", "", "日", "b", ""]


def test_every_piece_of_valid_text_is_valid_text(tokenizer):
    ids = tokenizer.encode("".join(TEXTS).replace("\ufffd", "")).ids
    assert not any("\ufffd" in piece for piece in pieces_of(tokenizer, ids))


def test_text_cut_inside_a_character_ends_as_decode_ends_it(tokenizer):
    ids = tokenizer.encode("a日").ids[:-1]
    assert pieces_of(tokenizer, ids) == ["a", "", "", "\ufffd"]
    assert tokenizer.decode(ids) == "a\ufffd"


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 400), max_size=40), st.booleans())
def test_any_ids_at_all_decode_as_at_once(tokenizer, ids, skip):
    # most are invalid UTF-8, and those above the vocabulary are no token at all
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(
        ids, skip_special_tokens=skip
    )


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_text_decodes_as_at_once(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=False)) == tokenizer.decode(
        ids, skip_special_tokens=False
    )


def test_each_id_is_looked_up_once_however_long_the_text(tokenizer):
    class Counting:
        """The tokenizer, with its uses counted."""

        def __init__(self) -> None:
            self.calls = 0
            self.decoder = tokenizer.decoder
            self.get_added_tokens_decoder = tokenizer.get_added_tokens_decoder

        def id_to_token(self, token_id: int) -> str:
            self.calls += 1
            return tokenizer.id_to_token(token_id)

    counting = Counting()
    ids = tokenizer.encode("日").ids[:2] * 500
    pieces_of(counting, ids)
    assert counting.calls == len(ids)


def test_a_stream_can_be_used_again_after_a_flush(tokenizer):
    stream = TextStream(tokenizer)
    first, *_ = tokenizer.encode("日").ids
    stream.feed(first)
    stream.flush()
    assert stream.feed(tokenizer.encode("a").ids[0]) == "a"


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    other = Tokenizer(models.BPE())
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        TextStream(other)
    other.decoder = decoders.WordPiece()
    with pytest.raises(ArtifactError, match="WordPiece"):
        TextStream(other)
