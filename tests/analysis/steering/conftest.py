"""The tiny models and some text."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_models, tiny_tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens():
    return tiny_tokens(sequences=5, positions=13)
