"""Several transcoders spliced in at once, against hooks by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig
from torch import Tensor

from jumprelu_plugin.evaluation import evaluate_transcoders
from tests.tiny import BOS, D_MODEL, N_LAYERS, tiny_tokens
from tests.training.transcoder_runs import LN, OUT


def stock_transcoder(layer: int, seed: int) -> JumpReLUSkipTranscoder:
    config = JumpReLUSkipTranscoderConfig(
        d_in=D_MODEL,
        d_sae=41,
        d_out=D_MODEL,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(
            hook_name=f"blocks.{layer}.{LN}", hook_name_out=f"blocks.{layer}.{OUT}"
        ),
    )
    made: Any = JumpReLUSkipTranscoder(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.rand(parameter.shape, generator=g) - 0.07)
    return made.eval()


def test_a_spliced_set_is_what_hooks_by_hand_give(model: Any) -> None:
    transcoders = [stock_transcoder(layer, layer) for layer in range(N_LAYERS)]
    tokens = tiny_tokens(7, 13)
    found = evaluate_transcoders(model, transcoders, tokens, batch_size=3, special_token_ids=[BOS])

    kept: dict[int, Tensor] = {}

    def hooks(layer: int) -> list[Any]:
        def read(x: Tensor, hook: Any) -> None:
            kept[layer] = x

        def write(y: Tensor, hook: Any) -> Tensor:
            changed = transcoders[layer](kept[layer])
            return torch.cat([y[:, :1], changed[:, 1:]], 1)  # BOS, the first, stays

        return [(f"blocks.{layer}.{LN}", read), (f"blocks.{layer}.{OUT}", write)]

    def loss(logits: Tensor) -> float:
        predictions = logits[:, 1:-1].flatten(0, 1)
        return F.cross_entropy(predictions, tokens[:, 2:].flatten()).item()

    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens)
        spliced = model.run_with_hooks(
            tokens, fwd_hooks=[h for layer in range(N_LAYERS) for h in hooks(layer)]
        )
        assert found.n_predictions == 7 * 11
        assert found.loss_clean == pytest.approx(loss(clean), rel=1e-5)
        assert found.loss_spliced == pytest.approx(loss(spliced), rel=1e-5)
        assert abs(found.delta_loss) > 1e-3
        assert found.loss_mean_ablated != pytest.approx(found.loss_clean, rel=1e-4)
        for layer, fidelity in enumerate(found.layers):
            x = cache[f"blocks.{layer}.{LN}"][:, 1:].flatten(0, 1)
            y = cache[f"blocks.{layer}.{OUT}"][:, 1:].flatten(0, 1)
            error = (transcoders[layer](x) - y).square().sum()
            fvu = error / (y - y.mean(0)).square().sum()
            assert fidelity.fvu == pytest.approx(fvu.item(), rel=1e-4)
            fires = (transcoders[layer].encode(x) > 0).float()
            assert fidelity.l0 == pytest.approx(fires.sum(1).mean().item(), rel=1e-5)
    assert not model.blocks[1].hook_mlp_out.fwd_hooks


def test_sets_that_cannot_be_spliced_are_refused(model: Any) -> None:
    tokens = tiny_tokens(3, 7)
    with pytest.raises(ValueError, match="no transcoders"):
        evaluate_transcoders(model, [], tokens)
    with pytest.raises(ValueError, match="Two transcoders write to one hook"):
        evaluate_transcoders(model, [stock_transcoder(1, 0), stock_transcoder(1, 1)], tokens)
    unfolded = stock_transcoder(1, 0)
    unfolded.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(ValueError, match="Fold the scale"):
        evaluate_transcoders(model, [unfolded], tokens)
