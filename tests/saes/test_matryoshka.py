"""Matryoshka prefixes: config, loss against its definition, and what training makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import sae_lens
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.cli.saelens_flags import parse_flags
from jumprelu_plugin.recipes import MATRYOSHKA
from tests.saes.frequent_features import (
    LATENTS,
    TARGET,
    WIDTH,
    WIDTHS,
    frequencies,
    more_terms,
    steered,
    token_weights_of,
    tokens_with_frequent_features,
    trained,
)
from tests.step.problems import KINDS, Problem, encode, problem

pytestmark = pytest.mark.usefixtures("one_thread_throughout")


def test_a_training_has_the_prefixes_and_weights_of_its_config() -> None:
    plain = JumpReLUTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, target_l0=TARGET)
    assert plain.resolve().matryoshka_widths == ()
    weighed = replace(plain, matryoshka_loss_weight=0.3).resolve()
    assert weighed.matryoshka_widths == tuple(LATENTS // part for part in (32, 16, 8))
    assert weighed.matryoshka_loss_weight == 0.3
    recipe = MATRYOSHKA.sae_config(WIDTH, LATENTS, target_l0=TARGET).resolve()
    assert recipe.matryoshka_widths == weighed.matryoshka_widths
    assert recipe.matryoshka_loss_weight == 0.5
    assert replace(plain, matryoshka_loss_weight=0.0).resolve().matryoshka_widths == ()
    published = replace(plain, matryoshka_widths=[23, 97])
    assert (
        published.resolve().matryoshka_widths == (23, 97)
        and published.resolve().matryoshka_loss_weight == 2
    )


def written_out(p: Problem, leaves: dict[str, Tensor]) -> Tensor:
    """The same, token by token and latent by latent; JumpReLU's jump as a detached detour."""
    centred = leaves["x"] - leaves.get("b_pre", torch.zeros(()))
    z = centred @ leaves["W_enc"] + leaves["b_enc"]
    theta = leaves["threshold"]
    inside = ((z - theta).abs() < p.bandwidth / 2).double()
    jump = p.to_input * z + (1 - p.to_input) * z.detach() - theta
    # Worth 0; its gradient is the estimator's.
    detour = theta.detach() / p.bandwidth * inside * (jump - jump.detach())
    f = z * (z > theta) + detour
    loss = torch.zeros((), dtype=torch.float64)
    batch, d_out = p.target.shape
    dead = [i for i in range(len(theta)) if p.dead[i]]
    k = d_out // 2
    for b in range(batch):
        x_hat = 0.3 * p.target.mean(0)
        for start, width in zip([0, *WIDTHS], WIDTHS, strict=False):
            for i in range(start, width):
                x_hat = x_hat + f[b, i] * leaves["W_dec"][i]
            worth = 1.0 if width == WIDTHS[-1] else float(token_weights_of(p)[b])
            loss = loss + worth * (x_hat - p.target[b]).square().sum() / (len(WIDTHS) * batch)
        if dead:
            largest = sorted(dead, key=lambda i: -float(z[b, i]))[:k]
            found = sum((z[b, i].relu() * leaves["W_dec"][i] for i in largest), torch.zeros(d_out))
            error = (found - (p.target[b] - x_hat).detach()).square().sum()
            loss = loss + 0.7 * min(1.0, len(dead) / k) * error / batch
    return loss


