"""The tiny models, and tokens with special ones among them."""

from __future__ import annotations

import pytest

from tests.tiny import BOS, EOS, PAD, tiny_models, tiny_tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens():
    """Seven rows: BOS first; one packed with EOS and BOS in the middle, one padded on the right."""
    tokens = tiny_tokens(sequences=7, positions=13)
    tokens[2, 5], tokens[2, 6] = EOS, BOS
    tokens[4, 9], tokens[4, 10:] = EOS, PAD
    return tokens
