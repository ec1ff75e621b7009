"""Steps of any shape, threshold, bandwidth, density and dtype against the dense twin in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from jumprelu_plugin.step.dense import encode_dense
from tests.step.problems import Problem, encode, loss_of

# Derandomized: the same problems on every machine and in every run.
PROFILE = settings(
    max_examples=40,
    phases=(Phase.generate,),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# Where the thresholds lie, in standard deviations of the pre-activations.
ACTIVE = {"none": 60.0, "few": 2.0, "half": 0.0, "most": -1.5, "all": -60.0}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Every number is a float32, so that each dtype starts from the same problem."""
    batch, d_in = draw(st.integers(1, 23)), draw(st.integers(1, 19))
    d_sae, d_out = draw(st.integers(1, 47)), draw(st.integers(1, 17))
    where = ACTIVE[draw(st.sampled_from(sorted(ACTIVE)))]
    scale = draw(st.sampled_from([1e-3, 0.3, 1.0, 40.0]))
    bandwidth = scale * draw(st.sampled_from([1e-3, 0.1, 0.7, 5.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    b_enc = scale * (0.3 * torch.randn(d_sae, generator=g) - min(where, 0.0))
    threshold = scale * (max(where, 0.0) + torch.rand(d_sae, generator=g))
    if draw(st.booleans()):  # latents that never fire among others
        threshold[:: draw(st.integers(1, 5))] = 60 * scale
    p = Problem(
        x=torch.randn(batch, d_in, generator=g),
        W_enc=scale * torch.randn(d_in, d_sae, generator=g) / d_in**0.5,
        b_enc=b_enc,
        b_pre=0.4 * torch.randn(d_in, generator=g) if draw(st.booleans()) else None,
        W_dec=torch.randn(d_sae, d_out, generator=g) / d_out**0.5,
        threshold=threshold,
        bandwidth=bandwidth,
        target=torch.randn(batch, d_out, generator=g),
        dead=torch.rand(d_sae, generator=g) < draw(st.sampled_from([0.0, 0.3, 1.0])),
        to_input=draw(st.sampled_from([0.0, 0.41, 1.0])),
    )
    # A latent that fires on most tokens is not dead: what the step sums for it would cancel.
    p.dead &= (pre_activations(p) > p.threshold).double().mean(0) < 0.5
    return p


def pre_activations(p: Problem) -> Tensor:
    p = p.to(torch.float64)
    return encode_dense(p.x, p.W_enc, p.b_enc, p.b_pre).z


def clear_of_edges(p: Problem) -> Problem:
    """The problem without the tokens that rounding could move across θ or a window's edge."""
    z = pre_activations(p)
    edges = torch.tensor([-p.bandwidth / 2, 0.0, p.bandwidth / 2], dtype=torch.float64)
    distance = (z - p.threshold.double())[..., None] - edges
    size = z.abs().max() + p.threshold.abs().max() + 1e-30
    clear = (distance.abs() > 1e-5 * size).all(-1).all(-1)
    return replace(p, x=p.x[clear], target=p.target[clear])


def gradients(path: str, p: Problem, chunk: int = 10**9) -> dict[str, Tensor]:
    leaves = p.leaves()
    loss = loss_of(encode(path, p, leaves, chunk), p, leaves)
    loss.backward()
    zero = torch.zeros(())
    return {"loss": loss.detach()} | {
        name: zero if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }


@given(problems(), st.integers(1, 400))
@PROFILE
def test_the_sparse_step_is_the_dense_one(p: Problem, chunk: int) -> None:
    p = clear_of_edges(p)
    if not len(p.x):
        return
    exact = p.to(torch.float64)
    expected, found = gradients("dense", exact), gradients("sparse", exact, chunk)
    for name, want in expected.items():
        atol = 1e-11 * float(want.abs().max())
        torch.testing.assert_close(found[name], want, rtol=1e-11, atol=atol, msg=name)


@given(problems(), st.integers(1, 400))
@PROFILE
def test_a_rounded_step_errs_as_the_dense_one_does(p: Problem, chunk: int) -> None:
    """Three-way: in float32, twice the dense twin's error and a rounding of as many terms."""
    p = clear_of_edges(p)
    if not len(p.x):
        return
    truth = gradients("dense", p.to(torch.float64))
    plain, fast = gradients("dense", p), gradients("sparse", p, chunk)
    for name, want in truth.items():
        allowed = 2 * (plain[name].double() - want).abs().max()
        terms = len(p.x) * p.threshold.numel()
        floor = torch.finfo(torch.float32).eps * terms**0.5 * want.abs().max()
        error = (fast[name].double() - want).abs().max()
        assert error <= allowed + floor, (name, float(error), float(allowed), float(floor))


@pytest.mark.parametrize(("least", "most"), [(0.0, 0.0), (0.1, 0.9), (1.0, 1.0)])
def test_every_regime_is_drawn(least: float, most: float) -> None:
    """Dictionaries that are empty, between, and all active: of each a problem with clear tokens."""

    def is_one(p: Problem) -> bool:
        share = float((pre_activations(p) > p.threshold).double().mean())
        return least <= share <= most and len(clear_of_edges(p).x) > 1

    assert find(problems(), is_one, settings=PROFILE)
