"""What trainings on many GPUs would take, by arithmetic: the tables of docs/guides/many-gpus.md.

    python -m benchmarks.many_gpus       # draws the page anew

Nothing is measured. Memory is that of the check before a run (`training.health.memory`), bytes
those that tests count, times those of published rates (`training.distributed.forecast`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import tables
from jumprelu_plugin.training.distributed.division import Division
from jumprelu_plugin.training.distributed.forecast import (
    BFLOAT16,
    StepTimes,
    TrainingSizes,
    step_times,
    traffic,
)
from jumprelu_plugin.training.distributed.hardware import HARDWARE
from jumprelu_plugin.training.health.memory import (
    FLOAT32,
    forward_bytes,
    sae_moments,
    usual_entries,
)
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.forecast import clt_step_times, clt_traffic
from jumprelu_plugin.transcoders.clt.memory import estimate_memory, parameter_count

PAGE = tables.ROOT / "docs" / "guides" / "many-gpus.md"
GPU = HARDWARE["h100"]
GPUS = (1, 8, 64)
GPU_TYPE = "cuda"
WIDTHS = {"16k": 2**14, "131k": 2**17, "1M": 2**20}
BATCH, TARGET_L0, CONTEXT, BUFFERED_SEQUENCES = 4096, 70, 1024, 64
# In a pass of the model, or one for each GPU where there are more.
SEQUENCES = 8
CLT_BATCH, CLT_BUFFERED_SEQUENCES = 2048, 8
# Of a GPU's memory, for what fragments.
USABLE = 0.9


@dataclass(frozen=True)
class LanguageModel:
    """The sizes of a language model in bfloat16, from the Gemma 2 report (arXiv 2408.00118).

    Attributes:
        embedding, blocks: parameters (table 2).
        cfg: under TransformerLens' names (table 1).
        n_layers: of which the hook is in the middle.
    """

    name: str
    embedding: int
    blocks: int
    cfg: Any
    n_layers: int

    def parameters(self) -> Iterator[torch.Tensor]:
        """All of them, in one tensor without storage."""
        yield torch.empty(self.embedding + self.blocks, dtype=torch.bfloat16, device="meta")


MODELS = (
    LanguageModel(
        "Gemma 2 2B",
        590_118_912,
        2_024_517_888,
        SimpleNamespace(d_model=2304, d_mlp=9216, n_heads=8),
        26,
    ),
    LanguageModel(
        "Gemma 2 9B",
        917_962_752,
        8_324_201_984,
        SimpleNamespace(d_model=3584, d_mlp=14336, n_heads=16),
        42,
    ),
)
# Cross-layer transcoders for Gemma 2 2B of these sizes are published for circuit-tracer.
CLT_WIDTHS = {"426k": 16_384, "2.5M": 98_304}


@dataclass(frozen=True)
class Row:
    """One training on a number of GPUs.

    Attributes:
        replicas, shards: the mesh.
        memory: bytes a GPU.
        sent: bytes a GPU hands over in a step.
    """

    replicas: int
    shards: int
    memory: int
    sent: int
    times: StepTimes


def best_mesh(model: LanguageModel, d_sae: int, gpus: int) -> Row | None:
    """The fastest mesh of so many GPUs on which a training fits; None if none does."""
    shards = [2**i for i in range(gpus.bit_length()) if 2**i <= gpus]
    rows = [mesh(model, d_sae, gpus // count, count) for count in shards]
    fitting = [row for row in rows if row.memory <= USABLE * GPU.memory]
    return min(fitting, key=lambda row: (row.times.least, row.times.sum)) if fitting else None


def mesh(model: LanguageModel, d_sae: int, replicas: int, shards: int) -> Row:
    """An SAE in the middle of a model, at the default recipe's sizes."""
    d_in, division = model.cfg.d_model, Division(replicas, shards)
    prompts = max(SEQUENCES, division.processes)
    sizes = TrainingSizes(
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        batch=BATCH,
        entries=3.0 * TARGET_L0,
        model_parameters=model.blocks / 2,
        prompts=prompts,
    )
    weights = FLOAT32 * sizes.parameters(shards)
    buffer = FLOAT32 * BUFFERED_SEQUENCES * CONTEXT * d_in
    moments = sae_moments(
        batch=BATCH,
        replicas=replicas,
        d_in=d_in,
        d_sae=d_sae // shards,
        width=d_in,
        entries=usual_entries(BATCH, d_sae, TARGET_L0) / shards,
        step_kernel="screened",
        device_type=GPU_TYPE,
        weights=weights,
        buffer=buffer,
        drawing=forward_bytes(model, d_in, CONTEXT, division.sequences(prompts, alone=False)),
        one_pass=FLOAT32 * prompts * CONTEXT * d_in,
        calibrates=True,
        saves=True,
    )
    loaded = sum(p.numel() * p.element_size() for p in model.parameters())
    return Row(
        replicas,
        shards,
        loaded + 4 * weights + buffer + max(moments.values()),
        traffic(sizes, replicas, shards).total,
        step_times(sizes, replicas, shards, GPU),
    )


