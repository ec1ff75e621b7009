"""Three figures that explain JumpReLU training, drawn with the package's own functions.

1. Why a threshold: ReLU lets false positives through or shrinks what is true, JumpReLU neither.
2. JumpReLU and the step function with their pseudo-derivatives by the threshold.
3. How well the estimator meets the exact gradient of the expected loss, by bandwidth, batch size
   and kernel.

The pictures of docs/concepts.md are these. Needs matplotlib: pip install 'jumprelu-plugin[plot]'.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from jumprelu_plugin import heaviside, jumprelu

OUTPUT = Path("output/17_teaching_figures")
ORANGE, BLUE, GREEN, PINK, GRAY = "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#888888"
OUTPUT.mkdir(parents=True, exist_ok=True)


def figure(panels: int) -> tuple[Figure, list]:
    """A figure with its axes side by side."""
    drawn = Figure(figsize=(4.2 * panels, 3.4), layout="constrained")
    axes = drawn.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color="#e4e4e0", lw=0.6)
        each.set_axisbelow(True)
    return drawn, list(axes)


def save(drawn: Figure, name: str) -> None:
    drawn.savefig(OUTPUT / f"{name}.png", dpi=130)
    print(f"written: {OUTPUT / name}.png")


# --- 1. A feature in noise: it is there in 5 % of the tokens, with a strength around 1 -----------

generator = torch.Generator().manual_seed(0)
present = torch.rand(200_000, generator=generator) < 0.05
strength = (1 + 0.2 * torch.randn(len(present), generator=generator)) * present
z = strength + 0.2 * torch.randn(len(present), generator=generator)  # the latent's pre-activation
THETA = 0.6
activations = {
    "ReLU(z)": torch.relu(z),
    "ReLU(z − 0.6)": torch.relu(z - THETA),
    "JumpReLU(z), θ = 0.6": jumprelu(z, torch.tensor(THETA), bandwidth=0.1),
}
drawn, axes = figure(3)
bins = np.linspace(-0.8, 2.0, 71)
axes[0].hist(z[~present].numpy(), bins, color=GRAY, alpha=0.7, label="feature absent")
axes[0].hist(z[present].numpy(), bins, color=ORANGE, alpha=0.7, label="feature present")
axes[0].axvline(THETA, color="k", ls=":", lw=1)
axes[0].set(yscale="log", xlabel="pre-activation z", ylabel="tokens", title="One latent")
axes[0].legend(frameon=False)
grid = torch.linspace(-0.8, 2.0, 801)
curves = (torch.relu(grid), torch.relu(grid - THETA), jumprelu(grid, torch.tensor(THETA), 0.1))
for name, curve, color in zip(activations, curves, (BLUE, GREEN, ORANGE), strict=True):
    axes[1].plot(grid, curve, color=color, label=name)
axes[1].set(xlabel="z", ylabel="activation", title="Three activation functions")
axes[1].legend(frameon=False)
false_positives = [float((acts[~present] > 0).float().mean()) for acts in activations.values()]
shrinkage = [
    float(1 - acts[present].sum() / strength[present].sum()) for acts in activations.values()
]
places = np.arange(3)
axes[2].bar(places - 0.2, false_positives, 0.38, color=GRAY, label="active though absent")
axes[2].bar(places + 0.2, shrinkage, 0.38, color=ORANGE, label="strength that is lost")
axes[2].set_xticks(places, ["ReLU(z)", "ReLU(z − 0.6)", "JumpReLU"])
axes[2].axhline(0, color="k", lw=0.8)
axes[2].set(title="False positives and shrinkage", ylabel="share", ylim=(0, 0.85))
axes[2].legend(frameon=False)
save(drawn, "teaching_threshold")

# --- 2. Pseudo-derivatives (arXiv 2407.14435, equations 11 and 12) -------------------------------

EPSILON = 0.4
drawn, axes = figure(2)
for axis, function, title in zip(
    axes, (jumprelu, heaviside), ("JumpReLU(z)", "H(z − θ)"), strict=True
):
    inputs = torch.linspace(-0.4, 1.4, 1801)
    thresholds = torch.full_like(inputs, THETA).requires_grad_()
    values = function(inputs, thresholds, EPSILON)
    (derivative,) = torch.autograd.grad(values.sum(), thresholds)
    axis.plot(inputs, values.detach(), color=BLUE, label="value")
    axis.plot(inputs, derivative, color=ORANGE, label="pseudo-derivative by θ")
    axis.axvspan(THETA - EPSILON / 2, THETA + EPSILON / 2, color=ORANGE, alpha=0.1, lw=0)
    axis.set(xlabel="z", title=f"{title}, θ = {THETA}, ε = {EPSILON}")
    axis.legend(frameon=False, loc="lower left")
save(drawn, "teaching_pseudo_derivatives")

# --- 3. The estimator against the exact gradient -------------------------------------------------
# One latent with unit decoder and encoder, so z = x. The loss of x is x² where z < θ, λ elsewhere;
# the expected loss over a density p has the derivative (θ² − λ)·p(θ).

LAMBDA = 0.1
x = np.arange(-4, 5, 5e-5) + 2.5e-5  # θ = 0.5, where the loss jumps, lies between two points


def gaussian(u: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi)


def density(at: np.ndarray) -> np.ndarray:
    """The density of z: absent and present, both Gaussian."""
    return 0.8 * gaussian(at / 0.25) / 0.25 + 0.2 * gaussian((at - 1) / 0.3) / 0.3


# Each integrates to 1 and has the rectangle's variance, 1/12, so that ε means the same for all.
KERNELS = {
    "rectangle": (lambda u: 1.0 * (np.abs(u) < 0.5), 1 / 12),
    "triangular": (lambda u: np.clip(1 - np.abs(u), 0, None), 1 / 6),
    "Epanechnikov": (lambda u: 0.75 * np.clip(1 - u**2, 0, None), 1 / 5),
    "Gaussian": (gaussian, 1.0),
}


def mean_and_variance(kernel: str, theta: float, epsilon: float) -> tuple[float, float]:
    """Of one token's estimate of dE[loss]/dθ, by integration over the density."""
    function, variance = KERNELS[kernel]
    width = epsilon * np.sqrt(1 / 12 / variance)
    slope = np.where(x > theta, 0.0, 2 * theta * x) - LAMBDA  # 2θ·d·(x − x̂) − λ
    estimate = slope * function((x - theta) / width) / width
    weights = density(x) * (x[1] - x[0])
    mean = float((estimate * weights).sum())
    return mean, float((estimate**2 * weights).sum()) - mean**2


