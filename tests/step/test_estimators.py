"""The two straight-through estimators against the paper's equations, written out as NumPy loops.

Three oracles, none sharing code with the package: the closed form of eqs. 11 and 12 of arXiv
2407.14435 entry by entry; the density of z, which the mean estimator of H must approach; and the
derivative of the expected loss by quadrature. A meta-test breaks the estimators in the ways this
field has broken them and asks the checker to notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.estimators import heaviside, in_window, jumprelu

Estimator = Callable[[Tensor, Tensor, float, bool], Tensor]
BATCH, D_SAE = 7, 11
BANDWIDTH = 0.375  # with dyadic thresholds, window edges are exact in floating point


# ---------------------------------------------------------------- the closed form


def closed_form(
    kind: str, z: np.ndarray, theta: np.ndarray, eps: float, upstream: np.ndarray, to_input: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, ∂/∂z and ∂/∂θ for z [batch, d_sae], θ [d_sae], one entry at a time."""
    out, to_z, to_theta = np.zeros_like(z), np.zeros_like(z), np.zeros_like(theta)
    for b in range(z.shape[0]):
        for i in range(z.shape[1]):
            active = 1.0 if z[b, i] > theta[i] else 0.0
            u = (z[b, i] - theta[i]) / eps
            kernel = 1.0 if -0.5 < u < 0.5 else 0.0
            if kind == "jumprelu":
                out[b, i] = z[b, i] * active
                slope, jump = active, theta[i] / eps * kernel
            else:
                out[b, i] = active
                slope, jump = 0.0, kernel / eps
            to_theta[i] -= jump * upstream[b, i]
            to_z[b, i] = (slope + to_input * jump) * upstream[b, i]
    return out, to_z, to_theta


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, θ (all different) and upstream gradients; rows 0 to 2 sit exactly on θ and both edges."""
    rng = np.random.default_rng(3)
    theta = (1 + rng.permutation(D_SAE)) / 8  # 0.125 ... 1.375; the smallest is below ε/2
    z = theta + rng.uniform(-1.2, 1.2, (BATCH, D_SAE)) * BANDWIDTH
    z[0], z[1], z[2] = theta, theta + BANDWIDTH / 2, theta - BANDWIDTH / 2
    return z, theta, rng.normal(size=(BATCH, D_SAE))


def check(kind: str, estimator: Estimator, to_input: float) -> None:
    """Raise AssertionError unless `estimator` is eq. 11 ("jumprelu") or eq. 12 ("heaviside")."""
    z, theta, upstream = problem()
    expected = closed_form(kind, z, theta, BANDWIDTH, upstream, to_input)
    z_leaf = torch.tensor(z, requires_grad=True)
    theta_leaf = torch.tensor(theta, requires_grad=True)
    out = estimator(z_leaf, theta_leaf, BANDWIDTH, to_input)
    out.backward(torch.tensor(upstream))
    to_z = torch.zeros_like(z_leaf) if z_leaf.grad is None else z_leaf.grad
    assert theta_leaf.grad is not None
    found = (out.detach(), to_z, theta_leaf.grad)
    for name, got, want in zip(("output", "gradient of z", "gradient of θ"), found, expected,
                               strict=True):  # fmt: skip
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-13, atol=1e-14, err_msg=name)


ESTIMATORS: dict[str, Estimator] = {"jumprelu": jumprelu, "heaviside": heaviside}


@pytest.mark.parametrize("to_input", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_gradients_are_the_papers(kind: str, to_input: float) -> None:
    check(kind, ESTIMATORS[kind], to_input)


def test_the_problem_meets_both_halves_of_the_window_and_its_outside() -> None:
    z, theta, _ = problem()
    u = (z - theta) / BANDWIDTH
    for lower, upper in ((-9.0, -0.5), (-0.5, 0.0), (0.0, 0.5), (0.5, 9.0)):
        assert ((u > lower) & (u < upper)).sum() > BATCH
    assert len(set(theta)) == D_SAE


def test_window_edges_are_outside() -> None:
    theta = torch.tensor([0.75, 0.5, 1.5])
    for edge in (theta - 0.25, theta + 0.25):
        assert not in_window(edge, theta, 0.5).any()
    inside = torch.nextafter(theta + 0.25, theta), torch.nextafter(theta - 0.25, theta)
    assert all(in_window(z, theta, 0.5).all() for z in inside)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_entries_with_gathered_thresholds_agree_with_the_matrix(kind: str) -> None:
    """A list of entries [nnz] with θ gathered gives the matrix's gradients."""
    z, theta, upstream = map(torch.tensor, problem())
    matrix, entries = theta.clone().requires_grad_(), theta.clone().requires_grad_()
    row, col = (torch.rand(z.shape) < 0.6).nonzero().unbind(1)
    weight = torch.zeros_like(upstream)
    weight[row, col] = upstream[row, col]
    ESTIMATORS[kind](z, matrix, BANDWIDTH, False).backward(weight)
    ESTIMATORS[kind](z[row, col], entries[col], BANDWIDTH, False).backward(upstream[row, col])
    torch.testing.assert_close(entries.grad, matrix.grad, rtol=1e-13, atol=1e-14)


