"""Matryoshka prefixes by kernel and plain, values and gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.kernels.prefixes import PrefixDecodeKernel
from jumprelu_plugin.step.matryoshka import PrefixDecode
from tests.step.kernels.cases import (
    BATCH,
    D_SAE,
    assert_three_way,
    buffered,
    normal,
    padded,
    pattern,
)

D_OUT = 19


SLOW = pytest.mark.kernels


@pytest.mark.parametrize(
    ("widths", "by_token"),
    [
        ([13], False),
        pytest.param([13], True, marks=SLOW),
        pytest.param([1, 13, 47], False, marks=SLOW),
        pytest.param([1, 13, 47], True, marks=SLOW),
    ],
)
def test_values_and_gradients(widths: list[int], by_token: bool) -> None:
    plain = pattern()
    values = normal(plain.cols.numel(), seed=3)
    values[::5] = 0.0
    W, target = normal(D_SAE, D_OUT, seed=5), normal(BATCH, D_OUT, seed=7)
    offset = normal(*((BATCH, D_OUT) if by_token else (D_OUT,)), seed=11)
    scale = 0.5 + normal(BATCH, seed=13).square()
    pull = normal(BATCH, D_OUT, seed=17), normal(len(widths), seed=19)
    ends = [*widths, D_SAE]

    def run(function: type, found: object, dtype: torch.dtype, spare: int) -> list[Tensor]:
        a = padded(values.to(dtype), spare).requires_grad_()
        w, o = (t.to(dtype).requires_grad_() for t in (W, offset))
        x_hat, errors = function.apply(  # type: ignore[attr-defined]
            a, w, o, target.to(dtype), scale.to(dtype), found, len(ends)
        )
        ((x_hat * pull[0].to(dtype)).sum() + (errors * pull[1].to(dtype)).sum()).backward()
        assert a.grad is not None and not a.grad[len(values) :].any()
        return [x_hat.detach(), errors.detach(), a.grad[: len(values)], w.grad, o.grad]  # type: ignore[list-item]

    truth = run(PrefixDecode, plain.in_blocks(ends), torch.float64, 0)
    expected = run(PrefixDecode, plain.in_blocks(ends), torch.float32, 0)
    found = run(PrefixDecodeKernel, buffered(plain).in_blocks(ends), torch.float32, 23)
    for fast, slow, true in zip(found, expected, truth, strict=True):
        assert_three_way(fast, slow, true)
