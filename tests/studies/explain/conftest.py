"""The embedded model and some text, read once for all commands of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from jumprelu_plugin.formats.saved import SavedDictionary
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from jumprelu_plugin.models.options import ModelChoice


@pytest.fixture(scope="module")
def loaded_once(one_thread_throughout: None) -> Iterator[None]:
    """Reading the model and the text takes seconds, and tests/studies/rating does it."""
    model = load_model(EMBEDDED_MODEL)
    tokens = torch.randint(9, 4000, (14, 32), generator=torch.Generator().manual_seed(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelChoice, "load", lambda self: model)
        patch.setattr(SavedDictionary, "sequences", lambda self, n, **_: (tokens[:0], tokens[:n]))
        yield
