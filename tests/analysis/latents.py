"""Activations of an SAE's latents by the plain route, and what a page of them holds."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from tests.tiny import Tiny

SPECIAL = [0, 1, 2, 3]


def activations(tiny: Tiny, sae: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[sequence, position, d_sae], special tokens at zero, by the plain route."""
    _, cache = tiny.hooked.run_with_cache(tokens)
    acts = sae.encode(cache[sae.cfg.metadata.hook_name]).detach()
    acts[torch.isin(tokens, torch.tensor(SPECIAL))] = 0.0
    return acts


class Page(HTMLParser):
    """Tags, attributes and the data of a page, as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
