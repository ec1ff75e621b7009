"""How well the latents of each architecture match known synthetic features.

    python -m benchmarks.synthetic            # prints the table, adds to the records
    python -m benchmarks.synthetic --quick --output quick.jsonl    # a minute, to check that it runs

The data are those of the small SynthSAEBench model (arXiv 2602.14687): 2,048 features in 256
dimensions and 16 hierarchies, from `sae_lens.synthetic`. They are sampled once. All architectures
train on the same samples in the same order, with SAELens' trainer and the same learning rate, and
are saved, loaded and then evaluated on held-out samples. Seeds change initialization and order.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Bool, Float
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
from torch import Tensor

from benchmarks.architectures import ARCHITECTURES, PLUGIN_RECIPE
from benchmarks.quality import RecordFile, as_saved, table, train
from benchmarks.tables import terminal
from jumprelu_plugin.evaluation.metrics import StreamingMetrics
from jumprelu_plugin.records import provenance

RESULTS = Path(__file__).parent / "results" / "synthetic.jsonl"
D_IN = 256
COMPARED = [
    name for name in ARCHITECTURES if name != PLUGIN_RECIPE and not name.startswith("gated")
]
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


class Samples:
    """Training and held-out samples of one generator."""

    def __init__(self, seed: int, train: int, held_out: int = 30_000):
        generator = model(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            chunks = [generator.sample(min(8192, train - i)).half() for i in range(0, train, 8192)]
            latents = generator.activation_generator.sample(held_out)
            self.held_out: Float[Tensor, "held_out d"] = generator.feature_dict(latents)
        self.train: Float[Tensor, "train d"] = torch.cat(chunks)
        self.fires: Bool[Tensor, "held_out features"] = latents > 0
        self.features: Tensor = generator.feature_dict.feature_vectors.detach()

    @torch.no_grad()
    def evaluate(self, sae: Any) -> dict[str, float]:
        """The metrics of the SAE as stock SAELens loads it."""
        loaded = as_saved(sae)
        metrics = StreamingMetrics()
        detection = ClassificationMetricsCalculator(loaded.W_dec, self.features)
        for start in range(0, len(self.held_out), 3000):
            chunk = slice(start, start + 3000)
            acts = loaded.encode(self.held_out[chunk])
            metrics.update(self.held_out[chunk], loaded.decode(acts), acts)
            detection.add_batch(acts, self.fires[chunk].float())
        reconstruction, detected = metrics.compute(), detection.compute()
        return {
            "mcc": mean_correlation_coefficient(loaded.W_dec, self.features),
            "f1": detected.f1_score,
            "precision": detected.precision,
            "recall": detected.recall,
            "explained_variance": 1.0 - reconstruction.fvu,
            "l0": reconstruction.l0,
            "dead_share": reconstruction.dead_share,
            "share_above_10_percent": reconstruction.share_above_10_percent,
        }


def main(
    samples: Annotated[int, typer.Option(help="Training samples, seen once.")] = 1_000_000,
    widths: Annotated[list[int] | None, typer.Option(help="Dictionary widths.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, …")] = 3,
    l0: Annotated[float, typer.Option(help="Target L0.")] = 8.0,
    generator: Annotated[int, typer.Option(help="Seed of the generator.")] = 11,
    only: Annotated[list[str] | None, typer.Option(help="Architectures; all if not given.")] = None,
    output: Annotated[Path, typer.Option(help="Records, one line of JSON for each run.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="Few samples, to check that it runs.")] = False,
) -> None:
    """Train every architecture on the same samples, and print and record its metrics."""
    if quick:
        samples, seeds, widths = 40_000, 1, [512]
    batch, lr = 1024, 3e-3
    console = terminal()
    data = Samples(generator, samples)
    settings = {
        "samples": samples,
        "batch": batch,
        "lr": lr,
        "target_l0": l0,
        "generator": generator,
    }
    file, origin = RecordFile(output), provenance(seed=generator)

    def measure(name: str, d_sae: int, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        sae = ARCHITECTURES[name](D_IN, d_sae, l0)
        seconds = train(sae, data.train, steps=samples // batch, batch=batch, lr=lr, seed=seed)
        return {"seconds": seconds, **data.evaluate(sae)}

    for d_sae in widths or [512, 2048]:
        records = []
        for seed in range(seeds):
            for name in only or COMPARED:
                case = {"architecture": name, "d_sae": d_sae, "seed": seed, **settings}
                records.append(
                    file.record(case, functools.partial(measure, name, d_sae, seed), origin)
                )
        console.print(table(f"{d_sae} latents", records, "architecture", SHOWN))


if __name__ == "__main__":
    typer.run(main)
