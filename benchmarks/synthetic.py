"""Do the latents find the features? Architectures side by side where the true features are known.

    python -m benchmarks.synthetic            # prints the table, writes the records
    python -m benchmarks.synthetic --quick    # a minute: to see that it runs

The data is the small SynthSAEBench model (arXiv 2602.14687): 2,048 features in 256 dimensions under
16 hierarchies, made by `sae_lens.synthetic`. It is sampled once; every architecture sees the same
samples in the same order, through SAELens' own trainer, at the same learning rate, and is judged
after saving and loading, on held-out samples. Seeds change initialisation and order.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
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
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.synthetic.evals import (
    ClassificationMetricsCalculator,
    mean_correlation_coefficient,
)
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.evaluation.metrics import StreamingMetrics
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.records import append_jsonl, provenance

RESULTS = Path(__file__).parent / "results" / "synthetic.jsonl"
OURS = "ours"
D_IN = 256
SHOWN = ("mcc", "f1", "explained_variance", "l0", "dead_share")


def model(seed: int) -> SyntheticModel:
    """The 2,048-feature version of the benchmark's generator."""
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=2048,
            hidden_dim=D_IN,
            firing_probability=ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=0.4, min_prob=5e-4
            ),
            hierarchy=HierarchyConfig(
                total_root_nodes=16,
                branching_factor=4,
                max_depth=3,
                mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
                scale_children_by_parent=False,
            ),
            orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
            correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
            bias=0.5,
            seed=seed,
        )
    )


def _matryoshka(d_sae: int, l0: float, common: dict[str, Any]) -> Any:
    widths = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(k=l0, matryoshka_widths=widths, **common)
    return MatryoshkaBatchTopKTrainingSAE(cfg)


def _stock(d_sae: int, l0: float, common: dict[str, Any]) -> Any:
    # The one mode of stock JumpReLU that takes a target.
    cfg = StockJumpReLUConfig(jumprelu_sparsity_loss_mode="quadratic", target_l0=l0, **common)
    return StockJumpReLU(cfg)


def _pursuit(d_sae: int, l0: float, common: dict[str, Any]) -> Any:
    return MatchingPursuitTrainingSAE(
        MatchingPursuitTrainingSAEConfig(max_iterations=round(l0), **common)
    )


ARCHITECTURES: dict[str, Callable[[int, float, dict[str, Any]], Any]] = {
    OURS: lambda d_sae, l0, common: JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, target_l0=l0)
    ),
    "batchtopk": lambda d_sae, l0, common: BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(k=l0, **common)
    ),
    "matryoshka_batchtopk": _matryoshka,
    "topk": lambda d_sae, l0, common: TopKTrainingSAE(TopKTrainingSAEConfig(k=round(l0), **common)),
    "jumprelu (stock, quadratic)": _stock,
    "matching_pursuit": _pursuit,
}


class Samples:
    """Training and held-out data of one generator, sampled once."""

    def __init__(self, seed: int, train: int, held_out: int = 30_000):
        generator = model(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            pieces = [generator.sample(min(8192, train - i)).half() for i in range(0, train, 8192)]
            latents = generator.activation_generator.sample(held_out)
            self.held_out: Float[Tensor, "held_out d"] = generator.feature_dict(latents)
        self.train: Float[Tensor, "train d"] = torch.cat(pieces)
        self.fires: Bool[Tensor, "held_out features"] = latents > 0
        self.features: Tensor = generator.feature_dict.feature_vectors.detach()

    def batches(self, size: int, seed: int) -> Iterator[Float[Tensor, "batch d"]]:
        random = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=random)
            for start in range(0, len(order) - size + 1, size):
                yield self.train[order[start : start + size]].float()

    @torch.no_grad()
    def judge(self, sae: Any) -> dict[str, float]:
        """Of the SAE as stock SAELens loads it after training."""
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            loaded = SAE.load_from_disk(folder)
        metrics = StreamingMetrics()
        detection = ClassificationMetricsCalculator(loaded.W_dec, self.features)
        for start in range(0, len(self.held_out), 3000):
            piece = slice(start, start + 3000)
            acts = loaded.encode(self.held_out[piece])
            metrics.update(self.held_out[piece], loaded.decode(acts), acts)
            detection.add_batch(acts, self.fires[piece].float())
        found, detected = metrics.compute(), detection.compute()
        return {
            "mcc": mean_correlation_coefficient(loaded.W_dec, self.features),
            "f1": detected.f1_score,
            "precision": detected.precision,
            "recall": detected.recall,
            "explained_variance": 1.0 - found.fvu,
            "l0": found.l0,
            "dead_share": found.dead_share,
            "share_above_10_percent": found.share_above_10_percent,
        }


def train(sae: Any, samples: Samples, seed: int, batch: int, lr: float) -> float:
    """Train in place with SAELens' trainer, one pass over the samples; the seconds it took."""
    steps = len(samples.train) // batch
    cfg = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=0.0,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(1, steps // 10),
        n_batches_for_norm_estimate=20,
    )
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=samples.batches(batch, seed))
    started = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - started


def table(records: list[dict[str, Any]], d_sae: int) -> Table:
    shown = Table(title=f"{d_sae} latents: mean ± spread over seeds")
    shown.add_column("")
    for name in SHOWN:
        shown.add_column(name, justify="right")
    for name in dict.fromkeys(r["architecture"] for r in records):
        rows = [r for r in records if r["architecture"] == name and r["d_sae"] == d_sae]
        if not rows:
            continue
        cells = []
        for metric in SHOWN:
            values = [r[metric] for r in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        shown.add_row(name, *cells)
    return shown


def main(
    samples: Annotated[int, typer.Option(help="Training samples, seen once.")] = 1_000_000,
    widths: Annotated[list[int] | None, typer.Option(help="Dictionary widths.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, …")] = 3,
    l0: Annotated[float, typer.Option(help="L0 that is asked for.")] = 8.0,
    generator: Annotated[int, typer.Option(help="Seed of the generator.")] = 42,
    only: Annotated[list[str] | None, typer.Option(help="Architectures; all if not given.")] = None,
    output: Annotated[Path, typer.Option(help="Records, one JSON line a run.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="Few samples: to see that it runs.")] = False,
) -> None:
    """Train every architecture on the same samples, and print and record what it found."""
    if quick:
        samples, seeds, widths = 40_000, 1, [512]
    batch, lr = 1024, DEFAULT.runner["lr"]
    console = Console()
    data = Samples(generator, samples)
    settings = {
        "samples": samples,
        "batch": batch,
        "lr": lr,
        "l0_asked": l0,
        "generator": generator,
    }
    records: list[dict[str, Any]] = []
    origin = provenance(seed=generator)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    for d_sae in widths or [512, 2048]:
        common = {
            "d_in": D_IN,
            "d_sae": d_sae,
            "normalize_activations": "expected_average_only_in",
        }
        for seed in range(seeds):
            for name in only or ARCHITECTURES:
                torch.manual_seed(seed)
                sae = ARCHITECTURES[name](d_sae, l0, dict(common))
                seconds = train(sae, data, seed, batch, lr)
                record = {"architecture": name, "d_sae": d_sae, "seed": seed, "seconds": seconds}
                records.append({**record, **data.judge(sae), **settings})
                append_jsonl(partial, {**records[-1], "provenance": origin})
        console.print(table(records, d_sae))
    partial.replace(output)


if __name__ == "__main__":
    typer.run(main)
