"""What the study asks of a language model: to explain, to simulate and to judge.

Each role takes many tasks at once, so that an endpoint can work on several and a local model can
batch them. None in place of a result means that the model gave none that can be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jumprelu_plugin.studies.sampling.texts import TextWindow


@dataclass(frozen=True)
class SimulationTask:
    """Predict a latent's activation on each piece of a text.

    Attributes:
        explanation: of the latent.
        pieces: the pieces of the text, in order.
    """

    explanation: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class JudgeTask:
    """Say which texts fit an explanation.

    Attributes:
        explanation: of the latent.
        texts: the texts.
        marked: whether pieces are marked with << and >>, and these are to fit (fuzzing), in place
            of the whole text (detection).
    """

    explanation: str
    texts: tuple[str, ...]
    marked: bool


class Explainer(Protocol):
    """Writes an explanation from windows with activations."""

    def explain(self, tasks: Sequence[Sequence[TextWindow]]) -> list[str | None]:
        """One explanation for the windows of each latent."""
        ...


class Simulator(Protocol):
    """Predicts activations from an explanation."""

    def simulate(self, tasks: Sequence[SimulationTask]) -> list[list[float] | None]:
        """A number for each piece, on any scale."""
        ...


class Judge(Protocol):
    """Judges texts by an explanation."""

    def judge(self, tasks: Sequence[JudgeTask]) -> list[list[float] | None]:
        """For each text the degree from 0 to 1 to which it fits."""
        ...


@dataclass(frozen=True)
class Roles:
    """The three roles, and what a record says of who plays them."""

    explainer: Explainer
    simulator: Simulator
    judge: Judge
    about: Mapping[str, Any]
