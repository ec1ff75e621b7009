"""A cross-layer transcoder on a mesh of processes trains as the same one in one process.

With everything on: L0 control, resampling, a density limit, outlier weights.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from jumprelu_plugin.training.distributed.gathering import gather
from jumprelu_plugin.training.distributed.mesh import Mesh
from jumprelu_plugin.transcoders.clt import CLTConfig, CLTTrainingConfig, CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.forecast import clt_traffic
from jumprelu_plugin.transcoders.clt.memory import parameter_count
from jumprelu_plugin.transcoders.clt.sharded_step import (
    ShardedTrainingStep,
    latent_axis,
    shard_of_clt,
)
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep
from tests.training.distributed.processes import grouped, run_on

D_IN, D_OUT, D_SAE, LAYERS, BATCH, FEATURES, LR = 13, 11, 60, 3, 4 * 53, 29, 4e-3

# Silenced at the start, in every layer: on both shards of two, and on three of four.
DEAD = torch.tensor([4, 17, 33, 58])
WHERE = CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS)))


def training(**fields: Any) -> CLTTrainingConfig:
    given = {
        "target_l0": 4.0,
        "max_latent_density": 0.15,
        "outlier_norm_ratio": 2.0,
        "jumprelu_ste_input_share": 0.75,  # with it, dead latents of every shard are resampled
        "step_kernel": "sparse",
        **fields,
    }
    return CLTTrainingConfig(**given)


def batch(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Sparse causes that a layer sees and that its own and all later outputs depend on."""
    fixed = torch.Generator().manual_seed(11)
    mix = functional.normalize(torch.randn(LAYERS, FEATURES, D_IN, generator=fixed), dim=-1)
    out = torch.randn(LAYERS, LAYERS, FEATURES, D_OUT, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, BATCH, FEATURES)
    causes = (1 + torch.rand(shape, generator=generator)) * (
        torch.rand(shape, generator=generator) < 0.08
    )
    inputs = [causes[layer] @ mix[layer] for layer in range(LAYERS)]
    targets = [
        torch.stack([causes[layer] @ out[layer, m] for layer in range(m + 1)]).sum(0)
        for m in range(LAYERS)
    ]
    for y in targets:
        y += 0.3 + 0.05 * torch.randn(y.shape, generator=generator)
    return [x.to(dtype) for x in inputs], [y.to(dtype) for y in targets]


def own(training_step: CLTTrainingStep, rows: list[Tensor]) -> list[Tensor]:
    if not isinstance(training_step, ShardedTrainingStep):
        return rows
    return [training_step.processes.mesh.tokens_of(each) for each in rows]


class Trained(NamedTuple):
    """The loss, L0s, λs, FVUs and share of dead latents of every step; weights and record."""

    steps: list[tuple[float, list[float], list[float], list[float], float]]
    tensors: dict[str, Tensor]


def train(training_step: CLTTrainingStep, steps: int) -> Trained:
    model, found = training_step.model, []
    dtype = model.sources[0].W_dec.dtype
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for step in range(steps):
        if step == 1:
            _, places = training_step.processes.own(DEAD)
            for source in model.sources:
                source.b_enc.data[places] = -1e3
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (steps - step) / (0.2 * steps))
        inputs, targets = (own(training_step, rows) for rows in batch(step, dtype))
        output = training_step.loss(inputs, targets)
        optimizer.zero_grad()
        output.loss.backward()
        if not isinstance(training_step, ShardedTrainingStep):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(
            (
                output.batch_loss(),
                output.l0,
                [float(value) for value in output.coefficients],
                output.fvu(LAYERS),
                training_step.dead_share(),
            )
        )
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return Trained(found, {**weights, **training_step.tensors()})


def one_process(steps: int, dtype: torch.dtype, fields: dict[str, Any]) -> Trained:
    torch.manual_seed(0)
    model = CrossLayerTranscoder(WHERE).to(dtype)
    return train(CLTTrainingStep(model, training(**fields)), steps)


class Place(NamedTuple):
    """What one process of a mesh made, and what of the whole the first was sent.

    Attributes:
        traffic: bytes of one more step, by group.
        held: bytes of parameters.
    """

    own: Trained
    whole: dict[str, Tensor | None]
    traffic: Counter[str]
    held: int


@grouped
def one_place(
    sizes: tuple[int, int], steps: int, dtype: torch.dtype, fields: dict[str, Any]
) -> Place:
    torch.manual_seed(0)
    model, processes = shard_of_clt(WHERE, Mesh(*sizes))
    training_step = ShardedTrainingStep(model.to(dtype), training(**fields), processes)
    found = train(training_step, steps)
    kept = Trained(found.steps, {name: value.clone() for name, value in found.tensors.items()})
    whole = {
        name: gather(value, latent_axis(name) if "." in name else 0, processes)
        for name, value in kept.tensors.items()
    }
    before = processes.mesh.traffic.copy()
    inputs, targets = (own(training_step, rows) for rows in batch(0, dtype))
    output = training_step.loss(inputs, targets)
    output.loss.backward()
    output.errors(LAYERS)  # as the trainer does for its monitors
    traffic = processes.mesh.traffic - before
    return Place(kept, whole, traffic, sum(p.nbytes for p in model.parameters()))


