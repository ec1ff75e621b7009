"""The text of each token, for any tokenizer.

Decoding a token alone can lose information: Llama's tokenizers drop the leading space of a text, so
that `▁people` and `people` look the same, and a byte-level token that is a part of a character
(most tokens of 日本 or 😀) decodes to U+FFFD. Therefore a token is decoded after another token, and
a part of a character is given as its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

_NOT_TEXT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # byte fallback: Llama, Gemma, Mistral


class TokenTexts:
    """The texts of a tokenizer's tokens. Each token is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._bytes: dict[int, bytes] = {}

    def text(self, token: int) -> str:
        r"""The text of `token` with its leading space; a part of a character is shown as `\xe6`."""
        return self.join([token])

    def join(self, tokens: Iterable[int]) -> str:
        """The text of consecutive tokens, in which a character of several tokens is complete."""
        content = b"".join(self.utf8(token) for token in tokens)
        return content.decode("utf-8", errors="backslashreplace")

    def utf8(self, token: int) -> bytes:
        """The UTF-8 bytes of `token`'s text; those of its name for a special token."""
        if token not in self._bytes:
            self._bytes[token] = self._read(token)
        return self._bytes[token]

    def _read(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a model's vocabulary can be padded beyond the tokenizer's
            return f"<{token}>".encode()
        if token in self._special:
            return name.encode()
        # Decoded after itself, because tokenizers change a space only before the first token.
        once, twice = (self._decode([token] * count) for count in (1, 2))
        text = twice.removeprefix(once) if twice.startswith(once) else once
        if _NOT_TEXT in text and _NOT_TEXT not in name:
            return _bytes_of_name(name)
        return text.encode()

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _bytes_of_name(name: str) -> bytes:
    """The bytes of a token of byte fallback or byte-level BPE, which name every byte."""
    byte = _BYTE.fullmatch(name)
    if byte:
        return bytes.fromhex(byte[1])
    table = _byte_level_alphabet()
    if all(character in table for character in name):
        return bytes(table[character] for character in name)
    return name.encode()


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """The byte for which each character stands in byte-level BPE (GPT-2's `bytes_to_unicode`).

    Printable bytes stand for themselves, the others for U+0100, U+0101, ... in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
