"""Inputs of a step whose every shape is another prime, and losses on them by each kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jumprelu_plugin.step.dense import encode_dense
from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.kernels.buffers import PairBuffers
from jumprelu_plugin.step.losses import (
    L0,
    PreActivationLoss,
    Step,
    TanhL0,
    WithDensityPenalty,
    reconstruction,
)
from jumprelu_plugin.step.sparse import encode_sparse

BATCH, D_IN, D_SAE, D_OUT = 37, 23, 101, 19
CHUNKS = {"less than a row": D_SAE // 2 + 3, "three rows": 3 * D_SAE + 5, "all": 10**9}
SPARSITY, TANH, PRE_ACT = 0.31, 0.17, 0.23


@dataclass
class Problem:
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    b_pre: Tensor | None
    W_dec: Tensor
    threshold: Tensor
    bandwidth: float
    target: Tensor
    dead: Tensor
    to_input: float = 0.63

    def to(self, dtype: torch.dtype | None = None, device: str = "cpu") -> Problem:
        """Every tensor on `device`, numbers in `dtype`."""
        tensors = {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}
        moved = {
            name: v.to(device, dtype if v.is_floating_point() else None)
            for name, v in tensors.items()
        }
        return replace(self, **moved)

    def leaves(self) -> dict[str, Tensor]:
        names = ("x", "W_enc", "b_enc", "b_pre", "W_dec", "threshold")
        found = {name: getattr(self, name) for name in names}
        return {n: v.detach().clone().requires_grad_() for n, v in found.items() if v is not None}


def problem(kind: str = "ordinary", dtype: torch.dtype = torch.float64) -> Problem:
    """A step with a window on both sides of θ; every number is a float32, whatever the dtype."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    made = Problem(
        x=normal(BATCH, D_IN),
        W_enc=normal(D_IN, D_SAE) / D_IN**0.5,
        b_enc=0.3 * normal(D_SAE),
        b_pre=0.4 * normal(D_IN),
        W_dec=normal(D_SAE, D_OUT) / D_OUT**0.5,
        threshold=0.7 + torch.rand(D_SAE, generator=g),
        bandwidth=0.43,
        target=normal(BATCH, D_OUT),
        dead=torch.rand(D_SAE, generator=g) < 0.4,
    )
    if kind == "nothing active":
        made.threshold = 50 + made.threshold
    elif kind == "all active":
        made.b_enc = 50 + made.b_enc
        made.dead[:] = False  # a latent that fires on every token is not dead
    elif kind == "window wider than θ":
        made.threshold, made.bandwidth = 0.1 * made.threshold, 1.7
    elif kind == "some latents never":
        made.threshold[::3] = 50.0
    elif kind == "no b_pre":
        made.b_pre = None
    elif kind == "estimator to θ only":
        made.to_input = 0.0
    else:
        assert kind == "ordinary"
    return made.to(dtype)


KINDS = (
    "ordinary",
    "nothing active",
    "all active",
    "window wider than θ",
    "some latents never",
    "no b_pre",
    "estimator to θ only",
)


def encode(path: str, p: Problem, leaves: dict[str, Tensor], chunk: int = 10**9) -> Entries:
    inputs = leaves["x"], leaves["W_enc"], leaves["b_enc"], leaves.get("b_pre")
    if path == "dense":
        return encode_dense(*inputs)
    if path == "triton":
        from jumprelu_plugin.step.kernels.entries import encode_buffered

        threshold, buffers = leaves["threshold"], PairBuffers()
        return encode_buffered(*inputs, threshold, p.bandwidth, buffers, keep_mean=True)
    return encode_sparse(
        *inputs, leaves["threshold"], p.bandwidth, keep_mean=True, tile_bytes=8 * chunk
    )


def loss_of(entries: Entries, p: Problem, leaves: dict[str, Tensor]) -> Tensor:
    theta = leaves["threshold"]
    acts = entries.activations(theta, p.bandwidth, p.to_input)
    step = Step(entries, acts, theta, p.bandwidth, p.to_input, leaves["W_dec"], p.dead)
    x_hat = entries.decode(acts, leaves["W_dec"])
    return (
        reconstruction(x_hat, p.target)
        + SPARSITY * WithDensityPenalty(L0(), 0.07)(step)
        + TANH * TanhL0(1.3)(step)
        + PRE_ACT * PreActivationLoss()(step)
    )
