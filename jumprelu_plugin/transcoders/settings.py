"""What two trainings over a model's layers share: a transcoder a layer, and a cross-layer one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jumprelu_plugin.models.text import tokenized_dataset

DEFAULT_TARGET_L0 = 24.0
DEFAULT_EXPANSION = 8


@dataclass(frozen=True)
class LayerRunSettings:
    """What is trained, on which text, and how long.

    Attributes:
        model_name: the embedded model, a model folder, or a hub name.
        dataset_path: a text dataset for SAELens; empty takes the text of the `demo` extra.
        hook_in, hook_out: the pair at each layer; `{layer}` stands for its number.
        layers: which; None takes all.
        d_sae: latents of each layer; None takes 8 · d_in.
        target_l0: active latents a token at each layer; None takes 24.
        l0_coefficient: a fixed penalty, in place of a target.
        outlier_norm_ratio: see `JumpReLUTrainingSAEConfig`; None is no limit.
        lr: learning rate; it decays over the last fifth of the run.
        batch_tokens: tokens in a step.
        chunk_sequences: sequences whose activations are shuffled together.
        norm_batches: batches that the scales are measured on.
        memory_gb: how much the run may take; the chunk is made smaller to keep to it.
        checkpoints: how many are saved along the way; each replaces the one before.
        evaluation_sequences: held-out sequences that it is judged on afterwards; only where the
            text is the `demo` extra's.
    """

    model_name: str = "tiny-gemma-2"
    dataset_path: str = ""
    hook_in: str = "blocks.{layer}.ln2.hook_normalized"
    hook_out: str = "blocks.{layer}.hook_mlp_out"
    layers: tuple[int, ...] | None = None
    d_sae: int | None = None
    target_l0: float | None = None
    l0_coefficient: float | None = None
    outlier_norm_ratio: float | None = None
    training_tokens: int = 1_000_000
    lr: float | None = None
    batch_tokens: int | None = None
    context_size: int = 128
    sequences_per_pass: int = 32
    chunk_sequences: int = 1024
    norm_batches: int = 20
    memory_gb: float | None = None
    checkpoints: int = 10
    evaluation_sequences: int = 128
    seed: int = 0
    device: str = "cpu"

    def held_out(self, model: Any) -> Int[Tensor, "sequences positions"] | None:
        """Tokens of the `demo` extra's test split; None if none are wanted."""
        if self.evaluation_sequences < 1:
            return None
        text = tokenized_dataset(model.tokenizer, self.context_size, "test")
        return torch.tensor(text[: self.evaluation_sequences]["tokens"])