# The same sums in another order: 60 steps make 3e-7 of it in float32, in decoders, and 2e-15 in
# float64, in thresholds.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def assert_same_training(
    sizes: tuple[int, int], folder: Path, steps: int, dtype: torch.dtype, **fields: Any
) -> None:
    expected = one_process(steps, dtype, fields)
    for layer in range(LAYERS):
        # A latent that was resampled has lived for less than the run; not all are of use.
        assert (expected.tensors[f"lived_{layer}"][DEAD] < steps - 5).sum() > 2
        assert fields or expected.tensors[f"density_multipliers_{layer}"].max() > 0
        assert expected.steps[-1][2][layer] > 0  # λ
    tolerance, (replicas, shards) = TOLERANCE[dtype], sizes
    places = run_on(replicas * shards, one_place, folder, sizes, steps, dtype, fields)
    largest = max(max(values[2]) for values in expected.steps)
    for place in places:
        for ours, theirs in zip(place.own.steps, expected.steps, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
            assert ours[1] == theirs[1]
            assert ours[2] == pytest.approx(theirs[2], rel=0, abs=tolerance * largest)
            assert ours[3] == pytest.approx(theirs[3], rel=tolerance)
            assert ours[4] == pytest.approx(theirs[4], rel=1e-6)  # a mean of float32
    for name, value in expected.tensors.items():
        # A bias is added to pre-activations, and as exact as these.
        scale = expected.tensors[name.replace("b_enc", "threshold")].abs().max()
        found = places[0].whole[name]
        assert found is not None and found.shape == value.shape
        assert (found - value).abs().max() <= tolerance * scale, name
    for rank, place in enumerate(places):
        for name, value in place.own.tensors.items():
            # The replicas of a shard apply the same gradients, and stay the same to the bit.
            assert torch.equal(value, places[rank % shards].own.tensors[name]), name


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 2), torch.float32),
        ((1, 2), torch.float64),
        ((2, 1), torch.float64),
        pytest.param((2, 1), torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_train_as_one(
    sizes: tuple[int, int], dtype: torch.dtype, tmp_path: Path, one_thread: None
) -> None:
    assert_same_training(sizes, tmp_path, 40, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4), (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"step_kernel": "dense"},
        {"step_kernel": "screened"},
        {"jumprelu_sparsity_loss_mode": "tanh"},
        {"max_latent_density": None, "outlier_norm_ratio": None},
    ],
    ids=str,
)
def test_four_processes_train_as_one(
    sizes: tuple[int, int], fields: dict[str, Any], tmp_path: Path, one_thread: None
) -> None:
    assert_same_training(sizes, tmp_path, 100, torch.float64, **fields)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_memory_and_traffic_of_a_process(
    sizes: tuple[int, int], tmp_path: Path, one_thread: None
) -> None:
    whole = sum(p.nbytes for p in CrossLayerTranscoder(WHERE).parameters())
    replicas, shards = sizes
    tokens, latents = BATCH // replicas, D_SAE // shards
    # docs/guides/many-gpus.md has these sums; of three layers, six decoders.
    in_a_row = 4 * tokens * LAYERS * D_OUT + 4 * (LAYERS + 1)
    parameters = LAYERS * (latents * (D_IN + 2) + D_OUT) + 6 * latents * D_OUT
    in_a_column = 4 * (parameters + LAYERS * (latents + 1 + tokens))
    over_all = 4 * (3 * LAYERS + 1) + 2 * 8 * LAYERS
    predicted = dataclasses.asdict(clt_traffic(WHERE, BATCH, *sizes, limits_outliers=True))
    # Both widths of each layer, a share of the tokens from each process.
    assert predicted.pop("harvest") == 4 * BATCH * LAYERS * (D_IN + D_OUT) / (replicas * shards)
    assert parameters == parameter_count(WHERE, shards)
    for place in run_on(replicas * shards, one_place, tmp_path, sizes, 3, torch.float32, {}):
        assert place.held == 4 * parameters <= 1.05 * whole / shards
        assert place.traffic == Counter({k: n for k, n in predicted.items() if n})
        assert place.traffic == Counter(
            {
                "all": over_all,
                **({"latents": in_a_row} if shards > 1 else {}),
                **({"tokens": in_a_column} if replicas > 1 else {}),
            }
        )
