"""A dictionary sharded over processes trains as the same dictionary in one.

With everything on: L0 control, resampling, a density limit, Matryoshka prefixes, outlier weights,
an encoder that subtracts b_dec.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.units import stored
from jumprelu_plugin.training.distributed.gathering import gather_whole
from jumprelu_plugin.training.distributed.sharded_sae import shard_of
from tests.training.distributed.processes import grouped, run_on

D_IN, D_SAE, BATCH, FEATURES, LR = 23, 96, 301, 61, 4e-3
PREFIXES = [8, 32]
# Silenced at the start: on both shards of two, and on three of four.
DEAD = torch.tensor([5, 31, 40, 66, 90])


def config(**fields: Any) -> JumpReLUTrainingSAEConfig:
    given = {
        "target_l0": 5,
        "matryoshka_loss_weight": 0.5,
        "matryoshka_widths": PREFIXES,
        "max_latent_density": 0.1,
        "apply_b_dec_to_input": True,
        "step_kernel": "sparse",
        **fields,
    }
    return JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **given)


def batches(dtype: torch.dtype) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(FEATURES, D_IN, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    while True:
        firing = torch.rand(BATCH, FEATURES, generator=generator) < 0.06
        strength = 1 + torch.rand(BATCH, FEATURES, generator=generator)
        noise = 0.02 * torch.randn(BATCH, D_IN, generator=generator)
        yield ((firing * strength) @ directions + 0.3 + noise).to(dtype)


def silence(sae: JumpReLUTrainingSAE) -> None:
    _, own = sae.processes.own(DEAD)
    stored(sae, "b_enc").data[own] = -1e3


def train(sae: JumpReLUTrainingSAE, steps: int) -> list[tuple[float, ...]]:
    """SAELens' training loop; loss, error, L0 and λ of every step."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    found, source = [], batches(sae.W_enc.dtype)
    for step in range(steps):
        if step == 1:
            silence(sae)
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (steps - step) / (0.2 * steps))
        output = sae.train().training_forward_pass(
            TrainStepInput(
                sae_in=next(source),
                dead_neuron_mask=None,
                coefficients={"l0": 1.0},
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        error = float(output.losses["mse_loss"])
        found.append(
            (float(output.loss), error, sae.control.batch_l0, float(sae.control.multiplier))
        )
    return found


def result(sae: JumpReLUTrainingSAE) -> dict[str, Tensor]:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    return {**{n: getattr(sae, n).detach() for n in names}, **sae.control.tensors()}


def one_process(steps: int, fields: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    sae = JumpReLUTrainingSAE(config(**fields))
    return train(sae, steps), result(sae)


@grouped
def one_shard(size: int, steps: int, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    shard = shard_of(config(**fields), size)
    found = train(shard, steps)
    per_step = shard.processes.traffic["all_reduce"]
    train_more(shard)
    per_step = shard.processes.traffic["all_reduce"] - per_step
    return found, None, per_step, sum(p.nbytes for p in shard.parameters())


def train_more(shard: Any) -> None:
    """One more step forward and backward, without an update."""
    step = TrainStepInput(next(batches(shard.W_enc.dtype)), {"l0": 1.0}, None, 0, False)
    shard.training_forward_pass(step).loss.backward()


@grouped
def one_whole(size: int, steps: int, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    shard = shard_of(config(**fields), size)
    found = train(shard, steps)
    whole = gather_whole(shard)
    return found, None if whole is None else result(whole)


# The same sums in another order. In float32, 100 steps of training make 1.2e-6 of it, in
# thresholds; in a float64 SAE 5e-7, in thresholds, which are float32 there too.
TOLERANCE = {"float32": 2e-6, "float64": 1e-6}


def assert_same_training(size: int, folder: Path, steps: int, **fields: Any) -> None:
    tolerance = TOLERANCE[fields.get("dtype", "float32")]
    expected, weights = one_process(steps, fields)
    # A latent that was resampled has lived for less than the run.
    assert (weights["lived"][DEAD] < steps - 5).all()
    everywhere = run_on(size, one_whole, folder, size, steps, fields)
    largest_coefficient = max(values[3] for values in expected)
    for found, _ in everywhere:
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[:3] == pytest.approx(theirs[:3], rel=1e-6)
            assert ours[3] == pytest.approx(theirs[3], rel=0, abs=tolerance * largest_coefficient)
    for name, value in everywhere[0][1].items():
        # A bias is added to pre-activations, and as exact as these.
        scale = weights["threshold" if name == "b_enc" else name].abs().max()
        assert (value - weights[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_processes_train_as_one(dtype: str, tmp_path: Path, one_thread: None) -> None:
    assert_same_training(2, tmp_path, 100, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "float64"},
        {"step_kernel": "dense"},
        {"jumprelu_sparsity_loss_mode": "quadratic", "density_penalty_scale": 0.1},
        {"jumprelu_sparsity_loss_mode": "tanh", "initialization": "anthropic"},
    ],
    ids=str,
)
def test_four_processes_train_as_one(
    fields: dict[str, Any], tmp_path: Path, one_thread: None
) -> None:
    assert_same_training(4, tmp_path, 100, **fields)


def test_memory_and_traffic_of_a_shard(tmp_path: Path, one_thread: None) -> None:
    whole = sum(p.nbytes for p in JumpReLUTrainingSAE(config()).parameters())
    for _, _, traffic, held in run_on(2, one_shard, tmp_path, 2, 3, {}):
        assert held <= 1.05 * whole / 2
        # docs/guides/many-gpus.md: x̂ of the whole and of each prefix, the gradient of b_dec, and
        # scalars: L0 and density penalty, two slopes, λ and the norm, a count in float64, a check.
        reconstructions = (1 + len(PREFIXES)) * BATCH * D_IN
        assert traffic == 4 * (reconstructions + D_IN) + 4 * (2 + 2 + 2 + 1) + 8


def test_what_needs_all_latents_in_one_place_is_refused() -> None:
    with pytest.raises(ValueError, match="aux_loss_coefficient needs every dead latent"):
        shard_of(config(aux_loss_coefficient=0.03), 2)
    with pytest.raises(ValueError, match="step_kernel='triton' was never tried on shards"):
        shard_of(config(step_kernel="triton"), 2)