# ---------------------------------------------------------------- broken on purpose


def estimator_with(kind: str, jump: Callable[[Tensor, Tensor, float], Tensor]) -> Estimator:
    """An estimator of this shape whose jump at the threshold is `jump(z, θ, ε)`."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, theta, eps, to_input):  # type: ignore[no-untyped-def, override]
            ctx.save_for_backward(z, theta)
            ctx.eps, ctx.to_input = eps, to_input
            return z * (z > theta) if kind == "jumprelu" else (z > theta).to(z)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
            z, theta = ctx.saved_tensors
            step = jump(z, theta, ctx.eps) * grad
            to_z = (z > theta) * grad if kind == "jumprelu" else torch.zeros_like(z)
            return to_z + step * ctx.to_input, -step.sum(0), None, None

    return Custom.apply  # type: ignore[return-value]


def window(z: Tensor, theta: Tensor, eps: float, low: float = -0.5, high: float = 0.5) -> Tensor:
    u = (z - theta) / eps
    return ((u > low) & (u < high)).to(z)


RIGHT = {
    "jumprelu": lambda z, t, e: t / e * window(z, t, e),
    "heaviside": lambda z, t, e: 1 / e * window(z, t, e),
}
BROKEN = {
    ("jumprelu", "upper half"): lambda z, t, e: t / e * window(z, t, e, low=0.0),
    ("jumprelu", "lower half"): lambda z, t, e: t / e * window(z, t, e, high=0.0),
    ("jumprelu", "1/ε twice"): lambda z, t, e: t / e**2 * window(z, t, e),
    ("jumprelu", "no θ factor"): lambda z, t, e: 1 / e * window(z, t, e),
    ("jumprelu", "z for θ"): lambda z, t, e: z / e * window(z, t, e),
    ("jumprelu", "post-activation"): lambda z, t, e: t / e * window(z * (z > t), t, e),
    ("jumprelu", "whole-ε half-width"): lambda z, t, e: t / e * window(z, t, e, -1.0, 1.0),
    ("jumprelu", "wrong sign"): lambda z, t, e: -t / e * window(z, t, e),
    ("heaviside", "wrong sign"): lambda z, t, e: -1 / e * window(z, t, e),
    ("heaviside", "upper half"): lambda z, t, e: 1 / e * window(z, t, e, low=0.0),
    ("heaviside", "1/ε twice"): lambda z, t, e: 1 / e**2 * window(z, t, e),
    ("heaviside", "θ factor"): lambda z, t, e: t / e * window(z, t, e),
    ("heaviside", "post-activation"): lambda z, t, e: 1 / e * window(z * (z > t), t, e),
    ("heaviside", "edges counted"): lambda z, t, e: ((z - t).abs() / e <= 0.5).to(z) / e,
    ("heaviside", "mean over batch"): lambda z, t, e: window(z, t, e) / e / len(z),
}


@pytest.mark.parametrize("to_input", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("kind", RIGHT)
def test_the_checker_accepts_another_correct_implementation(kind: str, to_input: float) -> None:
    check(kind, estimator_with(kind, RIGHT[kind]), to_input)


@pytest.mark.parametrize("to_input", [0.0, 0.37, 1.0])
@pytest.mark.parametrize(("kind", "fault"), BROKEN)
def test_the_checker_notices_a_broken_estimator(kind: str, fault: str, to_input: float) -> None:
    with pytest.raises(AssertionError):
        check(kind, estimator_with(kind, BROKEN[kind, fault]), to_input)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_checker_notices_gradient_that_should_or_should_not_reach_z(kind: str) -> None:
    for asked in (False, True):
        with pytest.raises(AssertionError):
            check(kind, lambda z, t, e, _, a=asked: ESTIMATORS[kind](z, t, e, not a), asked)


# ---------------------------------------------------------------- the density of z

SAMPLES = 400_000
NORMAL_MEAN, NORMAL_STD, RATE = 0.3, 1.3, 0.7


def normal_density(t: np.ndarray) -> np.ndarray:
    u = (t - NORMAL_MEAN) / NORMAL_STD
    return np.exp(-(u**2) / 2) / (NORMAL_STD * math.sqrt(2 * math.pi))


# Density and a bound on its second derivative: the kernel's bias is at most ε²/24 of it.
DENSITIES = {
    "normal": (normal_density, 1 / (NORMAL_STD**3 * math.sqrt(2 * math.pi))),
    "exponential": (lambda t: RATE * np.exp(-RATE * t), RATE**3),
}


@pytest.mark.parametrize("eps", [0.3, 0.1, 0.02])
@pytest.mark.parametrize("density", DENSITIES)
def test_mean_estimator_of_the_step_is_minus_the_density(density: str, eps: float) -> None:
    p, curvature = DENSITIES[density]
    generator = torch.Generator().manual_seed(11)
    uniform = torch.rand(SAMPLES, 1, generator=generator, dtype=torch.float64)
    if density == "normal":
        z = NORMAL_MEAN + NORMAL_STD * math.sqrt(2) * torch.erfinv(2 * uniform - 1)
    else:
        z = -torch.log1p(-uniform) / RATE
    theta = torch.tensor([0.17, 0.4, 0.95, 1.6, 2.3], dtype=torch.float64)
    per_sample = theta.expand(SAMPLES, -1).clone().requires_grad_()

    heaviside(z.expand(-1, len(theta)), per_sample, eps).sum().backward()
    of_step = per_sample.grad
    assert of_step is not None
    error = (of_step.mean(0) + torch.from_numpy(p(theta.numpy()))).abs()
    standard_error = of_step.std(0) / SAMPLES**0.5
    assert (error < 4 * standard_error + eps**2 / 24 * curvature).all()
    # The test can tell: half a window or a second 1/ε would be this many standard errors away.
    assert (of_step.mean(0).abs() / 2 > 10 * standard_error).all()

    per_sample.grad = None
    jumprelu(z.expand(-1, len(theta)), per_sample, eps).sum().backward()
    torch.testing.assert_close(per_sample.grad, of_step * theta, rtol=1e-12, atol=0.0)


# ---------------------------------------------------------------- the expected loss

# Five latents that read one number x ~ N(0, 1) and reconstruct it together.
W_ENC = np.array([0.9, -1.1, 0.6, 1.4, -0.7])
B_ENC = np.array([0.2, -0.1, 0.35, -0.4, 0.15])
W_DEC = np.array([0.8, -0.5, 0.7, 0.45, -0.9])
# They switch at x = 0.33, -0.36, 0.5, 0.79, -0.64: no window holds two switches.
THETA = np.array([0.5, 0.3, 0.65, 0.7, 0.6])
B_DEC, SPARSITY = 0.12, 0.23


def loss_at(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    z = x[:, None] * W_ENC + B_ENC
    active = z > theta
    return (x - (z * active) @ W_DEC - B_DEC) ** 2 + SPARSITY * active.sum(1)


def expected_loss(theta: np.ndarray) -> float:
    """∫ loss(x) N(x) dx by Gauss-Legendre between the points where a latent switches."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    ends = np.concatenate([[-10.0], np.sort((theta - B_ENC) / W_ENC), [10.0]])
    total = 0.0
    for low, high in pairwise(ends):
        for a, b in pairwise(np.linspace(low, high, 5)):
            x = (a + b) / 2 + (b - a) / 2 * nodes
            density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
            total += (b - a) / 2 * float(weights @ (density * loss_at(x, theta)))
    return total


