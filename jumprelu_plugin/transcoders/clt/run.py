"""A cross-layer transcoder, trained and saved with a record: `jumprelu train-clt`.

An interrupted run leaves a checkpoint, from which the same call continues. Settings that cannot
work are refused before the training starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids

from jumprelu_plugin.evaluation.spliced_set import SplicedSet
from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.hooks import hook_point
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.models.options import keywords_to_record
from jumprelu_plugin.records import provenance, write_json
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.activations.pairs import PairStore
from jumprelu_plugin.training.checkpoints import explained_at_the_end, refuse_negative_minutes
from jumprelu_plugin.training.health.findings import log_findings
from jumprelu_plugin.training.health.schedule import (
    density_findings,
    fitting_l0_warm_up,
    total_steps,
)
from jumprelu_plugin.training.text_source import without_false_alarms
from jumprelu_plugin.transcoders.clt import folder as folders
from jumprelu_plugin.transcoders.clt.config import CLTConfig, CLTTrainingConfig
from jumprelu_plugin.transcoders.clt.evaluation import evaluate_clt
from jumprelu_plugin.transcoders.clt.memory import estimate_memory
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.trainer import Schedule, Trainer, pair_name
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep
from jumprelu_plugin.transcoders.memory import MemoryEstimate, fitting_chunk, smallest_chunk
from jumprelu_plugin.transcoders.output_folder import (
    METRICS_FILENAME,
    checkpoints_of,
    claim_output_folder,
    finish_output_folder,
    held,
    start_output_folder,
)
from jumprelu_plugin.transcoders.settings import (
    DEFAULT_EXPANSION,
    DEFAULT_TARGET_L0,
    CLTSettings,
    refuse_impossible,
    refuse_target_above,
)
from jumprelu_plugin.transcoders.sources import model_of, texts_of

RECORD_FILENAME = "cross_layer_record.json"

# Share of the steps over which the learning rate falls to 0, at their end; as for transcoders.
_DECAY_SHARE = 0.2


def train_clt(
    output: str | Path,
    settings: CLTSettings,
    *,
    model: Any = None,
    dataset: Any = None,
    log: Callable[[Any], None] = print,
) -> Path:
    """Train the transcoder, save it (`transcoders.clt.folder`) and a record.

    An unfinished run in `output` with the same settings continues from its last checkpoint.

    Args:
        output: a new or empty folder, or one with an unfinished run.
        settings: what to train, on which text, and how long.
        model: a hooked model, in place of loading `settings.model_name`.
        dataset: tokenized text, in place of `settings.dataset_path`.
        log: called with the memory estimate before the training and with the evaluation's table
            after it.

    Returns:
        `output`.

    Raises:
        ValueError: `output` holds a finished run, a run with other settings, other files, or a
            run that is still going; layers, hooks or the device do not exist or do not fit; or the
            run needs more than `memory_gb`.
        sae_lens.training._interruption.InterruptedException: Ctrl-C or SIGTERM stopped the run; a
            checkpoint is saved.
    """
    require_device(settings.device)
    training = fitting_config(training_config(settings), settings)
    refuse_negative_minutes(settings.checkpoint_every_n_minutes)
    output = Path(output)
    with held(output):
        _train(output, settings, training, model, dataset, log)
    return output


def _train(
    output: Path,
    settings: CLTSettings,
    training: CLTTrainingConfig,
    model: Any,
    dataset: Any,
    log: Callable[[Any], None],
) -> None:
    checkpoint = claim_output_folder(output, settings, RECORD_FILENAME)
    model = model_of(settings, model)
    cfg = config_of(model, settings)
    log_findings(density_findings(training, training.resolve(cfg.d_sae)))
    chunk, estimate = within_memory(model, cfg, settings)
    schedule = schedule_of(settings)
    dataset, held_out = texts_of(model, settings, dataset)
    log(f"memory: {estimate}, beside Python and PyTorch themselves")
    torch.manual_seed(settings.seed)
    trainer = Trainer(
        CLTTrainingStep(CrossLayerTranscoder(cfg).to(settings.device), training),
        schedule,
        store_of(model, cfg, settings, chunk, dataset),
        checkpoints=checkpoints_of(output, settings),
        metrics_path=output / METRICS_FILENAME,
    )
    start_output_folder(output, settings)
    if checkpoint is not None:
        trainer.load(checkpoint)
    trainer.fit()
    trainer.fold_scales()
    with explained_at_the_end(output, trainer.checkpoints.last, "the same command"):
        folders.save_clt(trainer.model, output)
    found = evaluated(model, output, held_out, settings.device)
    if found is not None:
        log(found.table())
    dead = trainer.training_step.dead_share()
    write_record(output, settings, trainer, dead, estimate, found, model)
    finish_output_folder(output)


# ---------------------------------------------------------------- before training


def training_config(settings: CLTSettings) -> CLTTrainingConfig:
    """How the transcoder is trained.

    Raises:
        ValueError: a setting that cannot be, or two that cannot be together.
    """
    refuse_impossible(settings)
    target = settings.target_l0
    if target is None and settings.l0_coefficient is None:
        target = DEFAULT_TARGET_L0
    return CLTTrainingConfig(
        target_l0=target,
        l0_coefficient=settings.l0_coefficient,
        l0_warm_up_steps=settings.l0_warm_up_steps,
        jumprelu_sparsity_loss_mode=settings.jumprelu_sparsity_loss_mode,
        jumprelu_tanh_scale=settings.jumprelu_tanh_scale,
        step_kernel=settings.step_kernel,
        max_latent_density=settings.max_latent_density,
        outlier_norm_ratio=settings.outlier_norm_ratio,
    )


def fitting_config(training: CLTTrainingConfig, settings: CLTSettings) -> CLTTrainingConfig:
    """With a warm-up of a fixed penalty that fits into the run; what is shortened is logged."""
    warm_up, repairs = fitting_l0_warm_up(training.l0_warm_up_steps, total_steps(settings))
    log_findings(repairs)
    return replace(training, l0_warm_up_steps=warm_up)


def config_of(model: Any, settings: CLTSettings) -> CLTConfig:
    """What is trained: its sizes, read at the model's hooks.

    Raises:
        ValueError: layers or hooks that the model does not have, or that have unequal widths; or a
            target L0 above the number of latents.
    """
    n_layers = model.cfg.n_layers
    layers = tuple(range(n_layers)) if settings.layers is None else settings.layers
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(f"there is no layer {layer}: {settings.model_name} has {n_layers}")
    # The widths are read at the hooks, which the config names; so a first one without them.
    named = CLTConfig(
        1, 1, 1, layers, settings.hook_name, settings.hook_name_out, settings.model_name
    )
    for pair in named.pairs:
        hook_point(model, pair.hook_in)
        hook_point(model, pair.hook_out)
    widths = pair_widths(model, named.pairs)
    d_in = _one_width({pair.hook_in: widths[pair.hook_in] for pair in named.pairs}, "input")
    d_out = _one_width({pair.hook_out: widths[pair.hook_out] for pair in named.pairs}, "output")
    keywords = keywords_to_record(settings)
    dtype = keywords.pop("dtype", "float32")
    d_sae = DEFAULT_EXPANSION * d_in if settings.d_sae is None else settings.d_sae
    refuse_target_above(d_sae, settings.target_l0)
    return replace(
        named,
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        model_class_name=settings.model_class_name,
        model_from_pretrained_kwargs=keywords,
        dtype=dtype,
        dataset_path=settings.dataset_path,
        context_size=settings.context_size,
    )


def _one_width(widths: dict[str, int], what: str) -> int:
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{hook}: {width}" for hook, width in widths.items())
        raise ValueError(
            f"the {what} hooks have unequal widths ({listed}); a cross-layer transcoder takes one "
            "for all: choose other hooks, or layers of one width"
        )
    return next(iter(widths.values()))


def within_memory(
    model: Any, cfg: CLTConfig, settings: CLTSettings, replicas: int = 1, shards: int = 1
) -> tuple[int, MemoryEstimate]:
    """Sequences in a chunk, and what each process of the run takes.

    Raises:
        ValueError: it takes more than `settings.memory_gb`, however small the chunk.
    """

    def estimate(chunk_sequences: int) -> MemoryEstimate:
        return estimate_memory(
            model,
            cfg,
            batch_tokens=settings.train_batch_size_tokens,
            context_size=settings.context_size,
            sequences_per_pass=settings.store_batch_size_prompts,
            chunk_sequences=chunk_sequences,
            target_l0=training_config(settings).target_l0,
            step_kernel=settings.step_kernel,
            device=settings.device,
            replicas=replicas,
            shards=shards,
        )

    smallest = smallest_chunk(
        settings.train_batch_size_tokens, settings.context_size, settings.store_batch_size_prompts
    )
    return fitting_chunk(estimate, settings.n_batches_in_buffer, smallest, settings.memory_gb)


def schedule_of(settings: CLTSettings) -> Schedule:
    """How long it is trained, and how fast.

    Raises:
        ValueError: there are fewer tokens than in a batch.
    """
    steps = settings.training_tokens // settings.train_batch_size_tokens
    if steps < 1:
        raise ValueError(
            f"training_tokens is {settings.training_tokens}, less than a batch of "
            f"{settings.train_batch_size_tokens} tokens"
        )
    return Schedule(
        steps=steps,
        lr=settings.lr,
        decay_steps=round(_DECAY_SHARE * steps),
        norm_batches=settings.n_batches_for_norm_estimate,
        checkpoints=settings.n_checkpoints,
    )


def store_of(
    model: Any, cfg: CLTConfig, settings: CLTSettings, chunk: int, dataset: Any
) -> PairStore:
    """The text's activations at the hooks of all layers, in chunks of so many sequences."""
    special = torch.tensor(get_special_token_ids(model.tokenizer), dtype=torch.long)
    pairs = {pair_name(index): pair for index, pair in enumerate(cfg.pairs)}
    with without_false_alarms():
        text = ActivationsStore(
            model=model,
            dataset=settings.dataset_path if dataset is None else dataset,
            streaming=True,
            hook_name=cfg.pairs[0].hook_in,
            hook_head_index=None,
            context_size=settings.context_size,
            d_in=cfg.d_in,
            n_batches_in_buffer=chunk,
            total_training_tokens=settings.training_tokens,
            store_batch_size_prompts=settings.store_batch_size_prompts,
            train_batch_size_tokens=settings.train_batch_size_tokens,
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device(settings.device),
            dtype="float32",
            exclude_special_tokens=special.to(settings.device),
        )
        return PairStore.like(text, pairs, pair_widths(model, pairs.values()), settings.seed)


# ---------------------------------------------------------------- after training


def evaluated(model: Any, output: Path, held_out: Any, device: str) -> SplicedSet | None:
    """How the saved transcoder does on the held-out text; None where there is none."""
    if held_out is None:
        return None
    return evaluate_clt(model, folders.load_clt(output, device), held_out)


def write_record(
    output: Path,
    settings: CLTSettings,
    trainer: Trainer,
    dead: float,
    estimate: MemoryEstimate,
    found: SplicedSet | None,
    model: Any,
) -> None:
    """Write what was trained, how it went and where it came from.

    Args:
        dead: the share of all latents that count as dead.
        estimate: of each process.
    """
    last = trainer.last
    write_json(
        output / RECORD_FILENAME,
        {
            "kind": "cross_layer_transcoder",
            "settings": settings,
            "config": trainer.model.cfg,
            "l0_in_training": None if last is None else last.l0,
            "coefficients": None if last is None else [float(c) for c in last.coefficients],
            "dead_in_training": dead,
            "memory_estimate": {**asdict(estimate), "total": estimate.total},
            "held_out": None if found is None else found.to_dict(),
            "provenance": provenance(seed=settings.seed, model_digest=model_digest(model)),
        },
    )
