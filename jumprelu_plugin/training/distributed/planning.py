"""A run on many processes looked at by one, before any of them starts: `jumprelu check`."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig, StockConfig, as_plugin_config
from jumprelu_plugin.training.distributed.division import Division
from jumprelu_plugin.training.distributed.forecast import (
    FLOAT32,
    StepTimes,
    Traffic,
    TrainingSizes,
    step_times,
    traffic,
)
from jumprelu_plugin.training.distributed.hardware import Hardware, hardware
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.distributed.shares import (
    config_of_share,
    pass_findings,
    refuse_pretrained,
    require_divisible,
    require_even_batch,
    require_positive,
)
from jumprelu_plugin.training.health.findings import Finding
from jumprelu_plugin.training.health.memory import size, usual_entries
from jumprelu_plugin.training.health.preflight import Preflight, named_rows
from jumprelu_plugin.training.resuming import resolve_auto
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner, output_hook
from jumprelu_plugin.training.starting_weights import refuse_wrong_checkpoint


@dataclass(frozen=True)
class Plan:
    """What a run on a mesh of processes will take.

    Attributes:
        preflight: of one process, whose share of the latents is looked at as a dictionary.
        replicas, shards: of the mesh.
        sizes: of the run.
        traffic: what each process hands over in a step.
        times: of a step on `gpu`, by arithmetic.
    """

    preflight: Preflight
    replicas: int
    shards: int
    sizes: TrainingSizes
    traffic: Traffic
    times: StepTimes
    gpu: Hardware

    def table(self) -> Table:
        """For the console."""
        return named_rows(f"{self.replicas * self.shards} processes", self._numbers())

    def _numbers(self) -> list[tuple[str, str]]:
        return [
            (
                "a process has",
                f"{self.sizes.d_sae // self.shards:,} of {self.sizes.d_sae:,} latents and "
                f"{self.sizes.batch // self.replicas:,} of {self.sizes.batch:,} tokens",
            ),
            ("it hands over", self.traffic.described()),
            ("bound by", self.times.described(self.gpu)),
        ]


def plan(
    cfg: Any,
    *,
    data_parallel_size: int,
    model_parallel_size: int,
    gpu: str | None = None,
    **options: Any,
) -> Plan:
    """Look at a run on many processes without starting them.

    Args:
        cfg: SAELens' runner config of the run.
        gpu: whose published figures the times follow from (`hardware.HARDWARE`); None: this
            machine's, or an H100's.
        options: of `JumpReLUTrainingRunner`.

    Raises:
        ValueError: as `JumpReLUTrainingRunner` raises it; or the sizes do not divide the latents or
            the batch, or there are no figures of this GPU.
    """
    chosen = hardware(gpu)
    require_positive(data_parallel_size, model_parallel_size)
    require_even_batch(cfg, data_parallel_size)
    if not isinstance(cfg.sae, StockConfig):
        raise ValueError(
            f"architecture {cfg.sae.architecture()!r} is not trained on many processes; JumpReLU is"
        )
    given = as_plugin_config(cfg.sae)
    if data_parallel_size * model_parallel_size > 1:
        refuse_pretrained(cfg)
        require_divisible(given, model_parallel_size)
    layout = LatentLayout(given.d_sae, model_parallel_size, given.resolve().matryoshka_widths)
    cfg = copy.copy(resolve_auto(cfg))
    refuse_wrong_checkpoint(cfg, given)
    # It is of the whole dictionary; what is looked at starts anew.
    cfg.sae, cfg.resume_from_checkpoint = config_of_share(given, layout), None
    runner = JumpReLUTrainingRunner(cfg, **options)
    runner.division = Division(data_parallel_size, model_parallel_size)
    report, processes = runner.preflight(), runner.division.processes
    more = [*pass_findings(cfg, processes), *_too_many(report, processes)]
    report = report.with_findings(more)
    sizes = _sizes(cfg, given, runner, report)
    return Plan(
        report,
        data_parallel_size,
        model_parallel_size,
        sizes,
        traffic(sizes, data_parallel_size, model_parallel_size),
        step_times(sizes, data_parallel_size, model_parallel_size, chosen),
        chosen,
    )


def _too_many(report: Preflight, processes: int) -> list[Finding]:
    """Processes on CPUs share one machine's memory; each on a GPU has its own."""
    memory, saving = report.memory, report.saving
    if memory is None or memory.available is None or torch.device(memory.device).type != "cpu":
        return []
    together, room = processes * memory.peak, memory.available
    if saving is not None:  # the others wait meanwhile
        waiting = saving.peak - saving.working
        together = max(together, processes * waiting + saving.working)
    if together <= room:
        return []
    return [
        Finding(
            "refused",
            "memory",
            f"{processes} processes take {size(together)} together, and this machine has "
            f"{size(room)}",
            "start fewer here, or lower d_sae or n_batches_in_buffer",
        )
    ]


def _sizes(
    cfg: Any, given: JumpReLUTrainingSAEConfig, runner: JumpReLUTrainingRunner, report: Preflight
) -> TrainingSizes:
    resolved, batch = given.resolve(), cfg.train_batch_size_tokens
    entries = usual_entries(batch, given.d_sae, given.target_l0)
    if report.first is not None:  # of one shard
        entries = report.first.entries * given.d_sae / cfg.sae.d_sae
    element_size = next(iter(runner.model.parameters())).element_size()
    transcodes, hooks = "transcoder" in given.architecture(), [cfg.hook_name]
    if transcodes:
        hooks.append(output_hook(given))  # type: ignore[arg-type]
    return TrainingSizes(
        d_in=given.d_in,
        d_out=getattr(given, "width_out", given.d_in),
        d_sae=given.d_sae,
        batch=batch,
        entries=entries,
        prefixes=len(resolved.matryoshka_widths),
        limits_outliers=resolved.outlier_norm_ratio < float("inf"),
        limits_density=resolved.max_latent_density < 1,
        reads_b_dec=given.apply_b_dec_to_input,
        model_parameters=max(parameters_before(runner.model, hook) for hook in hooks),
        model_in_bfloat16=element_size == 2,
        transcodes=transcodes,
        skips="skip" in given.architecture(),
        prompts=cfg.store_batch_size_prompts,
        # SAELens has one hook's in float32, and several hooks' as the model has them.
        activation_bytes=element_size if transcodes else FLOAT32,
        prefetches=bool(cfg.prefetch_llm_batches),
    )


def parameters_before(model: Any, hook: str) -> int:
    """Parameters of the blocks that a token passes up to the hook; embeddings cost no products."""
    stop, total, everything = extract_stop_at_layer_from_tlens_hook_name(hook), 0, 0
    for name, parameter in model.named_parameters():
        block = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
        everything += parameter.numel()
        if block is not None and (stop is None or int(block[1]) < stop):
            total += parameter.numel()
    return total or everything
