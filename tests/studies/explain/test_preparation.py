"""Contexts of a thousand latents take memory for the contexts, not for the text."""

from __future__ import annotations

import pytest

from jumprelu_plugin.studies.explain.latents import StudyLatent, study_latents
from jumprelu_plugin.studies.explain.settings import ExplainSettings
from jumprelu_plugin.studies.sweep.measures import PeakMemory
from tests.studies.explain.known import known_sae, known_text

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES, LENGTH = 331, 61


def prepared(sequences: int) -> tuple[list[StudyLatent], int]:
    """The latents with their contexts, and the peak of memory in bytes."""
    model, tokens, directions = known_text(FEATURES, sequences, LENGTH)
    sae = known_sae(directions, [(0, 1)])
    settings = ExplainSettings(latents=300, sequences=sequences)
    memory = PeakMemory("cpu")
    with memory.measured():
        latents = study_latents("known", "sae", model, sae, tokens, settings)
    assert memory.bytes is not None
    return latents, memory.bytes


def test_memory_does_not_grow_with_the_text() -> None:
    few, small = prepared(150)
    many, large = prepared(1200)
    assert len(few) == len(many) == 300
    assert all(1 < len(each.shown) <= 10 for each in many)
    # All activations of the longer text are 98 MB; beside a busy core this varies by 10 MB.
    assert large < small + 25e6
