"""Dead latents: which are dead, and what resampling makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.resampling import (
    ENCODER_SHARE,
    THRESHOLD_SHARE,
    FiringRecord,
    draw,
    longest_patience,
    patience,
    resample_,
    resample_dead_,
    unexplained,
)
from jumprelu_plugin.control.units import stored


@pytest.mark.parametrize("parameter", ["raw", "log"])
def test_dead_latents_are_resampled_from_residuals(parameter: Any) -> None:
    cfg = JumpReLUTrainingSAEConfig(
        d_in=19,
        d_sae=83,
        target_l0=5.0,
        hyperparameter_units="unit_rms",
        log_threshold=parameter == "log",
    )
    torch.manual_seed(7)
    sae = JumpReLUTrainingSAE(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    sum(p.square().sum() + p.sum() for p in sae.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    dead = torch.zeros(83, dtype=torch.bool)
    dead[[3, 17, 80]] = True
    before = {n: getattr(sae, n).detach().clone() for n in ("W_enc", "W_dec", "threshold", "b_enc")}
    residual = torch.randn(11, 19)
    residual[4:] = 0.0  # tokens rebuilt without an error are never drawn
    latents, tokens = draw(dead, residual, sae.W_dec, seed=5)
    assert sorted(latents.tolist()) == [3, 17, 80]
    assert len(set(tokens.tolist())) == 3 and tokens.max() < 4
    center = torch.randn(19)
    resample_(sae, latents, residual[tokens], residual[tokens], center, ~dead, optimizer)
    living = before["W_enc"][:, ~dead].norm(dim=0).mean()
    for latent, token in zip(latents.tolist(), tokens.tolist(), strict=True):
        unit = residual[token] / residual[token].norm()
        torch.testing.assert_close(sae.W_enc[:, latent], ENCODER_SHARE * living * unit)
        torch.testing.assert_close(sae.W_dec[latent] / sae.W_dec[latent].norm(), unit)
        z = center @ sae.W_enc[:, latent] + sae.b_enc[latent]
        assert abs(float(z.detach())) < 1e-4
        median = before["threshold"][~dead].median()
        torch.testing.assert_close(sae.threshold[latent], THRESHOLD_SHARE * median)
    for name, value in before.items():
        axis = 1 if name == "W_enc" else 0
        kept = (~dead).nonzero().flatten()
        found = getattr(sae, name).detach()
        torch.testing.assert_close(found.index_select(axis, kept), value.index_select(axis, kept))
        first, second = (
            optimizer.state[stored(sae, name)][moment] for moment in ("exp_avg", "exp_avg_sq")
        )
        assert (first.index_select(axis, latents) == 0).all()
        assert (first.index_select(axis, kept) != 0).all()
        usual = second.index_select(axis, kept).mean()
        new = second.index_select(axis, latents)
        torch.testing.assert_close(new, usual.expand_as(new))


def test_nothing_is_resampled_without_dead_latents_or_errors() -> None:
    residual, W_dec = torch.randn(5, 7), torch.randn(11, 7)
    assert draw(torch.zeros(11, dtype=torch.bool), residual, W_dec, 1)[0].numel() == 0
    assert draw(torch.ones(11, dtype=torch.bool), torch.zeros(5, 7), W_dec, 1)[0].numel() == 0
    assert draw(torch.ones(11, dtype=torch.bool), residual, W_dec, 1)[0].numel() == 5


def test_directions_of_active_latents_are_not_drawn_again() -> None:
    random = torch.Generator().manual_seed(3)
    W_dec = 3.7 * torch.randn(13, 31, generator=random)
    dead = torch.zeros(13, dtype=torch.bool)
    dead[[2, 11]] = True
    known = W_dec[[0, 5, 7, 12, 5, 4]] * torch.tensor([0.3, 1.1, 2.3, 0.7, 5.9, 1.3])[:, None]
    new = torch.randn(2, 31, generator=random)
    # Along a dead latent, and against a living one: neither is known.
    residual = torch.cat((known, new, W_dec[11:12], -W_dec[3:4]))
    left = unexplained(residual, W_dec, ~dead)
    cosines = functional.cosine_similarity(residual[:, None], W_dec[None, ~dead], dim=2)
    torch.testing.assert_close(left, 1 - cosines.clamp_min(0).amax(1).square(), atol=1e-5, rtol=0)
    residual *= (torch.tensor([7.0] * 6 + [5.0] * 4) / residual.norm(dim=1))[:, None]
    for seed in range(17):
        _, tokens = draw(dead, residual, W_dec, seed)
        assert tokens.min() >= 6, "a known direction was preferred to a new one"


def test_the_firing_record_counts_silence() -> None:
    record = FiringRecord(5)
    dense = torch.tensor([[0.0, 1.0, 0, 0, 0], [0, 0, 2.0, 0, 0]])
    record.update(dense)
    record.update(torch.tensor([[0.0, 3.0, 0, 0, 0]]).to_sparse())
    assert record.silent.tolist() == [2, 0, 1, 2, 2] and record.steps == 2
    assert record.lived.tolist() == [2] * 5


def test_a_latent_that_fired_for_long_may_be_silent_for_longer() -> None:
    record = FiringRecord(6)
    record.lived = torch.tensor([13, 60, 300, 300, 7000, 7000])
    record.silent = torch.tensor([13, 19, 29, 30, 67, 68])
    # 17 for the first two, a tenth of 300, and never more than four times 17.
    assert record.dead(17).tolist() == [False, True, False, True, False, True]


def test_patience_gives_rare_latents_more_time() -> None:
    assert patience(d_sae=16_384, target_l0=64.0, batch=4_096) == 12
    assert patience(d_sae=65_536, target_l0=16.0, batch=2_048) == 100
    assert longest_patience(d_sae=65_536, target_l0=16.0, batch=2_048) == 400


def test_resampled_latents_are_new_and_the_others_are_not() -> None:
    cfg = JumpReLUTrainingSAEConfig(d_in=19, d_sae=83, target_l0=5.0)
    torch.manual_seed(11)
    sae = JumpReLUTrainingSAE(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    record = FiringRecord(83)
    record.steps = 301
    record.lived += 300
    record.silent[[5, 71]] = torch.tensor([30, 31])
    record.silent[9] = 29
    x = torch.randn(23, 19)
    residual = x + 0.3 * torch.randn(23, 19)  # what the encoder reads is what is left to explain
    before = sae.W_dec.detach().clone()

    def aim(inputs: Any, left: Any, tokens: Any) -> Any:
        assert inputs is x and left is residual and len(tokens) == 2
        return left[tokens], torch.zeros(19)

    resample_dead_(sae, record, 17, x, residual, aim, optimizer, seed=3, mean_density=5 / 83)
    moved = (sae.W_dec.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [5, 71] and record.checked == 301
    assert record.silent[[5, 9, 71]].tolist() == [0, 29, 0]
    assert record.lived[[5, 9, 71]].tolist() == [0, 300, 0]


@pytest.mark.parametrize("useful", [True, False])
def test_a_latent_that_would_add_to_the_error_stays_dead(useful: bool) -> None:
    torch.manual_seed(23)
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=19, d_sae=83, target_l0=5.0))
    dead = torch.arange(83) == 41
    x = torch.randn(53, 19)
    # Where the input points along the new latent, the residual does too, or points away from it.
    direction = functional.normalize(torch.randn(1, 19), dim=1)
    residual = (1.0 if useful else -1.0) * (x @ direction.t()) * direction + 0.1 * torch.randn_like(
        x
    )
    before = sae.W_dec.detach().clone()
    latents = dead.nonzero().flatten()
    zero = torch.zeros(19)
    started = resample_(
        sae, latents, direction, direction, zero, ~dead, None,
        inputs=x, residual=residual, densest=0.4,
    )  # fmt: skip
    assert started.tolist() == ([41] if useful else [])
    if useful:
        z = x @ sae.W_enc[:, 41]
        written = (z * (z > sae.threshold[41]))[:, None] * sae.W_dec[41]
        assert (residual - written).square().sum() < residual.square().sum()
    else:
        torch.testing.assert_close(sae.W_dec.detach(), before, atol=0, rtol=0)


def test_a_useless_latent_is_tried_again_with_the_next_batch() -> None:
    torch.manual_seed(29)
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=19, d_sae=83, target_l0=5.0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    record = FiringRecord(83)
    record.steps = 301
    record.lived += 300
    record.silent[[5, 71]] = 30
    x = torch.randn(53, 19)

    def away(inputs: Any, left: Any, tokens: Any) -> Any:
        return -left[tokens], torch.zeros(19)

    def towards(inputs: Any, left: Any, tokens: Any) -> Any:
        return left[tokens], torch.zeros(19)

    resample_dead_(sae, record, 17, x, x, away, optimizer, seed=3, mean_density=5 / 83)
    assert record.silent[[5, 71]].tolist() == [30, 30] and record.useless == 1.0
    resample_dead_(sae, record, 17, x, x, towards, optimizer, seed=4, mean_density=5 / 83)
    assert record.silent[[5, 71]].tolist() == [0, 0] and record.useless == 0.0


def test_no_latent_is_resampled_once_the_learning_rate_is_low() -> None:
    record, weight = FiringRecord(5), torch.nn.Parameter(torch.zeros(3))
    for rate, may in ((1e-4, True), (3e-3, True), (3.1e-4, True), (2.9e-4, False), (3e-3, True)):
        assert record.may_resample(torch.optim.Adam([weight], lr=rate)) is may
