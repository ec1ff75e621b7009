"""What a training over a model's layers is told, under SAELens' names.

Three dataclasses of plain values: what both trainings share, and what a transcoder a layer and a
cross-layer transcoder have besides. The command line's options are generated from them: a field is
a flag, and its text under "Attributes" is the flag's help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from jumprelu_plugin.saes.validation import a_density, require_at_least

DEFAULT_TARGET_L0 = 24.0
DEFAULT_EXPANSION = 8


@dataclass(frozen=True)
class LayerRunSettings:
    """What is trained, on which text, and how long.

    `n_batches_in_buffer` counts sequences, as in SAELens, whose mixing buffer holds
    n_batches_in_buffer · context_size tokens: a batch there is one sequence.

    Attributes:
        model_name: tiny-gemma-2, a model folder, or a hub name.
        model_class_name: HookedTransformer, HookedSAETransformer, TransformerBridge or
            SAETransformerBridge.
        model_from_pretrained_kwargs: keyword arguments of the model's loader, as JSON, such as
            {"use_hook_mlp_in": true}.
        dataset_path: a text or pretokenized dataset, on the hub or in a folder. Default: the text
            of the `demo` extra.
        hook_name: the hook that is read; {layer} stands for the layer's number.
        hook_name_out: the hook that is reconstructed; {layer} stands for the layer's number.
        layers: the layers' numbers. Default: all.
        d_sae: latents of each layer. Default: 8 d_in.
        target_l0: active latents a token at each layer. Default: 24.
        l0_coefficient: a fixed sparsity penalty, in place of a target L0.
        max_latent_density: the largest share of tokens on which a latent is to fire. Default: no
            limit.
        outlier_norm_ratio: the squared error of a token longer than this many times the batch's
            median norm counts as if it were that long. Default: no limit.
        training_tokens: tokens to train on.
        lr: learning rate.
        train_batch_size_tokens: tokens in a training step.
        context_size: tokens in a sequence.
        store_batch_size_prompts: sequences in a forward pass of the model.
        n_batches_in_buffer: sequences whose activations are shuffled together.
        n_batches_for_norm_estimate: batches that the scales of the activations are measured on.
        memory_gb: the most memory that the run may take; the buffer shrinks to keep to it.
        n_checkpoints: checkpoints along the way; the last two are kept until the run is finished.
        checkpoint_every_n_minutes: minutes between two checkpoints beside these; 0: none.
        evaluation_sequences: held-out sequences to evaluate the result on; only where the text is
            the `demo` extra's.
        step_kernel: how a step is computed; `auto` times the ways and takes the fastest, and all
            give the same gradients. They differ in rounding: fix one to repeat a run bit for bit.
        seed: of initialization and data order.
        device: cpu, cuda, cuda:1, mps.
        dtype: of the language model's weights; what is trained is float32.
    """

    model_name: str = "tiny-gemma-2"
    model_class_name: str = "HookedSAETransformer"
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    dataset_path: str = ""
    hook_name: str = "blocks.{layer}.ln2.hook_normalized"
    hook_name_out: str = "blocks.{layer}.hook_mlp_out"
    layers: tuple[int, ...] | None = None
    d_sae: int | None = None
    target_l0: float | None = None
    l0_coefficient: float | None = None
    max_latent_density: float | None = None
    outlier_norm_ratio: float | None = None
    training_tokens: int = 1_000_000
    lr: float | None = None
    train_batch_size_tokens: int | None = None
    context_size: int = 128
    store_batch_size_prompts: int = 32
    n_batches_in_buffer: int = 1024
    n_batches_for_norm_estimate: int = 20
    memory_gb: float | None = None
    n_checkpoints: int = 10
    checkpoint_every_n_minutes: float = 10.0
    evaluation_sequences: int = 128
    step_kernel: Literal["auto", "sparse", "screened", "dense"] = "auto"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class TranscoderSettings(LayerRunSettings):
    """What `train_transcoders` trains; the other settings are `LayerRunSettings`'.

    Attributes:
        target_l0: active latents a token of each transcoder. Default: 24, or the recipe's fixed
            coefficient where it has one.
        lr: learning rate; it falls to 0 over the last fifth of the run. Default: the
            recipe's.
        train_batch_size_tokens: tokens in a training step. Default: the recipe's.
        skip: with a linear map from input to output.
        recipe: a recipe for transcoders; `jumprelu recipes` lists them.
    """

    skip: bool = False
    recipe: str = "transcoder"


@dataclass(frozen=True)
class CLTSettings(LayerRunSettings):
    """What `train_clt` trains; the other settings are `LayerRunSettings`'.

    Attributes:
        layers: consecutive layers' numbers. Default: all.
        lr: learning rate; it falls to 0 over the last fifth of the run.
        l0_warm_up_steps: steps over which a fixed penalty rises from 0.
        jumprelu_sparsity_loss_mode: `step`, or `tanh` with decoder norms in the penalty.
        jumprelu_tanh_scale: c in the tanh penalty, tanh(c f ‖d‖).
    """

    lr: float = 4e-3
    train_batch_size_tokens: int = 2048
    l0_warm_up_steps: int = 0
    jumprelu_sparsity_loss_mode: Literal["step", "tanh"] = "step"
    jumprelu_tanh_scale: float = 4.0


# The least of each number.
_LEAST = {
    "d_sae": 1,
    "training_tokens": 1,
    "train_batch_size_tokens": 1,
    "context_size": 2,
    "store_batch_size_prompts": 1,
    "n_batches_in_buffer": 1,
    "n_batches_for_norm_estimate": 1,
    "n_checkpoints": 0,
    "evaluation_sequences": 0,
    "outlier_norm_ratio": 0,
    "seed": 0,
}

_DENSITY = a_density("max_latent_density")


def refuse_impossible(settings: LayerRunSettings) -> None:
    """Raise ValueError for a number that no run can work with, or for both a target L0 and a fixed
    coefficient."""
    require_at_least(settings, _LEAST)
    for name in ("lr", "memory_gb", "target_l0"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; give a number above 0")
    if not _DENSITY.holds(settings):
        raise ValueError(_DENSITY.text(settings))
    target, coefficient = settings.target_l0, settings.l0_coefficient
    if target is not None and coefficient is not None:
        raise ValueError(
            f"both target_l0={target:g} and l0_coefficient={coefficient:g} are set: a target has "
            "its coefficient measured, so give one of them"
        )


def refuse_target_above(d_sae: int, target_l0: float | None) -> None:
    """Raise ValueError for a target L0 that so many latents cannot have."""
    if target_l0 is not None and target_l0 > d_sae:
        raise ValueError(f"target_l0 is {target_l0}; it must be at most d_sae, which is {d_sae}")


def refuse_memory_limit(settings: LayerRunSettings) -> None:
    """Raise ValueError for a `memory_gb` where many processes train."""
    if settings.memory_gb is not None:
        raise ValueError(
            f"memory_gb is {settings.memory_gb:g}, which is not taken on many processes, whose "
            "data would come in another order than on one: set n_batches_in_buffer in its place"
        )
