"""A dictionary on a mesh of processes trains as the same dictionary in one.

With everything on: L0 control, resampling, a density limit, Matryoshka prefixes, outlier weights,
an encoder that subtracts b_dec.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.units import stored
from jumprelu_plugin.saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig,
    JumpReLUTrainingTranscoderConfig,
)
from jumprelu_plugin.training.distributed.forecast import TrainingSizes, traffic
from jumprelu_plugin.training.distributed.gathering import gather_whole
from jumprelu_plugin.training.distributed.mesh import Mesh
from jumprelu_plugin.training.distributed.sharded_sae import ShardOfSAE, shard_of
from tests.training.distributed.processes import grouped, run_on

D_IN, D_OUT, D_SAE, BATCH, FEATURES, LR = 23, 19, 96, 4 * 71, 61, 4e-3
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


def batches(dtype: torch.dtype, seed: int = 3) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
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


def own_tokens(sae: JumpReLUTrainingSAE, batch: Tensor) -> Tensor:
    return sae.processes.mesh.tokens_of(batch) if isinstance(sae, ShardOfSAE) else batch


def rounded_otherwise(source: Iterator[Tensor], seed: int) -> Iterator[Tensor]:
    """The same numbers, each one float32 rounding away."""
    generator = torch.Generator().manual_seed(seed)
    for batch in source:
        ends = torch.tensor([-torch.inf, torch.inf])
        towards = ends[torch.randint(2, batch.shape, generator=generator)]
        yield torch.nextafter(batch.float(), towards).to(batch.dtype)


def train(
    sae: JumpReLUTrainingSAE, steps: int, source: Iterator[Tensor]
) -> list[tuple[float, ...]]:
    """SAELens' training loop; loss, error, L0 and λ of every step."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    found = []
    for step in range(steps):
        if step == 1:
            silence(sae)
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (steps - step) / (0.2 * steps))
        output = sae.train().training_forward_pass(
            TrainStepInput(
                sae_in=own_tokens(sae, next(source)),
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


def one_process(
    steps: int, fields: dict[str, Any], data: int, noise: int | None = None
) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    sae = JumpReLUTrainingSAE(config(**fields))
    source = batches(sae.W_enc.dtype, data)
    found = train(sae, steps, source if noise is None else rounded_otherwise(source, noise))
    return found, result(sae)


@grouped
def one_place(sizes: tuple[int, int], steps: int, fields: dict[str, Any], data: int = 3) -> Any:
    """Training on one process of a mesh; bytes of one more step by group, and of parameters."""
    torch.manual_seed(0)
    shard = shard_of(config(**fields), Mesh(*sizes))
    found = train(shard, steps, batches(shard.W_enc.dtype, data))
    own = {name: value.clone() for name, value in result(shard).items()}
    whole = gather_whole(shard)
    before = shard.processes.mesh.traffic.copy()
    one_more_step(shard)
    traffic = shard.processes.mesh.traffic - before
    held = sum(p.nbytes for p in shard.parameters())
    return Place(found, traffic, held, own, None if whole is None else result(whole))


class Place(NamedTuple):
    steps: list[tuple[float, ...]]
    traffic: Counter[str]
    held: int
    own: dict[str, Tensor]
    whole: dict[str, Tensor] | None


def one_more_step(shard: ShardOfSAE) -> None:
    """Forward and backward, without an update."""
    rows = own_tokens(shard, next(batches(shard.W_enc.dtype)))
    step = TrainStepInput(rows, {"l0": 1.0}, None, 0, False)
    shard.training_forward_pass(step).loss.backward()


# Relative, of the same sums in another order.
TOLERANCE = 1e-6


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest one in each tensor, relative to its largest number."""
    differences = {}
    for name, value in found.items():
        # A bias is added to pre-activations, and as exact as these.
        scale = expected["threshold" if name == "b_enc" else name].abs().max()
        largest = (value - expected[name]).abs().max()
        differences[name] = float(largest / scale) if largest else 0.0
    return differences


class Expected(NamedTuple):
    data: int
    steps: list[tuple[float, ...]]
    weights: dict[str, Tensor]
    tolerance: float


@cache
def on_data_that_rounding_leaves_alone(steps: int, fields: tuple[tuple[str, Any], ...]) -> Expected:
    """One process's training, on data where no pre-activation comes so close to its threshold that
    rounding decides, on this processor; and what rounding the data makes of it.

    In float32, 100 steps make 2e-6 of one rounding, and where it decides, 1e-2.
    """
    for data in range(3, 23):
        expected, weights = one_process(steps, dict(fields), data)
        changed = 0.0
        for noise in range(6):
            _, otherwise = one_process(steps, dict(fields), data, noise)
            changed = max(changed, *difference(otherwise, weights).values())
            if changed > 4 * TOLERANCE:
                break
        if changed <= 4 * TOLERANCE:
            return Expected(data, expected, weights, max(TOLERANCE, changed))
    raise AssertionError("rounding decides on every data set")


def assert_same_training(
    sizes: tuple[int, int], folder: Path, steps: int, **fields: Any
) -> list[Place]:
    data, expected, weights, tolerance = on_data_that_rounding_leaves_alone(
        steps, tuple(fields.items())
    )
    # A latent that was resampled has lived for less than the run.
    assert (weights["lived"][DEAD] < steps - 5).all()
    replicas, shards = sizes
    places = run_on(replicas * shards, one_place, folder, sizes, steps, fields, data)
    largest_coefficient = max(values[3] for values in expected)
    for place in places:
        for ours, theirs in zip(place.steps, expected, strict=True):
            assert ours[:3] == pytest.approx(theirs[:3], rel=1e-6)
            assert ours[3] == pytest.approx(theirs[3], rel=0, abs=tolerance * largest_coefficient)
    for name, relative in difference(places[0].whole, weights).items():
        assert relative <= tolerance, name
    for rank, place in enumerate(places):
        for name, value in place.own.items():
            # The replicas of a shard apply the same gradients, and stay the same to the bit.
            assert torch.equal(value, places[rank % shards].own[name]), name
    return places


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["latents", "tokens"])
def test_two_processes_train_as_one(
    sizes: tuple[int, int], dtype: str, tmp_path: Path, one_thread: None
) -> None:
    assert_same_training(sizes, tmp_path, 100, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4), (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "float64"},
        {"step_kernel": "dense"},
        {"jumprelu_sparsity_loss_mode": "quadratic", "density_penalty_scale": 0.1},
        {"jumprelu_sparsity_loss_mode": "tanh"},
    ],
    ids=str,
)
def test_four_processes_train_as_one(
    sizes: tuple[int, int], fields: dict[str, Any], tmp_path: Path, one_thread: None
) -> None:
    assert_same_training(sizes, tmp_path, 100, **fields)


@grouped
def gradients_there_at_each_start() -> list[set[str]]:
    """For each sum of a matrix's gradient, which other matrices had theirs when it started."""
    torch.manual_seed(0)
    shard = shard_of(config(), Mesh(2, 1))
    train(shard, 2, batches(shard.W_enc.dtype))
    found: list[set[str]] = []
    tokens = shard.processes.mesh.tokens
    start = tokens.start_sum

    def noted(values: Tensor) -> Any:
        found.append({name for name in ("W_dec", "W_enc") if getattr(shard, name).grad is not None})
        return start(values)

    tokens.start_sum = noted  # type: ignore[method-assign]
    one_more_step(shard)
    return found


def test_a_gradient_is_summed_while_the_next_is_computed(tmp_path: Path) -> None:
    for found in run_on(2, gradients_there_at_each_start, tmp_path):
        assert found == [{"W_dec"}, {"W_dec", "W_enc"}]


def test_a_density_penalty_is_of_the_whole_batch(tmp_path: Path, one_thread: None) -> None:
    assert_same_training((2, 2), tmp_path, 40, density_penalty_scale=0.1)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_memory_and_traffic_of_a_process(
    sizes: tuple[int, int], tmp_path: Path, one_thread: None
) -> None:
    whole = sum(p.nbytes for p in JumpReLUTrainingSAE(config()).parameters())
    replicas, shards = sizes
    tokens, latents = BATCH // replicas, D_SAE // shards
    # docs/guides/many-gpus.md has these sums.
    reconstructions = 4 * tokens * D_IN * (1 + len(PREFIXES))
    in_a_row = reconstructions + 4 * D_IN + 4 * (1 + 1 + 1)
    parameters = 2 * latents * D_IN + 2 * latents + D_IN
    in_a_column = 4 * (parameters + latents + tokens + 2 + len(PREFIXES))
    over_all = 4 * (2 + 2) + 2 * 8
    sizes_of_run = TrainingSizes(
        D_IN, D_IN, D_SAE, BATCH, entries=0.0, prefixes=len(PREFIXES), reads_b_dec=True
    )
    predicted = dataclasses.asdict(traffic(sizes_of_run, *sizes))
    del predicted["harvest"]  # the test's batches are no model's
    for place in run_on(replicas * shards, one_place, tmp_path, sizes, 3, {}):
        assert place.held <= 1.05 * whole / shards
        assert place.traffic == Counter({k: n for k, n in predicted.items() if n})
        assert place.traffic == Counter(
            {
                "all": over_all,
                **({"latents": in_a_row} if shards > 1 else {}),
                **({"tokens": in_a_column} if replicas > 1 else {}),
            }
        )


@grouped
def one_transcoder(sizes: tuple[int, int], skip: bool) -> tuple[Counter[str], int]:
    """Bytes of a step of a transcoder by group, after two others, and of its parameters."""
    torch.manual_seed(0)
    kind = JumpReLUTrainingSkipTranscoderConfig if skip else JumpReLUTrainingTranscoderConfig
    fields = {"target_l0": 5, "max_latent_density": 0.1, "step_kernel": "sparse"}
    cfg = kind(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, **fields)
    shard = shard_of(cfg, Mesh(*sizes))
    source = (torch.cat([rows, rows[:, :D_OUT].abs()], 1) for rows in batches(shard.W_enc.dtype))
    train(shard, 2, source)
    before = shard.processes.mesh.traffic.copy()
    step = TrainStepInput(own_tokens(shard, next(source)), {"l0": 1.0}, None, 2, False)
    shard.training_forward_pass(step).loss.backward()
    held = sum(p.nbytes for p in shard.parameters())
    return shard.processes.mesh.traffic - before, held


@pytest.mark.parametrize("skip", [False, True], ids=["transcoder", "skip"])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=str)
def test_traffic_of_a_transcoder(
    sizes: tuple[int, int], skip: bool, tmp_path: Path, one_thread: None
) -> None:
    sizes_of_run = TrainingSizes(
        D_IN,
        D_OUT,
        D_SAE,
        BATCH,
        entries=0.0,
        limits_outliers=False,
        transcodes=True,
        skips=skip,
    )
    replicas, shards = sizes
    predicted = dataclasses.asdict(traffic(sizes_of_run, *sizes))
    # Both hooks, a share of the tokens from each process.
    assert predicted.pop("harvest") == 4 * BATCH * (D_IN + D_OUT) // 2
    parameters = D_SAE // shards * (D_IN + D_OUT + 2) + D_OUT + skip * D_IN * D_OUT
    for counted, held in run_on(replicas * shards, one_transcoder, tmp_path, sizes, skip):
        assert held == 4 * parameters
        assert counted["tokens"] == (replicas > 1) * 4 * (parameters + D_SAE + 2)
        assert counted == Counter({k: n for k, n in predicted.items() if n})


@grouped
def refused(fields: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as raised:
        shard_of(config(**fields), Mesh(1, 2))
    return str(raised.value)


def test_what_needs_all_latents_in_one_place_is_refused(tmp_path: Path) -> None:
    message = "aux_loss_coefficient needs every dead latent"
    found = run_on(2, refused, tmp_path, {"aux_loss_coefficient": 0.03})
    assert all(message in said for said in found)
