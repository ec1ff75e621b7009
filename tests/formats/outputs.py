"""Inputs on which an exported dictionary is compared with what was exported."""

from __future__ import annotations

import torch

from tests.dictionaries import D_IN

INPUTS = 2.0 * torch.randn(53, D_IN, generator=torch.Generator().manual_seed(13))


def same_outputs(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.max()) < 1e-5
