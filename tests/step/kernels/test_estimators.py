"""JumpReLU and the step at pairs by kernel, against PyTorch's operators and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.estimators import heaviside, jumprelu
from jumprelu_plugin.step.kernels.estimators import AtPairs
from tests.step.kernels.cases import D_SAE, DEVICE, assert_three_way, normal

PAIRS, BANDWIDTH = 1499, 0.37


def both_gradients(value: Tensor, grad: Tensor, *leaves: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("to_input", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("jump", [False, True], ids=["step", "jumprelu"])
def test_values_and_gradients(jump: bool, to_input: float) -> None:
    z, grad = normal(PAIRS, seed=3), normal(PAIRS, seed=5)
    theta = 0.2 + normal(D_SAE, seed=7).abs()
    cols = torch.arange(PAIRS, device=DEVICE) * 17 % D_SAE
    z[::5] = theta[cols[::5]]  # on the threshold: not active, and in the window
    z[1::7] = theta[cols[1::7]] + 0.5 * BANDWIDTH  # on the edge of the window
    z[-3:] = -1e30  # unused

    def plain(dtype: torch.dtype) -> list[Tensor]:
        zs, thetas = (t.to(dtype, copy=True).requires_grad_() for t in (z, theta))
        function = jumprelu if jump else heaviside
        value = function(zs, thetas[cols], BANDWIDTH, to_input)
        return [value.detach(), *both_gradients(value, grad.to(dtype), zs, thetas)]

    zs, thetas = z.clone().requires_grad_(), theta.clone().requires_grad_()
    value: Tensor = AtPairs.apply(zs, thetas, cols, BANDWIDTH, to_input, jump)  # type: ignore[assignment]
    found = [value.detach(), *both_gradients(value, grad, zs, thetas)]
    in_32 = plain(torch.float32)
    # Which pairs are in the window is decided in float32, so float64 is asked away from its edge.
    torch.testing.assert_close(found[0], in_32[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], in_32[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[2], in_32[2], rtol=1e-5, atol=1e-5)
    z[1::7] += 1e-3
    zs = z.clone().requires_grad_()
    value = AtPairs.apply(zs, thetas, cols, BANDWIDTH, to_input, jump)  # type: ignore[assignment]
    found = [value.detach(), *both_gradients(value, grad, zs, thetas)]
    for fast, single, double in zip(found, plain(torch.float32), plain(torch.float64), strict=True):
        assert_three_way(fast, single, double)