def exact(theta: float) -> float:
    return (theta**2 - LAMBDA) * float(density(np.array([theta]))[0])


def package_estimates(theta: float, epsilon: float, batch: int, batches: int) -> torch.Tensor:
    """dE[loss]/dθ from the package's own backward pass, one a batch."""
    draws = torch.Generator().manual_seed(1)
    there = torch.rand(batches, batch, generator=draws) < 0.2
    noise = torch.randn(batches, batch, generator=draws)
    sample = torch.where(there, 1 + 0.3 * noise, 0.25 * noise)
    thresholds = torch.full((batches, 1), theta, requires_grad=True)
    error = (sample - jumprelu(sample, thresholds, epsilon)) ** 2
    loss = error + LAMBDA * heaviside(sample, thresholds, epsilon)
    (gradient,) = torch.autograd.grad(loss.mean(1).sum(), thresholds)
    return gradient[:, 0]


THETA, BATCH = 0.5, 4096
epsilons = np.geomspace(0.01, 1.5, 40)
drawn, axes = figure(3)
thetas = np.linspace(0.05, 1.6, 80)
axes[0].plot(thetas, [exact(theta) for theta in thetas], "k", lw=1.4, label="exact")
for epsilon, color in ((0.1, GREEN), (0.4, BLUE), (1.0, ORANGE)):
    means = [mean_and_variance("rectangle", theta, epsilon)[0] for theta in thetas]
    axes[0].plot(thetas, means, color=color, label=f"mean estimate, ε = {epsilon}")
axes[0].set(xlabel="θ", ylabel="dE[loss]/dθ", title="Rectangle kernel")
axes[0].legend(frameon=False, fontsize=8)
for name, color in zip(KERNELS, (ORANGE, BLUE, GREEN, PINK), strict=True):
    moments = [mean_and_variance(name, THETA, epsilon) for epsilon in epsilons]
    bias = [abs(mean - exact(THETA)) for mean, _ in moments]
    deviation = [np.sqrt(variance / BATCH) for _, variance in moments]
    axes[1].plot(epsilons, bias, color=color, label=f"|bias|, {name}")
    axes[1].plot(epsilons, deviation, color=color, ls="--", lw=1)
axes[1].plot([], [], "k--", lw=1, label=f"standard deviation, N = {BATCH}")
axes[1].set(xscale="log", yscale="log", xlabel="ε", title=f"Bias and spread at θ = {THETA}")
axes[1].set_ylim(1e-5, 1)
axes[1].legend(frameon=False, fontsize=8)
for batch, color in ((256, GREEN), (4096, ORANGE), (65_536, BLUE)):
    moments = [mean_and_variance("rectangle", THETA, epsilon) for epsilon in epsilons]
    errors = [np.sqrt((mean - exact(THETA)) ** 2 + v / batch) for mean, v in moments]
    axes[2].plot(epsilons, errors, color=color, label=f"N = {batch:,}")
    for epsilon in (0.03, 0.2, 1.0) if batch < 10_000 else ():
        found = package_estimates(THETA, epsilon, batch, batches=200)
        rms = float((found - exact(THETA)).square().mean().sqrt())
        axes[2].plot([epsilon], [rms], "o", color=color, ms=5)
axes[2].set(xscale="log", yscale="log", xlabel="ε", title="Root mean square error, rectangle")
axes[2].legend(frameon=False, fontsize=8)
save(drawn, "teaching_estimator")
