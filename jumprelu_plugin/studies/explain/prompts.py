"""Prompts for chat models, and how their replies are read.

The explainer's examples and the two kinds of judging follow Paulo et al. 2024 (arXiv 2410.13928);
simulation follows Bills et al. 2023, with a line for each token, because chat endpoints do not give
the probabilities of a prompt's tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from jumprelu_plugin.studies.sampling.texts import TextWindow

Messages = list[dict[str, str]]

LONGEST_EXPLANATION = 400
SCALE = 10
# Tokens are marked where the latent is at least at this share of its largest activation.
MARKED_SHARE = 0.3

_EXPLAIN = (
    "You study one latent of a sparse autoencoder that was trained on the activations of a "
    "language model. You are given texts in which the latent is active. Tokens on which it is "
    "strongly active are between << and >>, and after each text its most active tokens are "
    "listed with activations from 0 to 10. Find what the marked tokens, or the texts up to "
    "them, have in common. Answer with one short and specific phrase after 'Explanation:', "
    "and nothing else."
)
_SIMULATE = (
    "A latent of a language model is active where its explanation applies. For every numbered "
    "token of a text, predict its activation as a whole number from 0 (not active) to 10 (as "
    "active as it gets). Most tokens are at 0. Reply with one line for each token, its "
    "number, a tab and the activation, and nothing else."
)
_DETECT = (
    "A latent of a language model is active where its explanation applies. For every numbered "
    "text, say whether the latent is active somewhere in it: 1 if it is, 0 if not. Reply with "
    "one line for each text, its number, a tab and 1 or 0, and nothing else."
)
_FUZZ = (
    "A latent of a language model is active where its explanation applies. In every numbered "
    "text, some tokens are between << and >>. Say whether the latent is active on the marked "
    "tokens: 1 if it is, 0 if not. Reply with one line for each text, its number, a tab and 1 "
    "or 0, and nothing else."
)
_LINE = re.compile(r"^\W*(\d{1,4})\W*[\t :.,)|=-]\W*(\d+(?:\.\d+)?)\W*$", re.MULTILINE)


def explain_messages(windows: Sequence[TextWindow]) -> Messages:
    """Ask for an explanation; the windows' activations are on one scale."""
    largest = max(max(window.activations) for window in windows) or 1.0
    lines = []
    for number, window in enumerate(windows, start=1):
        strongest = sorted(zip(window.activations, window.pieces, strict=True), reverse=True)[:4]
        listed = ", ".join(
            f"{json.dumps(piece, ensure_ascii=False)} {round(SCALE * value / largest)}"
            for value, piece in strongest
            if value > 0
        )
        marked = marked_text(window, [a >= MARKED_SHARE * largest for a in window.activations])
        lines.append(f"Text {number}: {marked}\nActivations: {listed}")
    return _messages(_EXPLAIN, "\n\n".join(lines))


def simulate_messages(explanation: str, pieces: Sequence[str]) -> Messages:
    """Ask for an activation for each piece."""
    tokens = "\n".join(
        f"{number}\t{json.dumps(piece, ensure_ascii=False)}"
        for number, piece in enumerate(pieces, start=1)
    )
    return _messages(
        _SIMULATE, f"Explanation: {explanation}\n\nText: {''.join(pieces)}\n\nTokens:\n{tokens}"
    )


def judge_messages(explanation: str, texts: Sequence[str], marked: bool) -> Messages:
    """Ask which texts fit."""
    numbered = "\n\n".join(f"Text {number}: {text}" for number, text in enumerate(texts, start=1))
    return _messages(_FUZZ if marked else _DETECT, f"Explanation: {explanation}\n\n{numbered}")


def read_explanation(reply: str) -> str | None:
    """The explanation in a reply: one line, without control characters; None where it is empty."""
    text = reply.rpartition("Explanation:")[2]
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split()).strip("\"'* ")
    return text[:LONGEST_EXPLANATION] or None


def read_numbers(reply: str, count: int, largest: float) -> list[float] | None:
    """A number for each of `count` items from lines of number and value, within [0, largest].

    Items that the reply leaves out are at 0. None where it gives fewer than half of them.
    """
    found: dict[int, float] = {}
    for number, value in _LINE.findall(reply):
        if 1 <= int(number) <= count:
            found[int(number)] = min(float(value), largest)
    if 2 * len(found) < count:
        return None
    return [found.get(number, 0.0) for number in range(1, count + 1)]


def marked_text(window: TextWindow, marks: Sequence[bool]) -> str:
    """The text with << and >> around each run of marked pieces."""
    parts, inside = [], False
    for piece, mark in zip(window.pieces, marks, strict=True):
        if mark != inside:
            parts.append("<<" if mark else ">>")
            inside = mark
        parts.append(piece)
    return "".join(parts) + (">>" if inside else "")


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
