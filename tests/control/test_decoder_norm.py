"""Decoder rows: gradients tangential to them, and their normalization."""

from __future__ import annotations

import numpy as np
import torch

from jumprelu_plugin.control.decoder_norm import normalize_rows_, remove_parallel_gradient_


def test_parallel_gradient_is_removed_row_by_row() -> None:
    W = torch.randn(13, 7, dtype=torch.float64)
    W /= W.norm(dim=1, keepdim=True)
    gradient = torch.randn(13, 7, dtype=torch.float64)
    given = gradient.clone()
    remove_parallel_gradient_(gradient, W)
    for row in range(13):
        w, g = W[row].numpy(), given[row].numpy()
        expected = g - sum(g[k] * w[k] for k in range(7)) * w
        np.testing.assert_allclose(gradient[row].numpy(), expected, rtol=1e-13, atol=1e-14)
    assert (gradient * W).sum(1).abs().max() < 1e-14


def test_a_row_of_zeros_survives_normalisation() -> None:
    W = torch.randn(13, 7) * torch.logspace(-12, 12, 13).unsqueeze(1)
    W[5] = 0.0
    direction = W.double() / W.double().norm(dim=1, keepdim=True)
    normalize_rows_(W)
    assert torch.equal(W[5], torch.zeros(7))
    kept = torch.arange(13) != 5
    torch.testing.assert_close(W[kept].double(), direction[kept], rtol=1e-6, atol=1e-7)
