"""One HTML file of a dictionary's latents: searchable, self-contained, no network.

The numbers come from `examples`, `contexts`, `logits` and `neighbours`; here they become compact
JSON inside a page. Everything read from text or a tokenizer is data to the page and never markup:
the JSON is escaped for HTML and the page's script only ever sets text.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from torch import Tensor

from jumprelu_plugin.analysis.contexts import LatentContexts, contexts
from jumprelu_plugin.analysis.logit_lens import LogitEffects, all_logit_effects
from jumprelu_plugin.analysis.neighbors import nearest
from jumprelu_plugin.analysis.top_activations import LatentExamples, collect
from jumprelu_plugin.models.hooks import sae_sites

_TEMPLATE = "dashboard.html.j2"
# Hooks whose values are written to the residual stream, which the unembedding reads.
_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
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
) -> Path:
    """Write the page of `sae`'s latents over `tokens` to `path`, in one atomic step.

    Args:
        latents: which latents; all by default.
        examples: contexts of each latent, at most.
        title: of the page; the hook's name by default.
        facts: further lines of the page's head, such as the dictionary's folder.

    Raises:
        ValueError: for a latent the dictionary does not have, or a dictionary whose scale is not
            folded.
    """
    path = Path(path)
    chosen = _checked(latents, sae.cfg.d_sae)
    special = list(model.tokenizer.all_special_ids)
    found = collect(model, sae, tokens, special_token_ids=special)
    read = contexts(model, sae, found, count=examples, special_token_ids=special)
    effects = all_logit_effects(model, sae) if _writes_residual(sae) else None
    words = _Words(model.tokenizer)
    neighbours = nearest(sae.W_dec)
    entries = [_entry(i, sae, found, read, effects, neighbours, words) for i in chosen]
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
        "latents": f"{sae.cfg.d_sae:,}, of which {_silent(found):,} never fire here",
        "text": f"{tokens.shape[0]:,} sequences of {tokens.shape[1]} tokens",
        "L0": f"{float(found.firing_frequency.sum()):.1f}",
        **(facts or {}),
    }
    _write(path, page.render(title=title or hook_in, facts=head, data=_embedded(data)))
    return path


def _silent(found: LatentExamples) -> int:
    return int((found.activation[:, 0] == 0).sum())


def _checked(latents: Sequence[int] | None, d_sae: int) -> list[int]:
    if latents is None:
        return list(range(d_sae))
    wrong = [latent for latent in latents if not 0 <= latent < d_sae]
    if wrong:
        raise ValueError(f"latents {wrong}: the dictionary has latents 0 to {d_sae - 1}")
    return sorted(set(latents))


def _writes_residual(sae: Any) -> bool:
    return sae_sites(sae)[1].rsplit(".", 1)[-1] in _RESIDUAL


class _Words:
    """Token texts, numbered in the order in which they are first used."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        self.special: set[int] = set()
        self._number: dict[int, int] = {}

    def number(self, token: int) -> int:
        if token not in self._number:
            self._number[token] = len(self.texts)
            if token in self.tokenizer.all_special_ids:
                self.special.add(len(self.texts))
            self.texts.append(self.tokenizer.decode([token]))
        return self._number[token]

    def numbers(self, tokens: Tensor) -> list[int]:
        return [self.number(token) for token in tokens.tolist()]


def _entry(
    latent: int,
    sae: Any,
    found: LatentExamples,
    read: LatentContexts,
    effects: LogitEffects | None,
    neighbours: tuple[Tensor, Tensor],
    words: _Words,
) -> dict[str, Any]:
    """One latent under one-letter keys, which the page's script explains: there are thousands."""
    entry: dict[str, Any] = {
        "i": latent,
        "f": _round(float(found.firing_frequency[latent])),
        "m": _round(float(found.activation[latent, 0])),
        "n": _round(float(sae.W_dec[latent].norm())),
        "k": [neighbours[0][latent].tolist(), _rounded(neighbours[1][latent])],
    }
    if hasattr(sae, "threshold"):
        entry["t"] = _round(float(sae.threshold[latent]))
    if effects is not None:
        entry["u"] = [words.numbers(effects.raised[latent]), _rounded(effects.raised_by[latent])]
        entry["d"] = [words.numbers(effects.lowered[latent]), _rounded(effects.lowered_by[latent])]
    if entry["m"] > 0:
        entry["h"] = read.histogram[latent].tolist()
        entry["c"] = [
            _context(read, latent, rank, words)
            for rank in range(read.tokens.shape[1])
            if read.inside[latent, rank].any()
        ]
    return entry


def _context(read: LatentContexts, latent: int, rank: int, words: _Words) -> list[Any]:
    """Token numbers, their activations, and which of them is the example."""
    inside = read.inside[latent, rank]
    focus = int(inside[: read.focus].sum())
    return [
        words.numbers(read.tokens[latent, rank][inside]),
        _rounded(read.activation[latent, rank][inside]),
        focus,
    ]


def _rounded(values: Tensor) -> list[float]:
    return [_round(value) for value in values.tolist()]


def _round(value: float) -> float | int:
    """Three significant digits, and integers without a point: a third of the page's size."""
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short == int(short) else short


def _embedded(data: Any) -> Any:
    """Compact JSON that may stand inside a script element: no <, >, & or ' is left in it."""
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


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
