"""A whole training run ends where SAELens' own run ends, whichever path computes its steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

D_IN, D_SAE, FEATURES, BATCH, STEPS = 29, 127, 83, 257, 100
SEEDS = (3, 5, 7)
FIELDS = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "normalize_activations": "none",
    "jumprelu_init_threshold": 0.21,
    "jumprelu_bandwidth": 0.37,
    "l0_coefficient": 0.03,
    "decoder_init_norm": 0.7,
    "jumprelu_ste_to_input": True,
}


def tokens(seed: int) -> Iterator[Tensor]:
    """Batches of sums of a few known directions out of many, the same directions for every seed."""
    directions = torch.randn(FEATURES, D_IN, generator=torch.Generator().manual_seed(1))
    directions /= directions.norm(dim=1, keepdim=True)
    g = torch.Generator().manual_seed(seed)
    while True:
        active = torch.rand(BATCH, FEATURES, generator=g) < 0.05
        amounts = 1 + torch.rand(BATCH, FEATURES, generator=g)
        yield (active * amounts) @ directions + 0.05 * torch.randn(BATCH, D_IN, generator=g)


@torch.no_grad()
def end_of(sae: Any) -> dict[str, float]:
    """Loss, L0 and FVU on tokens that were not trained on."""
    x = torch.cat([batch for batch, _ in zip(tokens(997), range(8), strict=False)])
    acts = sae.encode(x)
    error = (sae.decode(acts) - x).pow(2).sum()
    l0 = float((acts > 0).sum()) / len(x)
    return {
        "loss": float(error) / len(x) + FIELDS["l0_coefficient"] * l0,  # type: ignore[operator]
        "l0": l0,
        "fvu": float(error / (x - x.mean(0)).pow(2).sum()),
    }


def run(sae: Any, seed: int) -> dict[str, float]:
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=3e-3,
            lr_end=3e-3,
        ),
        sae=sae,
        data_provider=tokens(seed),
    )
    trainer.fit()
    return end_of(sae)


@pytest.fixture(scope="module")
def of_stock() -> list[dict[str, float]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ends = [run(stock(seed), seed) for seed in SEEDS]
    torch.set_num_threads(threads)
    return ends


def stock(seed: int) -> StockSAE:
    torch.manual_seed(seed)
    return StockSAE(sae_lens.JumpReLUTrainingSAEConfig(**FIELDS))  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", ["sparse", "screened", "dense", "auto"])
def test_a_run_ends_where_stock_does(path: str, of_stock: list[dict[str, float]]) -> None:
    of_ours = []
    for seed in SEEDS:
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**FIELDS, step_kernel=path))  # type: ignore[arg-type]
        sae.load_state_dict(stock(seed).state_dict())
        of_ours.append(run(sae, seed))
    start = end_of(stock(SEEDS[0]))
    for name in ("loss", "l0", "fvu"):
        plain = torch.tensor([end[name] for end in of_stock])
        fast = torch.tensor([end[name] for end in of_ours])
        noise = plain.std()
        assert noise > 0
        assert (fast - plain).abs().max() < noise, name  # each seed, against its own twin
        assert (fast - plain).mean().abs() < 0.25 * noise, name
        assert (plain - start[name]).abs().min() > 10 * noise, name  # the runs went somewhere
