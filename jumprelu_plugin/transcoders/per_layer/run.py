"""One transcoder a layer, trained in a single pass over the text: `jumprelu train-transcoders`.

The result is a stock SAELens folder for each layer, and a record. An interrupted run leaves a
checkpoint, from which the same call continues. Settings that cannot work are refused before the
training starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sae_lens import SAE, LoggingConfig
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig

from jumprelu_plugin.evaluation.spliced_set import SplicedSet, evaluate_transcoders
from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.hooks import hook_point
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.models.options import keywords_to_record
from jumprelu_plugin.recipes import get_transcoder_recipe
from jumprelu_plugin.records import provenance, whole_files, write_json
from jumprelu_plugin.saes.transcoder_config import JumpReLUTrainingTranscoderConfig
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.activations.pairs import HookPair
from jumprelu_plugin.training.checkpoints import refuse_negative_minutes
from jumprelu_plugin.training.health.findings import log_findings
from jumprelu_plugin.training.health.schedule import (
    density_findings,
    fitting_lr_schedule,
    with_fitting_l0_warm_up,
)
from jumprelu_plugin.training.runner import quiet
from jumprelu_plugin.transcoders.memory import (
    MemoryEstimate,
    estimate_memory,
    fitting_chunk,
    smallest_chunk,
)
from jumprelu_plugin.transcoders.output_folder import (
    CHECKPOINTS,
    METRICS_FILENAME,
    checkpoints_of,
    claim_output_folder,
    finish_output_folder,
    held,
    start_output_folder,
)
from jumprelu_plugin.transcoders.per_layer.runner import LayerwiseRunner
from jumprelu_plugin.transcoders.settings import (
    DEFAULT_EXPANSION,
    DEFAULT_TARGET_L0,
    TranscoderSettings,
    refuse_impossible,
    refuse_target_above,
)
from jumprelu_plugin.transcoders.sources import model_of, texts_of

RECORD_FILENAME = "transcoders.json"


def train_transcoders(
    output: str | Path,
    settings: TranscoderSettings,
    *,
    model: Any = None,
    dataset: Any = None,
    log: Callable[[Any], None] = print,
) -> Path:
    """Train the transcoders, save a stock folder for each layer (`layer_0`, …) and a record.

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
            run that is still going; a layer, hook, recipe or device does not exist; or the run
            needs more than `memory_gb`.
        sae_lens.training._interruption.InterruptedException: Ctrl-C or SIGTERM stopped the run; a
            checkpoint is saved.
    """
    require_device(settings.device)
    refuse_impossible(settings)
    refuse_negative_minutes(settings.checkpoint_every_n_minutes)
    output = Path(output)
    with held(output):
        _train(output, settings, model, dataset, log)
    return output


def _train(
    output: Path,
    settings: TranscoderSettings,
    model: Any,
    dataset: Any,
    log: Callable[[Any], None],
) -> None:
    checkpoint = claim_output_folder(output, settings, RECORD_FILENAME)
    model = model_of(settings, model)
    pairs = pairs_of(model, settings)
    widths = pair_widths(model, pairs.values())
    configs = {name: config_of(pair, widths, settings) for name, pair in pairs.items()}
    settings_now, estimate = within_memory(model, configs, widths, settings)
    log(f"memory: {estimate}, beside Python and PyTorch themselves")
    dataset, held_out = texts_of(model, settings, dataset)
    cfg = runner_config(configs, pairs, settings_now, output, checkpoint)
    with quiet():
        runner = LayerwiseRunner(
            cfg,
            pairs,
            override_dataset=dataset,
            override_model=model,
            metrics_path=output / METRICS_FILENAME,
            checkpoints=checkpoints_of(output, settings),
        )
    start_output_folder(output, settings)
    with whole_files(output) as unfinished:
        runner.cfg.output_path = str(unfinished)
        trained = runner.run()
        (unfinished / RUNNER_CFG_FILENAME).unlink()
    found = evaluated(model, output, pairs, held_out, settings)
    if found is not None:
        log(found.table())
    layers = layers_of(pairs, trained)
    write_record(output, settings, layers, estimate, found, model)
    finish_output_folder(output)


# ---------------------------------------------------------------- before training


def pairs_of(model: Any, settings: TranscoderSettings) -> dict[str, HookPair]:
    """The hooks of each layer's transcoder, by its folder's name.

    Raises:
        ValueError: a layer or a hook does not exist, or all layers would have one hook.
    """
    n_layers = model.cfg.n_layers
    layers = range(n_layers) if settings.layers is None else settings.layers
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(f"there is no layer {layer}: {settings.model_name} has {n_layers}")
    hooks = settings.hook_name, settings.hook_name_out
    if len(layers) > 1 and not all("{layer}" in hook for hook in hooks):
        raise ValueError(
            f"hook_name {hooks[0]!r} and hook_name_out {hooks[1]!r} must both hold {{layer}}, or "
            "all transcoders would have the same hook"
        )
    pairs = {
        f"layer_{layer}": HookPair(
            settings.hook_name.replace("{layer}", str(layer)),
            settings.hook_name_out.replace("{layer}", str(layer)),
        )
        for layer in layers
    }
    if not pairs:
        raise ValueError("layers is empty; leave it out to train all")
    for pair in pairs.values():
        hook_point(model, pair.hook_in)
        hook_point(model, pair.hook_out)
    return pairs


def config_of(
    pair: HookPair, widths: dict[str, int], settings: TranscoderSettings
) -> JumpReLUTrainingTranscoderConfig:
    """The config of one transcoder, from the recipe and the settings.

    Raises:
        ValueError: the target L0 is above the number of latents.
    """
    recipe = get_transcoder_recipe(settings.recipe)
    given: dict[str, Any] = {}
    target = settings.target_l0
    if settings.l0_coefficient is not None:
        given["l0_coefficient"] = settings.l0_coefficient
    elif target is not None or "l0_coefficient" not in recipe.sae:
        # A target is held, also where the recipe would fix the coefficient.
        given["l0_coefficient"] = None
        target = DEFAULT_TARGET_L0 if target is None else target
    d_in = widths[pair.hook_in]
    d_sae = settings.d_sae or DEFAULT_EXPANSION * d_in
    refuse_target_above(d_sae, settings.target_l0)
    return recipe.sae_config(
        d_in,
        d_sae,
        skip=settings.skip,
        d_out=widths[pair.hook_out],
        hook_name_out=pair.hook_out,
        target_l0=target,
        max_latent_density=settings.max_latent_density,
        outlier_norm_ratio=settings.outlier_norm_ratio,
        step_kernel=settings.step_kernel,
        device=settings.device,
        **given,
    )


def within_memory(
    model: Any, configs: dict[str, Any], widths: dict[str, int], settings: TranscoderSettings
) -> tuple[TranscoderSettings, MemoryEstimate]:
    """The settings with a buffer that fits into `memory_gb`, and the memory the run takes."""
    batch = _batch_tokens(settings)
    smallest = smallest_chunk(batch, settings.context_size, settings.store_batch_size_prompts)

    def estimate(chunk_sequences: int) -> MemoryEstimate:
        return estimate_memory(
            model,
            list(configs.values()),
            hook_widths=list(widths.values()),
            batch_tokens=batch,
            context_size=settings.context_size,
            sequences_per_pass=settings.store_batch_size_prompts,
            chunk_sequences=chunk_sequences,
        )

    chunk, found = fitting_chunk(
        estimate, settings.n_batches_in_buffer, smallest, settings.memory_gb
    )
    return replace(settings, n_batches_in_buffer=chunk), found


def _batch_tokens(settings: TranscoderSettings) -> int:
    recipe = get_transcoder_recipe(settings.recipe)
    return settings.train_batch_size_tokens or recipe.runner["train_batch_size_tokens"]


def runner_config(
    configs: dict[str, Any],
    pairs: dict[str, HookPair],
    settings: TranscoderSettings,
    output: Path,
    checkpoint: Path | None,
) -> MultiSAETrainingRunnerConfig:
    """SAELens' config of the run; a schedule that does not fit into it is shortened, and logged.

    Args:
        checkpoint: from which the run goes on.

    Raises:
        ValueError: the run has no step.
    """
    recipe = get_transcoder_recipe(settings.recipe)
    batch = _batch_tokens(settings)
    steps = settings.training_tokens // batch
    if steps < 1:
        raise ValueError(
            f"training_tokens is {settings.training_tokens}, less than a batch of {batch} tokens"
        )
    fields = {
        name: value
        for name, value in recipe.runner.items()
        if name not in ("context_size", "train_batch_size_tokens", "lr", "lr_warm_up_steps")
    }
    warm_up, decay, repairs = fitting_lr_schedule(
        recipe.runner.get("lr_warm_up_steps", 0), steps // 5, steps
    )
    fitting = {name: with_fitting_l0_warm_up(sae, steps) for name, sae in configs.items()}
    # What was changed is the same for all.
    first, its_repairs = next(iter(fitting.values()))
    log_findings([*repairs, *its_repairs, *density_findings(first, first.resolve())])
    cfg = MultiSAETrainingRunnerConfig(
        saes={name: sae for name, (sae, _) in fitting.items()},
        hook_names={name: pair.hook_in for name, pair in pairs.items()},
        model_name=settings.model_name,
        model_class_name=_recorded_class_name(settings),
        # An evaluation loads the model in the same way.
        model_from_pretrained_kwargs=keywords_to_record(settings),
        dataset_path=settings.dataset_path,
        context_size=settings.context_size,
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        n_batches_in_buffer=settings.n_batches_in_buffer,
        store_batch_size_prompts=settings.store_batch_size_prompts,
        n_batches_for_norm_estimate=settings.n_batches_for_norm_estimate,
        lr=recipe.runner["lr"] if settings.lr is None else settings.lr,
        lr_warm_up_steps=warm_up,
        lr_decay_steps=decay,
        dead_feature_window=max(1, min(1000, steps // 5)),
        device=settings.device,
        seed=settings.seed,
        n_checkpoints=settings.n_checkpoints,
        checkpoint_path=None,
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
        output_path=str(output),
        logger=LoggingConfig(log_to_wandb=False),
        **fields,
    )
    # Set afterwards: the constructor appends a random folder's name.
    cfg.checkpoint_path = str(output / CHECKPOINTS)
    return cfg


def _recorded_class_name(settings: TranscoderSettings) -> str:
    """The model's class as SAELens' own loader knows it, for the transcoders' metadata."""
    name = settings.model_class_name
    return "HookedTransformer" if name == "HookedSAETransformer" else name