def finite_difference(h: float = 1e-4) -> np.ndarray:
    steps = h * np.eye(len(THETA))
    return np.array([(expected_loss(THETA + s) - expected_loss(THETA - s)) / (2 * h)
                     for s in steps])  # fmt: skip


def estimated_gradient(eps: float, samples: int, relu: Estimator, step: Estimator) -> np.ndarray:
    """The estimators' gradient of the mean loss over evenly spaced quantiles of x."""
    quantile = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    x = math.sqrt(2) * torch.erfinv(2 * quantile - 1)
    theta = torch.tensor(THETA, requires_grad=True)
    z = x[:, None] * torch.tensor(W_ENC) + torch.tensor(B_ENC)
    x_hat = relu(z, theta, eps, False) @ torch.tensor(W_DEC) + B_DEC
    loss = (x - x_hat) ** 2 + SPARSITY * step(z, theta, eps, False).sum(1)
    loss.mean().backward()
    assert theta.grad is not None
    return theta.grad.numpy()


def extrapolated(relu: Estimator, step: Estimator) -> np.ndarray:
    # Inside the window the residual changes with z, so the bias is linear in ε: two bandwidths
    # remove it. Evenly spaced quantiles put the window's share of samples right to one sample.
    wide, narrow = (estimated_gradient(e, 500_000, relu, step) for e in (0.04, 0.02))
    return 2 * narrow - wide


