"""The losses that reach dead latents: what they take and what they keep in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.losses import PreActivationLoss
from tests.saes.frequent_features import more_terms
from tests.step.gaussian import D_SAE, gaussian_step
from tests.step.problems import encode, problem

pytestmark = pytest.mark.usefixtures("one_thread_throughout")


def test_only_dead_columns_are_dense_in_the_sparse_step() -> None:
    """What the sparse step keeps for backward is never as large as batch times dictionary."""
    p = problem("some latents never")
    p.dead[:] = False
    p.dead[::3] = True
    leaves, sizes = p.leaves(), []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        more_terms(encode("sparse", p, leaves), p, leaves).backward()
    batch, d_sae = len(p.x), len(p.threshold)
    assert batch * int(p.dead.sum()) in sizes and batch * d_sae not in sizes


def test_the_pre_activation_loss_takes_dead_latents_or_all() -> None:
    step, _, _, z = gaussian_step()
    step = replace(step, dead=torch.arange(D_SAE) % 3 == 0)
    terms = (step.threshold - z).relu() * step.W_dec.norm(dim=1)
    everything, dead_ones = terms.sum(1).mean(), terms[:, ::3].sum(1).mean()
    assert float(PreActivationLoss("all")(step)) == pytest.approx(float(everything))
    assert float(PreActivationLoss()(step)) == pytest.approx(float(dead_ones))
