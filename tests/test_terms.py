"""Terms of the loss beyond the paper's: each against its closed form, and doing what it is for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from test_step import KINDS, Problem, encode, problem
from torch import Tensor, nn

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.cli.saelens_flags import parse_flags
from jumprelu_plugin.control.density import RATE, DensityMultipliers
from jumprelu_plugin.saes.transcoder_config import JumpReLUTrainingTranscoderConfig
from jumprelu_plugin.step.dense import DenseEntries
from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.estimators import jumprelu
from jumprelu_plugin.step.losses import (
    L0,
    AuxiliaryLoss,
    PreActivationLoss,
    QuadraticL0,
    Step,
    Term,
    WithDensityLimit,
    WithDensityPenalty,
    outlier_token_weights,
    reconstruction,
)

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
BATCH, D_SAE = 40_009, 7


SCALE = 0.03


def gaussian_step(to_input: bool = False) -> tuple[Step, Tensor, Tensor, Tensor]:
    """A step whose pre-activations are independent Gaussians; their means, spreads, and z."""
    g = torch.Generator().manual_seed(3)
    mean = torch.linspace(-1.1, 0.9, D_SAE, dtype=torch.float64)
    spread = torch.linspace(0.6, 1.7, D_SAE, dtype=torch.float64)
    noise = torch.randn(BATCH, D_SAE, generator=g, dtype=torch.float64)
    z = (mean + spread * noise).requires_grad_()
    threshold = torch.linspace(0.4, 1.3, D_SAE, dtype=torch.float64).requires_grad_()
    W_dec = torch.randn(D_SAE, 5, generator=g, dtype=torch.float64)
    step = Step(DenseEntries(z), z * (z > threshold), threshold, 0.21, to_input, W_dec)
    return step, mean, spread, z


# ---------------------------------------------------------------- frequency


def test_the_frequency_penalty_is_its_formula() -> None:
    """On frequencies that are counted: 0/5, 1/5, 3/5 and 5/5 of the tokens."""
    z = torch.full((5, 4), 0.2)
    z[:1, 1] = z[:3, 2] = z[:, 3] = 2.3
    threshold = torch.full((4,), 0.7)
    step = Step(DenseEntries(z), z * (z > threshold), threshold, 0.3, False, torch.randn(4, 3))
    expected = sum(f * (1 + f / SCALE) for f in (0.0, 0.2, 0.6, 1.0))
    assert float(WithDensityPenalty(L0(), SCALE)(step)) == pytest.approx(expected, rel=1e-6)
    quadratic = QuadraticL0(1.7)(step) + sum(f**2 / SCALE for f in (0.2, 0.6, 1.0))
    assert float(WithDensityPenalty(QuadraticL0(1.7), SCALE)(step)) == pytest.approx(
        float(quadratic)
    )


def test_the_frequency_penaltys_threshold_gradient_is_the_densitys() -> None:
    """d/dθ of F(1 + F/w₀), F = P(z > θ), is -(1 + 2F/w₀) p(θ): Gaussians give both."""
    step, mean, spread, z = gaussian_step()
    WithDensityPenalty(L0(), SCALE)(step).backward()
    assert step.threshold.grad is not None and z.grad is None
    for i in range(D_SAE):
        distance = float((step.threshold[i] - mean[i]) / spread[i])
        frequency = 0.5 * math.erfc(distance / math.sqrt(2))
        density = math.exp(-(distance**2) / 2) / (float(spread[i]) * math.sqrt(2 * math.pi))
        expected = -(1 + 2 * frequency / SCALE) * density
        assert float(step.threshold.grad[i]) == pytest.approx(expected, rel=0.05), i


def test_the_frequency_penaltys_gradient_reaches_the_encoder_where_it_may() -> None:
    step, _, _, z = gaussian_step(to_input=True)
    WithDensityPenalty(L0(), SCALE)(step).backward()
    assert z.grad is not None and step.threshold.grad is not None
    torch.testing.assert_close(z.grad.sum(0), -step.threshold.grad)


def test_the_ceiling_charges_each_latents_price() -> None:
    """On frequencies that are counted, 0/5, 1/5, 3/5 and 5/5, with a ceiling of 0.3."""
    z = torch.full((5, 4), 0.2)
    z[:1, 1] = z[:3, 2] = z[:, 3] = 2.3
    threshold = torch.full((4,), 0.7)
    step = Step(DenseEntries(z), z * (z > threshold), threshold, 0.3, False, torch.randn(4, 3))
    term = WithDensityLimit(L0(), 0.3)
    assert float(term(step)) == pytest.approx(0.2 + 0.6 + 1.0, rel=1e-6)
    priced = replace(step, density_multipliers=torch.tensor([2.0, 3.0, 5.0, 7.0]))
    excess = 2 * (0.0 - 0.3) + 3 * (0.2 - 0.3) + 5 * (0.6 - 0.3) + 7 * (1.0 - 0.3)
    assert float(term(priced)) == pytest.approx(1.8 + excess, rel=1e-6)


def test_the_ceilings_threshold_gradient_is_the_densitys() -> None:
    """-(1 + μ_i) p(θ_i)."""
    step, mean, spread, _ = gaussian_step()
    prices = torch.linspace(0.0, 7.0, D_SAE, dtype=torch.float64)
    WithDensityLimit(L0(), 0.2)(replace(step, density_multipliers=prices)).backward()
    assert step.threshold.grad is not None
    for i in range(D_SAE):
        distance = float((step.threshold[i] - mean[i]) / spread[i])
        density = math.exp(-(distance**2) / 2) / (float(spread[i]) * math.sqrt(2 * math.pi))
        expected = -(1 + float(prices[i])) * density
        assert float(step.threshold.grad[i]) == pytest.approx(expected, rel=0.05), i


@pytest.mark.parametrize("sparse", [False, True])
def test_prices_follow_the_frequencies(sparse: bool) -> None:
    """Up with what is above the ceiling, at most by the rate; down, and not below 0, otherwise."""
    acts = torch.zeros(50, 3)
    acts[:12, 1] = acts[:45, 2] = 1.7  # 0, 24 and 90 % of the tokens
    prices = DensityMultipliers(3, 0.2)
    for _ in range(7):
        prices.update(acts.to_sparse() if sparse else acts)
    torch.testing.assert_close(prices.multipliers, 7 * RATE * torch.tensor([0.0, 0.2, 1.0]))
    acts[2:, 1:] = 0
    prices.update(acts.to_sparse() if sparse else acts)
    torch.testing.assert_close(prices.multipliers, RATE * torch.tensor([0.0, 1.4 - 0.8, 7.0 - 0.8]))
    resumed = DensityMultipliers(3, 0.2)
    resumed.load(prices.tensors())
    assert torch.equal(resumed.multipliers, prices.multipliers)


def test_every_sparsity_mode_takes_a_frequency_scale() -> None:
    for mode in ("step", "tanh", "quadratic"):
        sae = JumpReLUTrainingSAE(
            steered(jumprelu_sparsity_loss_mode=mode, density_penalty_scale=0.01)
        )
        assert isinstance(sae.sparsity, WithDensityPenalty)
        plain: Term = JumpReLUTrainingSAE(steered(jumprelu_sparsity_loss_mode=mode)).sparsity
        assert sae.sparsity.term == plain


FEATURES, WIDTH, LATENTS, TARGET = 199, 41, 211, 4.0


# Each term is tested without what a steered training adds by itself.
ALONE: dict[str, Any] = {"matryoshka_loss_weight": 0.0, "step_kernel": "sparse"}


def steered(**fields: Any) -> JumpReLUTrainingSAEConfig:
    if "matryoshka_widths" in fields:
        fields = {"matryoshka_loss_weight": None, **fields}
    return JumpReLUTrainingSAEConfig(
        **{**ALONE, "d_in": WIDTH, "d_sae": LATENTS, "target_l0": TARGET, **fields}
    )


def tokens_with_frequent_features(seed: int = 0) -> Iterator[Tensor]:
    """Sums of known directions: seven of them are in 30 % of the tokens, the others in 1 %."""
    g = torch.Generator().manual_seed(1)
    directions = nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=g), dim=1)
    rate = torch.full((FEATURES,), 0.01)
    rate[:7] = 0.3
    g = torch.Generator().manual_seed(seed)
    while True:
        present = torch.rand(1024, FEATURES, generator=g) < rate
        yield (present * (1 + torch.rand(1024, FEATURES, generator=g))) @ directions


def train(sae: JumpReLUTrainingSAE, steps: int, lr: float, **fields: Any) -> None:
    cfg = SAETrainerConfig(
        total_training_samples=steps * 1024,
        train_batch_size_samples=1024,
        lr=lr,
        n_batches_for_norm_estimate=5,
        **{"lr_end": lr, **fields},
    )
    SAETrainer(cfg, sae, data_provider=tokens_with_frequent_features()).fit()


def trained(cfg: JumpReLUTrainingSAEConfig, steps: int = 160) -> JumpReLUTrainingSAE:
    torch.manual_seed(3)
    sae = JumpReLUTrainingSAE(cfg)
    train(sae, steps, lr=5e-3, lr_end=0.0, lr_decay_steps=steps // 2)
    return sae.eval()


@pytest.fixture(scope="module")
def plain() -> JumpReLUTrainingSAE:
    return trained(steered())


@torch.no_grad()
def frequencies(sae: JumpReLUTrainingSAE) -> Tensor:
    """Share of unseen tokens on which each latent fires."""
    data = tokens_with_frequent_features(seed=9)
    x = torch.cat([next(data) for _ in range(8)])
    return (sae.encode(x) > 0).float().mean(0)


def test_the_frequency_penalty_removes_frequent_latents_at_the_l0_asked_for(
    plain: JumpReLUTrainingSAE,
) -> None:
    without, with_it = frequencies(plain), frequencies(trained(steered(density_penalty_scale=0.01)))
    assert (without > 0.1).sum() >= 5
    assert (with_it > 0.1).sum() == 0
    for found in (without, with_it):
        assert float(found.sum()) == pytest.approx(TARGET, rel=0.03)


def test_the_ceiling_removes_frequent_latents_at_the_l0_asked_for() -> None:
    found = frequencies(trained(steered(max_latent_density=0.08)))
    assert (found > 0.1).sum() == 0
    assert float(found.sum()) == pytest.approx(TARGET, rel=0.03)


def test_a_ceiling_keeps_off_the_mean_frequency() -> None:
    sparse = JumpReLUTrainingSAEConfig(d_in=13, d_sae=211, target_l0=9.0, max_latent_density=0.09)
    assert sparse.resolve().max_latent_density == 0.09
    assert replace(sparse, target_l0=11.0).resolve().max_latent_density == pytest.approx(22 / 211)
    assert replace(sparse, target_l0=13.0).resolve().max_latent_density == 1
    # At a fixed penalty the frequencies are not known beforehand.
    assert replace(sparse, target_l0=13.0, l0_coefficient=0.3).resolve().max_latent_density == 0.09


# ---------------------------------------------------------------- nested dictionaries, dead latents


def test_a_steered_training_nests_and_weighs_as_its_config_says() -> None:
    plain = JumpReLUTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, target_l0=TARGET)
    assert plain.resolve().matryoshka_widths == tuple(LATENTS // part for part in (32, 16, 8))
    sparse = replace(plain, target_l0=LATENTS / 97)
    assert sparse.resolve().matryoshka_loss_weight == 0.5
    denser, twice = (
        replace(plain, target_l0=LATENTS / part).resolve().matryoshka_loss_weight
        for part in (20, 10)
    )
    assert 0.5 > denser == pytest.approx(4 * twice)
    assert replace(plain, matryoshka_loss_weight=0.0).resolve().matryoshka_widths == ()
    published = replace(plain, matryoshka_widths=[23, 97])
    assert (
        published.resolve().matryoshka_widths == (23, 97)
        and published.resolve().matryoshka_loss_weight == 2
    )
    fixed = replace(plain, l0_coefficient=0.3)
    assert fixed.resolve().matryoshka_widths == ()


def test_an_outlier_counts_as_if_it_were_no_longer_than_the_limit() -> None:
    target = torch.randn(67, 13, generator=torch.Generator().manual_seed(3))
    target[11] *= 150
    norm = target.norm(dim=1)
    worth = outlier_token_weights(target, 5.0)
    assert (worth[norm <= 5 * norm.median()] == 1).all()
    assert float(worth[11].sqrt() * norm[11]) == pytest.approx(float(5 * norm.median()), rel=1e-5)
    x_hat = 0.9 * target
    expected = (worth[:, None] * (x_hat - target).square()).sum() / 67
    torch.testing.assert_close(reconstruction(x_hat, target, worth), expected)
    silent = torch.zeros(5, 13)
    silent[2] = 1.7  # the median norm is 0, and says nothing
    assert (outlier_token_weights(silent, 5.0) == 1).all()


def test_only_an_saes_steered_training_limits_outliers_unless_it_is_asked_to() -> None:
    plain = JumpReLUTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, target_l0=TARGET)
    assert plain.resolve().outlier_norm_ratio == 10
    transcoder = JumpReLUTrainingTranscoderConfig(d_in=WIDTH, d_sae=LATENTS, target_l0=TARGET)
    assert transcoder.resolve().outlier_norm_ratio == math.inf
    assert replace(transcoder, outlier_norm_ratio=7.0).resolve().outlier_norm_ratio == 7
    assert replace(plain, outlier_norm_ratio=0.0).resolve().outlier_norm_ratio == math.inf
    assert replace(plain, l0_coefficient=0.3).resolve().outlier_norm_ratio == math.inf
    assert (
        replace(plain, l0_coefficient=0.3, outlier_norm_ratio=7.0).resolve().outlier_norm_ratio == 7
    )
    with pytest.raises(ValueError, match="outlier_norm_ratio is -1"):
        JumpReLUTrainingSAE(replace(plain, outlier_norm_ratio=-1.0))


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_an_outlier_weighs_less_in_every_dictionary(path: Literal["sparse", "dense"]) -> None:
    torch.manual_seed(5)
    sae = JumpReLUTrainingSAE(
        steered(matryoshka_widths=[23, 97], matryoshka_loss_weight=0.7, step_kernel=path)
    )
    x = next(tokens_with_frequent_features())[:307]
    x[41] *= 150
    out = sae.training_forward_pass(TrainStepInput(x, {"l0": 1.0}, None, 0, False))
    limit = sae.cfg.resolve().outlier_norm_ratio
    assert limit < math.inf
    acts, worth = out.feature_acts.to_dense(), outlier_token_weights(x, limit)
    assert float(worth.min()) < 0.01
    for m, name, share in (
        (23, "matryoshka_mse_loss_23", 0.35),
        (97, "matryoshka_mse_loss_97", 0.35),
        (LATENTS, "mse_loss", 1.0),
    ):
        squares = (acts[:, :m] @ sae.W_dec[:m] + sae.b_dec - x).square().sum(1)
        torch.testing.assert_close(out.losses[name], share / 1.7 * (worth @ squares) / len(x))


def test_an_outlier_in_the_first_batch_does_not_widen_the_bandwidth() -> None:
    x = next(tokens_with_frequent_features())[:307]
    with_outlier = torch.cat([x, 150 * x[41:42]])
    found = []
    for batch in (x, with_outlier):
        torch.manual_seed(5)
        sae = JumpReLUTrainingSAE(steered())
        sae.training_forward_pass(TrainStepInput(batch, {"l0": 1.0}, None, 0, False))
        found.append((sae.bandwidth, float(sae.threshold.mean()), float(sae.b_dec.sum())))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


WIDTHS = [5, 6, 41, 100, 101]  # of test_step's 101 latents, one block of a single latent


def more_terms(entries: Entries, p: Problem, leaves: dict[str, Tensor]) -> Tensor:
    """Nested reconstructions and the auxiliary loss, through the verbs of `Entries`."""
    theta = leaves["threshold"]
    acts = jumprelu(entries.z, entries.per_latent(theta), p.bandwidth, p.to_input)
    step = Step(entries, acts, theta, p.bandwidth, p.to_input, leaves["W_dec"], p.dead)
    offset = 0.3 * p.target.mean(0)
    x_hat, errors = entries.decode_prefixes(
        acts, leaves["W_dec"], offset, p.target, worth_of(p), WIDTHS[:-1]
    )
    nested = (errors.sum() + reconstruction(x_hat, p.target)) / len(WIDTHS)
    return nested + 0.7 * AuxiliaryLoss()(step, p.target - x_hat)


def worth_of(p: Problem) -> Tensor:
    """Unequal weights of the tokens' inner errors."""
    return torch.linspace(0.3, 1.9, len(p.target), dtype=p.target.dtype)


