"""The auxiliary loss revives latents that nothing else reaches."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin import JumpReLUTrainingSAE
from tests.saes.frequent_features import WIDTH, steered, tokens_with_frequent_features, train

pytestmark = pytest.mark.usefixtures("one_thread_throughout")


def test_the_auxiliary_loss_teaches_dead_latents_the_residual() -> None:
    """Thresholds out of reach for a third of the latents: only this loss can teach those."""
    left = []
    for coefficient in (None, 1.0):
        torch.manual_seed(3)
        cfg = steered(
            target_l0=None,
            l0_coefficient=2.0,
            jumprelu_init_threshold=1.5,
            jumprelu_bandwidth=0.5,
            unit_norm_decoder=True,
            aux_loss_coefficient=coefficient,
            normalize_activations="none",
        )
        sae = JumpReLUTrainingSAE(cfg)
        with torch.no_grad():
            sae.threshold[::3] = 50.0
        train(sae, steps=40, lr=1e-2, dead_feature_window=5)
        with torch.no_grad():
            x = next(tokens_with_frequent_features(seed=4))
            residual = x - sae.eval()(x)
            z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            best = z[:, ::3].topk(WIDTH // 2, dim=1)
            found = torch.zeros_like(z[:, ::3]).scatter(1, best.indices, best.values.relu())
            error = (residual - found @ sae.W_dec[::3]).square().sum()
            left.append(float(error / residual.square().sum()))
    assert left[1] < 0.7 < 1 < left[0]