def sae_table() -> str:
    """SAEs: model and latents by number of GPUs."""
    rows = []
    for model in MODELS:
        for name, d_sae in WIDTHS.items():
            for gpus in GPUS:
                rows.append((f"{model.name}, {name}", str(gpus), *_cells(model, d_sae, gpus)))
    header = (
        "model, latents",
        "GPUs",
        "D × M",
        "GB a GPU",
        "MB handed over",
        "compute ms",
        "memory ms",
        "traffic ms",
        "bound by",
        "million tokens/s",
    )
    return tables.table(header, rows)


def _cells(model: LanguageModel, d_sae: int, gpus: int) -> tuple[str, ...]:
    row = best_mesh(model, d_sae, gpus)
    if row is None:
        return ("does not fit", *[""] * 7)
    times = row.times
    milliseconds = (times.compute, times.memory, times.exchange)
    return (
        f"{row.replicas} × {row.shards}",
        f"{row.memory / 1e9:.1f}",
        f"{row.sent / 1e6:.0f}",
        *(f"{1e3 * value:.2f}" for value in milliseconds),
        times.bound,
        f"{BATCH / times.least / 1e6:.2f}",
    )


def clt_table() -> str:
    """Cross-layer transcoders of Gemma 2 2B, their latents divided among the GPUs."""
    rows = []
    model = MODELS[0]
    for name, d_sae in CLT_WIDTHS.items():
        for gpus in GPUS:
            cfg = CLTConfig(2304, 2304, d_sae, tuple(range(model.n_layers)))
            memory = estimate_memory(
                model,
                cfg,
                batch_tokens=CLT_BATCH,
                context_size=CONTEXT,
                sequences_per_pass=SEQUENCES,
                chunk_sequences=CLT_BUFFERED_SEQUENCES,
                target_l0=TARGET_L0,
                step_kernel="sparse",
                device=GPU_TYPE,
                shards=gpus,
            ).total
            sent = clt_traffic(
                cfg, CLT_BATCH, 1, gpus, prompts=SEQUENCES, activation_bytes=BFLOAT16
            )
            times = clt_step_times(
                cfg,
                CLT_BATCH,
                1,
                gpus,
                GPU,
                entries=usual_entries(CLT_BATCH, d_sae, TARGET_L0),
                sent=sent,
                model_parameters=model.blocks,
                prompts=SEQUENCES,
            )
            fits = "yes" if memory <= USABLE * GPU.memory else "no"
            rows.append(
                (
                    f"CLT, {name}",
                    str(gpus),
                    f"{parameter_count(cfg) / 1e9:.1f}",
                    f"{memory / 1e9:.1f}",
                    fits,
                    f"{sent.total / 1e6:.0f}",
                    f"{1e3 * times.compute:.1f}",
                    f"{1e3 * times.memory:.1f}",
                    f"{1e3 * times.exchange:.1f}",
                )
            )
    header = (
        "",
        "GPUs",
        "billion parameters",
        "GB a GPU",
        "fits",
        "MB handed over",
        "compute ms",
        "memory ms",
        "traffic ms",
    )
    return tables.table(header, rows)


BLOCKS = {"saes": sae_table, "clts": clt_table}


def main() -> None:
    """Draw the page's tables anew."""
    PAGE.write_text(tables.fill(PAGE.read_text(), "mesh", BLOCKS))


if __name__ == "__main__":
    main()
