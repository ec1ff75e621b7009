"""What a study will take of an endpoint, told before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jumprelu_plugin.studies.explain.endpoint import EXPLAIN_TOKENS
from jumprelu_plugin.studies.explain.latents import StudyLatent
from jumprelu_plugin.studies.explain.prompts import (
    Messages,
    explain_messages,
    judge_messages,
    simulate_messages,
)
from jumprelu_plugin.studies.explain.settings import BackendSettings, ExplainSettings

# Characters in a token of English and numbers, low so that the estimate is rather too high.
_CHARACTERS = 3.2
_EXPLANATION = "x" * 80
_TOKENS_A_LINE = 5


@dataclass(frozen=True)
class Estimate:
    """Requests and tokens of a study with nothing answered yet.

    Attributes:
        requests: number of requests.
        tokens_in, tokens_out: tokens of requests and replies.
        dollars: at the settings' prices; None without prices.
    """

    requests: int
    tokens_in: int
    tokens_out: int
    dollars: float | None

    def __str__(self) -> str:
        price = "" if self.dollars is None else f", ${self.dollars:,.2f}"
        return (
            f"about {self.requests:,} requests, {self.tokens_in:,} tokens in and "
            f"{self.tokens_out:,} out{price}"
        )


def estimate(
    latents: Sequence[StudyLatent], settings: ExplainSettings, backend: BackendSettings
) -> Estimate:
    """The requests that `score_latents` will make through `Chat`."""
    requests, characters, out = 0, 0, 0

    def add(messages: Messages, tokens_out: int, times: int = 1) -> None:
        nonlocal requests, characters, out
        requests += times
        characters += times * sum(len(message["content"]) for message in messages)
        out += times * tokens_out

    for latent in latents:
        add(explain_messages(latent.shown), EXPLAIN_TOKENS // 3)
        for window in latent.held_out:
            lines = _TOKENS_A_LINE * len(window.pieces)
            add(simulate_messages(_EXPLANATION, window.pieces), lines, 3 if settings.nulls else 1)
        if settings.judge:
            texts = [window.text for window in latent.held_out]
            for marked in (False, True):
                add(judge_messages(_EXPLANATION, texts, marked), _TOKENS_A_LINE * len(texts))
    tokens_in = round(characters / _CHARACTERS)
    dollars = None
    if backend.price_in is not None and backend.price_out is not None:
        dollars = (tokens_in * backend.price_in + out * backend.price_out) / 1e6
    return Estimate(requests, tokens_in, out, dollars)
