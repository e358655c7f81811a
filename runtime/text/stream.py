"""Token ids to text, piece by piece."""

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from ...artifacts.errors import ArtifactError


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order.

    Source: GPT-2's byte-to-unicode table, which tokenizers' ByteLevel shares.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TextStream:
    """Decode a growing list of ids; the pieces joined equal tokenizer.decode of all ids.

    A character whose bytes span several tokens comes out with the token that completes it; bytes that can no longer
    become a character come out as U+FFFD, as in tokenizer.decode. Each id costs its own bytes only.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        """Raises ArtifactError when the tokenizer is not byte-level (Qwen2-VL's is)."""
        if not isinstance(tokenizer.decoder, ByteLevel):
            raise ArtifactError(f"tokenizer.json: decoder is {type(tokenizer.decoder).__name__}, expected ByteLevel")
        self._tokenizer = tokenizer
        self._bytes = _byte_of_character()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special} if skip_special_tokens else set()

    def feed(self, token_id: int) -> str:
        """The text that this id completes, often empty. An id outside the vocabulary adds nothing."""
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        alphabet = self._bytes
        # an added token may hold characters outside the alphabet: it then stands for its own UTF-8
        whole = all(character in alphabet for character in token)
        data = bytes(alphabet[character] for character in token) if whole else token.encode("utf-8")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end of the text: what was held back, as U+FFFD. The stream is then empty and can be fed anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class StopStrings:
    """Says when an answer's text, special tokens included, comes to hold one of some strings."""

    def __init__(self, stream: TextStream, strings: Sequence[str]) -> None:
        self._stream = stream
        self._strings = strings
        self._longest = max(map(len, strings))
        self._tail = ""

    def ended_by(self, token_id: int) -> bool:
        """Feed the next token; true if it completes a string."""
        text = self._tail + self._stream.feed(token_id)
        self._tail = text[-self._longest :]
        return any(string in text for string in self._strings)