# A window of 0.02 holds at least 500,000 · 0.02 · 0.2 = 2,000 samples and is right to one or two.
RELATIVE = 2e-3


def test_gradient_of_the_expected_loss() -> None:
    exact = finite_difference()
    error = np.linalg.norm(extrapolated(jumprelu, heaviside) - exact) / np.linalg.norm(exact)
    assert error < RELATIVE


def test_gradient_of_the_expected_loss_is_the_formula_of_the_paper() -> None:
    """(E[I_i | z_i = θ_i] - λ) p_i(θ_i): the quadrature oracle itself, checked by hand."""
    formula = np.empty_like(THETA)
    for i, theta in enumerate(THETA):
        x = (theta - B_ENC[i]) / W_ENC[i]
        p = math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) / abs(W_ENC[i])
        z = x * W_ENC + B_ENC
        others = (np.arange(len(THETA)) != i) & (z > THETA)
        without = x - (z * others) @ W_DEC - B_DEC
        # I_i at the jump: the mean of the residuals just below and just above the threshold.
        importance = 2 * theta * W_DEC[i] * (without - theta * W_DEC[i] / 2)
        formula[i] = (importance - SPARSITY) * p
    np.testing.assert_allclose(finite_difference(), formula, rtol=1e-6)


@pytest.mark.parametrize("fault", ["upper half", "1/ε twice", "no θ factor", "post-activation"])
def test_the_expected_loss_notices_a_broken_jumprelu(fault: str) -> None:
    broken = estimator_with("jumprelu", BROKEN["jumprelu", fault])
    exact = finite_difference()
    error = np.linalg.norm(extrapolated(broken, heaviside) - exact) / np.linalg.norm(exact)
    assert error > 10 * RELATIVE
