"""The tiny models and some text."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import Tiny, tiny_models, tiny_tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_models(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return tiny_tokens(sequences=23, positions=19)
