"""What the quality benchmarks share: architectures, one way to train them, a table over seeds."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens import JumpReLUTrainingSAE as StockJumpReLU
from sae_lens import JumpReLUTrainingSAEConfig as StockJumpReLUConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

OURS = "ours"
Build = Callable[[int, int, float], Any]


def _common(d_in: int, d_sae: int) -> dict[str, Any]:
    return {"d_in": d_in, "d_sae": d_sae, "normalize_activations": "expected_average_only_in"}


def _ours(d_in: int, d_sae: int, l0: float) -> Any:
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, target_l0=l0))


def _batchtopk(d_in: int, d_sae: int, l0: float) -> Any:
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=l0, **_common(d_in, d_sae)))


def _matryoshka(d_in: int, d_sae: int, l0: float) -> Any:
    widths = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    return MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(k=l0, matryoshka_widths=widths, **_common(d_in, d_sae))
    )


def _topk(d_in: int, d_sae: int, l0: float) -> Any:
    return TopKTrainingSAE(TopKTrainingSAEConfig(k=round(l0), **_common(d_in, d_sae)))


def _gated(d_in: int, d_sae: int, l0: float) -> Any:
    return GatedTrainingSAE(GatedTrainingSAEConfig(**_common(d_in, d_sae)))


def _stock(d_in: int, d_sae: int, l0: float) -> Any:
    # The one mode of stock JumpReLU that takes a target.
    cfg = StockJumpReLUConfig(
        jumprelu_sparsity_loss_mode="quadratic", target_l0=l0, **_common(d_in, d_sae)
    )
    return StockJumpReLU(cfg)


def _pursuit(d_in: int, d_sae: int, l0: float) -> Any:
    cfg = MatchingPursuitTrainingSAEConfig(max_iterations=round(l0), **_common(d_in, d_sae))
    return MatchingPursuitTrainingSAE(cfg)


ARCHITECTURES: dict[str, Build] = {
    OURS: _ours,
    "batchtopk": _batchtopk,
    "matryoshka_batchtopk": _matryoshka,
    "topk": _topk,
    "jumprelu (stock, quadratic)": _stock,
    "matching_pursuit": _pursuit,
    "gated (stock, its own L0)": _gated,
}


def batches(
    rows: Float[Tensor, "rows d"], size: int, seed: int
) -> Iterator[Float[Tensor, "batch d"]]:
    """Batches without end, in an order that the seed decides."""
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=random)
        for start in range(0, len(order) - size + 1, size):
            yield rows[order[start : start + size]].float()


def train(
    sae: Any, rows: Float[Tensor, "rows d"], *, steps: int, batch: int, lr: float, seed: int
) -> float:
    """Train in place with SAELens' trainer; the seconds it took."""
    cfg = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=0.0,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(1, steps // 10),
        n_batches_for_norm_estimate=20,
    )
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=batches(rows, batch, seed))
    started = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - started


def as_saved(sae: Any) -> Any:
    """The SAE as stock SAELens loads it after training."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


def table(title: str, records: list[dict[str, Any]], by: str, metrics: tuple[str, ...]) -> Table:
    """Mean ± standard deviation over the records that share `by`."""
    shown = Table(title=title)
    shown.add_column(by)
    for metric in metrics:
        shown.add_column(metric, justify="right")
    for name in dict.fromkeys(record[by] for record in records):
        cells = []
        for metric in metrics:
            values = [record[metric] for record in records if record[by] == name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        shown.add_row(str(name), *cells)
    return shown
