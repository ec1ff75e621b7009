"""A whole training run ends where SAELens' own run ends, whichever path computes its steps."""

from __future__ import annotations

from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from sae_lens.training.sae_trainer import SAETrainer

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from tests.training.known_directions import BATCH, D_IN, D_SAE, STEPS, tokens

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
