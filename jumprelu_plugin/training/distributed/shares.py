"""What one process has of a run: its share of the latents, and of each batch."""

from __future__ import annotations

import dataclasses
from typing import Any

from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.distributed.division import share_of_pass
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.health.findings import Finding


def require_positive(data_parallel_size: int, model_parallel_size: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in (
        ("data_parallel_size", data_parallel_size),
        ("model_parallel_size", model_parallel_size),
    ):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected a whole number, 1 or more")


def require_divisible(cfg: JumpReLUTrainingSAEConfig, shards: int) -> None:
    """Raise ValueError for a config that asks for what many processes do not have."""
    if cfg.aux_loss_coefficient and shards > 1:
        raise ValueError(
            "aux_loss_coefficient needs every dead latent in one process: leave it out "
            "(resample_dead_latents does its work), or give model_parallel_size=1"
        )


def refuse_pretrained(cfg: Any) -> None:
    """Raise ValueError for a run that starts from another's weights."""
    if cfg.from_pretrained_path is not None:
        raise ValueError(
            "from_pretrained_path is not taken on many processes: give resume_from_checkpoint, "
            "or train in one"
        )


def config_of_share(
    given: JumpReLUTrainingSAEConfig, layout: LatentLayout
) -> JumpReLUTrainingSAEConfig:
    """The config of one shard as a dictionary of its own, with its share of the target L0."""
    return dataclasses.replace(
        given,
        d_sae=layout.held,
        target_l0=None if given.target_l0 is None else given.target_l0 / layout.shards,
        matryoshka_widths=list(layout.held_prefixes) if layout.prefixes else None,
        matryoshka_loss_weight=given.matryoshka_loss_weight if layout.prefixes else None,
    )


def require_even_batch(cfg: Any, replicas: int) -> None:
    """Raise ValueError if a batch cannot be dealt to the replicas."""
    batch = cfg.train_batch_size_tokens
    if batch % replicas:
        raise ValueError(
            f"train_batch_size_tokens is {batch:,}, which data_parallel_size={replicas} does not "
            f"divide: give a multiple of {replicas}, such as {-(-batch // replicas) * replicas:,}"
        )


def pass_findings(cfg: Any, processes: int) -> list[Finding]:
    """What the processes run the model on more than once, as one config has it."""
    if processes > 1 and cfg.prefetch_llm_batches:
        return [
            Finding(
                "note",
                "passes",
                f"with prefetch_llm_batches each of {processes} processes runs the model on all of "
                "the text",
                "leave it out, and each runs its share",
            )
        ]
    return shared_pass_findings(cfg.store_batch_size_prompts, processes)


def shared_pass_findings(prompts: int, processes: int) -> list[Finding]:
    """What the processes run the model on more than once where they share each pass.

    Args:
        prompts: sequences of a pass.
    """
    if prompts < processes:
        return [
            Finding(
                "warning",
                "passes",
                f"store_batch_size_prompts is {prompts}, and {processes} processes share each pass "
                f"of the model: {processes - prompts} of them repeat a sequence of another's",
                f"give --store_batch_size_prompts {processes}, or a multiple of it",
            )
        ]
    share = share_of_pass(prompts, processes)
    if share * processes == prompts:
        return []
    return [
        Finding(
            "note",
            "passes",
            f"store_batch_size_prompts is {prompts}, which {processes} processes do not divide: "
            f"each runs {share} sequences of a pass, {share * processes} together",
            f"give --store_batch_size_prompts {share * processes}",
        )
    ]