@pytest.mark.parametrize("dead_latents", ["many", "few", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefix_and_auxiliary_losses_are_their_definitions(kind: str, dead_latents: str) -> None:
    p = problem(kind)
    if dead_latents != "many":
        p.dead[:] = False
    if dead_latents == "few":
        p.dead[[3, 50, 99]] = True
    results = []
    for way in ("written out", "dense", "sparse"):
        leaves = p.leaves()
        made = written_out(p, leaves) if way == "written out" else None
        loss = more_terms(encode(way, p, leaves), p, leaves) if made is None else made
        loss.backward()
        results.append({"loss": loss.detach(), **{n: v.grad for n, v in leaves.items()}})
    expected = results[0]
    for found in results[1:]:
        for name, want in expected.items():
            got = found[name]
            if want is None or got is None:
                assert not (0 if want is None else want.any()) and not (
                    got is not None and got.any()
                )
                continue
            scale = float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12 * scale, msg=name)


def test_matryoshka_widths_survive_json_flags_and_saving(tmp_path: Path) -> None:
    cfg = steered(
        matryoshka_widths=[23, 97], density_penalty_scale=0.02, aux_loss_coefficient=1 / 32
    )
    again = JumpReLUTrainingSAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again.resolve().matryoshka_widths == cfg.resolve().matryoshka_widths == (23, 97)
    assert again.to_dict() == cfg.to_dict()
    flags = "--architecture jumprelu --d_in 41 --d_sae 211 --target_l0 4 --matryoshka_widths 23 97"
    assert parse_flags(flags.split()).sae.matryoshka_widths == [23, 97]  # type: ignore[attr-defined]
    sae = trained(cfg, steps=20)
    sae.save_inference_model(tmp_path)
    stock = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(stock) is sae_lens.JumpReLUSAE
    x = next(tokens_with_frequent_features(seed=4))
    torch.testing.assert_close(stock(x), sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_losses_of_matryoshka_prefixes_are_shares_of_a_mean(
    normalisation: str, path: Literal["sparse", "dense"]
) -> None:
    """One loss for each width, summing to the mean error, at the whole dictionary's output, in the
    input's own units."""
    cfg = steered(
        matryoshka_widths=[23, 97], target_l0=None, l0_coefficient=0.1,
        jumprelu_init_threshold=0.4,
        jumprelu_bandwidth=0.3, normalize_activations=normalisation, step_kernel=path,
    )  # fmt: skip
    torch.manual_seed(1)
    sae = JumpReLUTrainingSAE(cfg).train()
    x = next(tokens_with_frequent_features())
    if normalisation == "constant_norm_rescale":
        x = x[x.norm(dim=1) > 0]  # SAELens divides by the norm
    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"l0": 0.1},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    acts = output.feature_acts
    acts = acts.to_dense() if acts.is_sparse else acts
    scale, shift = torch.ones(len(x), 1), torch.zeros(len(x), 1)
    if normalisation == "layer_norm":
        scale, shift = x.std(1, keepdim=True), x.mean(1, keepdim=True)
    elif normalisation == "constant_norm_rescale":
        scale = x.norm(dim=1, keepdim=True) / WIDTH**0.5
    errors = {}
    for width in (23, 97, LATENTS):
        x_hat = scale * (acts[:, :width] @ sae.W_dec[:width] + sae.b_dec) + shift
        errors[width] = (x_hat - x).square().sum(1).mean()
    for name, width in (
        ("matryoshka_mse_loss_23", 23),
        ("matryoshka_mse_loss_97", 97),
        ("mse_loss", 211),
    ):
        assert float(output.losses[name]) == pytest.approx(float(errors[width]) / 3, rel=1e-4)
    whole = (output.sae_out - x).square().sum(1).mean()
    assert float(whole) == pytest.approx(float(errors[LATENTS]), rel=1e-4)


def test_the_first_latents_reconstruct_more_with_a_matryoshka_loss(
    plain: JumpReLUTrainingSAE,
) -> None:
    def error_of_first(sae: JumpReLUTrainingSAE) -> float:
        x = next(tokens_with_frequent_features(seed=4))
        acts = sae.encode(x)[:, :23]
        x_hat = acts @ sae.W_dec[:23] + sae.b_dec
        return float(((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).detach())

    nested = trained(steered(matryoshka_widths=[23, 97]))
    assert error_of_first(nested) < 0.8 * error_of_first(plain)
    assert float(frequencies(nested).sum()) == pytest.approx(TARGET, rel=0.03)
