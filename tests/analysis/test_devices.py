"""The model on one device and the text on another, in every model class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jumprelu_plugin.analysis.contexts import collect_contexts
from jumprelu_plugin.analysis.dashboard import write_dashboard
from jumprelu_plugin.analysis.top_activations import TopActivations, collect_top_activations
from jumprelu_plugin.analysis.windows import WindowCounts, collect_windows
from jumprelu_plugin.models.hooked_auto_model import HookedAutoModel
from tests.analysis.latents import SPECIAL
from tests.tiny import Tiny, tiny_hf, tiny_sae

BATCH = 7


class ModelElsewhere:
    """A bridge that takes tokens on its own device alone, as one on a GPU does.

    The device is `meta`, whose tokens have no values; they are those of `text`, batch by batch.
    """

    def __init__(self, model: Any, text: torch.Tensor) -> None:
        self._model, self._text, self._next = model, text, 0
        self.cfg = SimpleNamespace(device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.empty(0, device="meta")

    def __call__(self, tokens: torch.Tensor, return_type: str | None) -> Any:
        assert tokens.device.type == "meta"
        if return_type is not None:  # it is asked which hooks fire
            return self._model(torch.zeros_like(tokens, device="cpu"), return_type=return_type)
        assert len(tokens) == len(self._text[self._next :][:BATCH])
        batch = self._text[self._next :][:BATCH]
        self._next = (self._next + BATCH) % (-(-len(self._text) // BATCH) * BATCH)
        return self._model(batch, return_type=None)


class TokensElsewhere(torch.Tensor):
    """Tokens with which nothing can be done here but to bring them to the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.Tensor.cpu, f"{func} with tokens of another device"
        return args[0].as_subclass(torch.Tensor)


def same(found: Any, expected: Any) -> None:
    for field in fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


def collected(model: Any, text: torch.Tensor) -> tuple[TopActivations, Any, Any]:
    sae, options = tiny_sae(), {"special_token_ids": SPECIAL, "batch_size": BATCH}
    top = collect_top_activations(model, sae, text, **options)
    contexts = collect_contexts(model, sae, top, **options)
    counts = WindowCounts(top=2, sampled=3, silent=1)
    return top, contexts, collect_windows(model, sae, top, [3, 5, 29], counts, **options)


def test_text_goes_to_the_models_device(tiny: Tiny, tokens: torch.Tensor) -> None:
    found = collected(ModelElsewhere(tiny.bridge, tokens), tokens)
    for ours, theirs in zip(found, collected(tiny.bridge, tokens), strict=True):
        same(ours, theirs)


def test_text_comes_from_any_device(tiny: Tiny, tokens: torch.Tensor) -> None:
    found = collected(tiny.bridge, tokens.as_subclass(TokensElsewhere))
    for ours, theirs in zip(found, collected(tiny.bridge, tokens), strict=True):
        same(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["hooked", "bridge", "plain"])
def test_a_page_is_written_on_a_gpu(
    kind: str, where: str, tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    sae = tiny_sae().to("cuda")
    if kind == "plain":
        plain: Any = tiny_hf().to("cuda")
        plain.tokenizer = tiny.tokenizer
        model: Any = HookedAutoModel(plain, "tiny-gemma-2-test")
        sae.cfg.metadata.hook_name = "model.layers.1"
    else:
        model = getattr(tiny, kind).to("cuda")
    try:
        page = write_dashboard(tmp_path / "page.html", model, sae, tokens.to(where))
    finally:
        model.to("cpu")
    assert page.stat().st_size > 10_000