def written_out(p: Problem, leaves: dict[str, Tensor]) -> Tensor:
    """The same, token by token and latent by latent; JumpReLU's jump as a detached detour."""
    centred = leaves["x"] - leaves.get("b_pre", torch.zeros(()))
    z = centred @ leaves["W_enc"] + leaves["b_enc"]
    theta = leaves["threshold"]
    inside = ((z - theta).abs() < p.bandwidth / 2).double()
    jump = (z if p.to_input else z.detach()) - theta
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
            worth = 1.0 if width == WIDTHS[-1] else float(worth_of(p)[b])
            loss = loss + worth * (x_hat - p.target[b]).square().sum() / (len(WIDTHS) * batch)
        if dead:
            largest = sorted(dead, key=lambda i: -float(z[b, i]))[:k]
            found = sum((z[b, i].relu() * leaves["W_dec"][i] for i in largest), torch.zeros(d_out))
            error = (found - (p.target[b] - x_hat).detach()).square().sum()
            loss = loss + 0.7 * min(1.0, len(dead) / k) * error / batch
    return loss


@pytest.mark.parametrize("dead_latents", ["many", "few", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_nested_and_auxiliary_terms_are_what_they_are_written_out(
    kind: str, dead_latents: str
) -> None:
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


def test_nested_dictionaries_survive_json_flags_and_saving(tmp_path: Path) -> None:
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
def test_losses_of_nested_dictionaries_are_shares_of_a_mean(
    normalisation: str, path: Literal["sparse", "dense"]
) -> None:
    """One loss for each width, summing to the mean error, at the whole dictionary's output, in the
    input's own units."""
    cfg = steered(
        matryoshka_widths=[23, 97], l0_coefficient=0.1, jumprelu_init_threshold=0.4,
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


def test_the_first_latents_alone_rebuild_more_when_they_are_asked_to(
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


def test_the_auxiliary_loss_teaches_dead_latents_the_residual() -> None:
    """Thresholds out of reach for a third of the latents: only this loss can teach those."""
    left = []
    for coefficient in (None, 1.0):
        torch.manual_seed(3)
        cfg = steered(
            target_l0=None,
            l0_coefficient=2.0,
            jumprelu_init_threshold=1.5,
            jumprelu_bandwidth=0.5,
            unit_norm_decoder=True,
            aux_loss_coefficient=coefficient,
            normalize_activations="none",
        )
        sae = JumpReLUTrainingSAE(cfg)
        with torch.no_grad():
            sae.threshold[::3] = 50.0
        train(sae, steps=40, lr=1e-2, dead_feature_window=5)
        with torch.no_grad():
            x = next(tokens_with_frequent_features(seed=4))
            residual = x - sae.eval()(x)
            z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            best = z[:, ::3].topk(WIDTH // 2, dim=1)
            found = torch.zeros_like(z[:, ::3]).scatter(1, best.indices, best.values.relu())
            error = (residual - found @ sae.W_dec[::3]).square().sum()
            left.append(float(error / residual.square().sum()))
    assert left[1] < 0.7 < 1 < left[0]
