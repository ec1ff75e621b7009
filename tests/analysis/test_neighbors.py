"""Latents with the nearest decoder rows."""

from __future__ import annotations

import torch

from jumprelu_plugin.analysis.neighbors import nearest_latents


def test_nearest_decoder_rows() -> None:
    rows = torch.randn(1031, 17, generator=torch.Generator().manual_seed(3))  # more than a chunk
    rows[1029] = -3.0 * rows[5]
    rows[7] = 2.5 * rows[1030]
    rows[11] = 0.0
    indices, cosines = nearest_latents(rows, count=3)
    assert indices.shape == (1031, 3)
    assert int(indices[7, 0]) == 1030 and int(indices[1030, 0]) == 7
    assert not (indices == torch.arange(1031)[:, None]).any()
    assert 1029 not in indices[5].tolist()
    assert not cosines[11].any()
    wanted = torch.nn.functional.cosine_similarity(rows[100], rows[int(indices[100, 1])], dim=0)
    torch.testing.assert_close(cosines[100, 1], wanted)
    assert nearest_latents(rows[:3], count=5)[0].shape == (3, 2)