# ---------------------------------------------------------------- after training


def layers_of(pairs: Mapping[str, HookPair], trained: dict[str, Any]) -> list[dict[str, Any]]:
    """What the record says of each transcoder that was trained."""
    return [
        {
            "folder": name,
            "hook_name": pairs[name].hook_in,
            "hook_name_out": pairs[name].hook_out,
            "architecture": made.cfg.architecture(),
            "d_in": made.cfg.d_in,
            "d_out": made.cfg.width_out,
            "d_sae": made.cfg.d_sae,
            "l0_in_training": made.cfg.metadata.l0,
            "dead_in_training": made.cfg.metadata.num_dead_features,
        }
        for name, made in trained.items()
    ]


def evaluated(
    model: Any, output: Path, names: Iterable[str], held_out: Any, settings: TranscoderSettings
) -> SplicedSet | None:
    """How the saved set does on held-out text; None without any."""
    if held_out is None:
        return None
    # The saved folders are what is evaluated, loaded by stock SAELens as any other tool would.
    saved = [SAE.load_from_disk(output / name, settings.device) for name in names]
    return evaluate_transcoders(model, saved, held_out)


def write_record(
    output: Path,
    settings: TranscoderSettings,
    layers: list[dict[str, Any]],
    estimate: MemoryEstimate,
    found: SplicedSet | None,
    model: Any,
) -> None:
    """Write the record, by which the folder is known as finished."""
    write_json(
        output / RECORD_FILENAME,
        {
            "kind": "transcoders",
            "settings": settings,
            "layers": layers,
            "memory_estimate": {**asdict(estimate), "total": estimate.total},
            "held_out": None if found is None else found.to_dict(),
            "provenance": provenance(seed=settings.seed, model_digest=model_digest(model)),
        },
    )
