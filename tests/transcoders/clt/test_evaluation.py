"""Losses of a model with every MLP replaced, against hooks by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jumprelu_plugin.transcoders.clt import evaluate_clt
from tests.tiny import BOS, D_MODEL, N_LAYERS, tiny_tokens
from tests.transcoders.clt.random_clt import random_clt

pytestmark = pytest.mark.usefixtures("one_thread")


def test_evaluation_is_what_hooks_by_hand_give(model: Any) -> None:
    clt = random_clt(D_MODEL, D_MODEL)
    tokens = tiny_tokens(7, 13)
    found = evaluate_clt(model, clt, tokens, batch_size=3, special_token_ids=[BOS])
    kept: dict[int, Tensor] = {}

    def hooks(layer: int) -> list[Any]:
        def read(x: Tensor, hook: Any) -> None:
            kept[layer] = x

        def write(y: Tensor, hook: Any) -> Tensor:
            # Layers that have not been computed yet write nothing here.
            x = torch.stack([kept.get(i, torch.zeros_like(y)) for i in range(N_LAYERS)])
            return torch.cat([y[:, :1], clt(x)[layer][:, 1:]], 1)  # BOS, the first, stays

        return [(f"blocks.{layer}.ln2.hook_normalized", read),
                (f"blocks.{layer}.hook_mlp_out", write)]  # fmt: skip

    def loss(logits: Tensor) -> float:
        return F.cross_entropy(logits[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten()).item()

    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens)
        spliced = model.run_with_hooks(
            tokens, fwd_hooks=[h for layer in range(N_LAYERS) for h in hooks(layer)]
        )
        x = torch.stack([cache[p.hook_in][:, 1:].flatten(0, 1) for p in clt.cfg.pairs])
        y = torch.stack([cache[p.hook_out][:, 1:].flatten(0, 1) for p in clt.cfg.pairs])
        error, firing = (clt(x) - y).square().sum((1, 2)), (clt.encode(x) > 0).float()
    assert found.n_predictions == 7 * 11
    assert found.loss_clean == pytest.approx(loss(clean), rel=1e-5)
    assert found.loss_spliced == pytest.approx(loss(spliced), rel=1e-5)
    assert abs(found.delta_loss) > 1e-3
    for layer, fidelity in enumerate(found.layers):
        deviation = (y[layer] - y[layer].mean(0)).square().sum()
        assert fidelity.fvu == pytest.approx((error[layer] / deviation).item(), rel=1e-4)
        assert fidelity.l0 == pytest.approx(firing[layer].sum(1).mean().item(), rel=1e-5)
    assert not model.blocks[1].hook_mlp_out.fwd_hooks


def test_a_transcoder_of_another_model_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="width 13 at blocks.0.ln2.* and the model 33"):
        evaluate_clt(model, random_clt(), tiny_tokens(3, 7))
