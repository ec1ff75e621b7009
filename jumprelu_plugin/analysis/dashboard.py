"""Writes one searchable, self-contained HTML file about a dictionary's latents.

The values come from `top_activations`, `contexts`, `logit_lens` and `neighbors`; this module puts
them into a page as compact JSON. Text and tokens are never markup: the JSON is escaped for HTML,
and the page's script only sets text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from torch import Tensor

from jumprelu_plugin.analysis.contexts import LatentContexts, collect_contexts
from jumprelu_plugin.analysis.logit_lens import LogitEffects, all_logit_effects, writes_to_residual
from jumprelu_plugin.analysis.neighbors import nearest_latents
from jumprelu_plugin.analysis.output_file import require_place_for_file
from jumprelu_plugin.analysis.top_activations import TopActivations, collect_top_activations
from jumprelu_plugin.models.hooks import sae_sites
from jumprelu_plugin.models.number_lists import plain_integers
from jumprelu_plugin.models.token_text import TokenTexts
from jumprelu_plugin.records import write_text

DASHBOARD_FILENAME = "features.html"
_TEMPLATE = "dashboard.html.j2"
_DIGITS = 3


@torch.no_grad()
def write_dashboard(
    path: str | Path,
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "sequences positions"],
    *,
    latents: Sequence[int] | None = None,
    examples: int = 8,
    title: str | None = None,
    facts: Mapping[str, object] | None = None,
    explanations: Mapping[int, str] | None = None,
) -> Path:
    """Write a page about `sae`'s latents over `tokens` to `path`, atomically.

    Args:
        path: the HTML file, which may be there already.
        model: a hooked model with its tokenizer.
        sae: the dictionary; its metadata names the hook.
        tokens: the text, on any device.
        latents: the latents shown; all by default.
        examples: the most contexts of a latent.
        title: the page's title; the hook's name by default.
        facts: further names and values for the page's head, such as the dictionary's folder.
        explanations: explanations by latent, which the page shows and searches.

    Raises:
        ValueError: `path` is a folder, the dictionary lacks one of the latents, or it expects
            scaled inputs.
    """
    path = Path(path)
    require_place_for_file(path, DASHBOARD_FILENAME)
    shown = _shown_latents(latents, sae.cfg.d_sae)
    special = list(model.tokenizer.all_special_ids)
    top = collect_top_activations(model, sae, tokens, special_token_ids=special)
    contexts = collect_contexts(model, sae, top, count=examples, special_token_ids=special)
    effects = all_logit_effects(model, sae) if writes_to_residual(sae) else None
    words = _Words(model.tokenizer)
    neighbors = nearest_latents(sae.W_dec)
    entries = [_entry(i, sae, top, contexts, effects, neighbors, words) for i in shown]
    for entry in entries:
        if explanations and entry["i"] in explanations:
            entry["e"] = explanations[entry["i"]]
    data = {
        "latents": entries,
        "words": words.texts,
        "d_sae": sae.cfg.d_sae,
        "special": sorted(words.special),
    }
    page = _environment().get_template(_TEMPLATE)
    hook_in, hook_out = sae_sites(sae)
    head = {
        "model": sae.cfg.metadata.model_name,
        "hook": hook_in if hook_in == hook_out else f"{hook_in} → {hook_out}",
        "latents": f"{sae.cfg.d_sae:,}, of which {_count_silent(top):,} never fire here",
        "text": f"{tokens.shape[0]:,} sequences of {tokens.shape[1]} tokens",
        "L0": f"{float(top.latent_density.sum()):.1f}",
        **(facts or {}),
    }
    write_text(path, page.render(title=title or hook_in, facts=head, data=_embedded(data)))
    return path


def _count_silent(top: TopActivations) -> int:
    return int((top.activation[:, 0] == 0).sum())


def _shown_latents(latents: Sequence[int] | None, d_sae: int) -> list[int]:
    if latents is None:
        return list(range(d_sae))
    numbers = plain_integers("latents", latents)
    wrong = [latent for latent in numbers if not 0 <= latent < d_sae]
    if wrong:
        raise ValueError(f"latents {wrong}: the dictionary has latents 0 to {d_sae - 1}")
    return sorted(set(numbers))


class _Words:
    """Token texts, numbered in the order of their first use."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = []
        self.special: set[int] = set()
        self._special_ids = set(tokenizer.all_special_ids)
        self._token_texts = TokenTexts(tokenizer)
        self._number: dict[int, int] = {}

    def number(self, token: int) -> int:
        if token not in self._number:
            self._number[token] = len(self.texts)
            if token in self._special_ids:
                self.special.add(len(self.texts))
            self.texts.append(self._token_texts.text(token))
        return self._number[token]

    def numbers(self, tokens: Tensor) -> list[int]:
        return [self.number(token) for token in tokens.tolist()]

    def join(self, tokens: Tensor) -> str:
        return self._token_texts.join(tokens.tolist())


def _entry(
    latent: int,
    sae: Any,
    top: TopActivations,
    contexts: LatentContexts,
    effects: LogitEffects | None,
    neighbors: tuple[Tensor, Tensor],
    words: _Words,
) -> dict[str, Any]:
    """One latent's values under one-letter keys, which save space and are listed in the script."""
    entry: dict[str, Any] = {
        "i": latent,
        "f": _round(float(top.latent_density[latent])),
        "m": _round(float(top.activation[latent, 0])),
        "n": _round(float(sae.W_dec[latent].norm())),
        "k": [neighbors[0][latent].tolist(), _rounded(neighbors[1][latent])],
    }
    if hasattr(sae, "threshold"):
        entry["t"] = _round(float(sae.threshold[latent]))
    if effects is not None:
        entry["u"] = [words.numbers(effects.raised[latent]), _rounded(effects.raised_by[latent])]
        entry["d"] = [words.numbers(effects.lowered[latent]), _rounded(effects.lowered_by[latent])]
    if entry["m"] > 0:
        entry["h"] = contexts.histogram[latent].tolist()
        entry["c"] = [
            _context(contexts, latent, rank, words)
            for rank in range(contexts.tokens.shape[1])
            if contexts.inside[latent, rank].any()
        ]
    return entry


def _context(contexts: LatentContexts, latent: int, rank: int, words: _Words) -> list[Any]:
    """Token numbers, their activations, and the index of the top activation among them.

    A fourth value is the text, where it is not the tokens' texts put together, because several
    tokens make up one of its characters.
    """
    inside = contexts.inside[latent, rank]
    tokens = contexts.tokens[latent, rank][inside]
    numbers = words.numbers(tokens)
    context = [
        numbers,
        _rounded(contexts.activation[latent, rank][inside]),
        int(inside[: contexts.focus].sum()),
    ]
    text = words.join(tokens)
    if text != "".join(words.texts[number] for number in numbers):
        context.append(text)
    return context


def _rounded(values: Tensor) -> list[float]:
    return [_round(value) for value in values.tolist()]


def _round(value: float) -> float | int:
    """Three significant digits, and integers without a decimal point, to save space."""
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short == int(short) else short


def _embedded(data: Any) -> Any:
    """Compact JSON that is safe inside a script element: it holds no <, >, & or '."""
    return htmlsafe_json_dumps(
        data, dumps=partial(json.dumps, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("jumprelu_plugin.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
