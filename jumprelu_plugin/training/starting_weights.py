"""The weights that a run starts from: a checkpoint that it resumes, or another run's.

A finished run's weights are folded: they take raw activations, and the scale that training put on
them is gone. A run that scales its activations cannot start from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import logger
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.saes.sae import TrainingSAE

from jumprelu_plugin.records import read_json
from jumprelu_plugin.saes.tensor_files import explained
from jumprelu_plugin.saes.validation import require_types
from jumprelu_plugin.training.lr_schedule import SCHEDULE_FIELDS
from jumprelu_plugin.training.resuming import changed_settings, plain, refuse_damaged

_WHAT = ("architecture", "d_in", "d_sae")
# What a weight means depends on these.
_MEANING = ("d_out", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
# What the activations are that a run is resumed on.
_READ = (
    "hook_name",
    "hook_head_index",
    "hook_names",
    "hook_head_indices",
    "context_size",
    "seqpos_slice",
    "prepend_bos",
    "exclude_special_tokens",
    "model_from_pretrained_kwargs",
)
# They may be called otherwise after a move, so another name is said and not refused.
_NAMED = ("model_name", "dataset_path")
# Said elsewhere (`lr_schedule`), or nothing of the training.
_SAID_OR_FREE = (*_NAMED, *SCHEDULE_FIELDS, "training_tokens", "output_path", "saes")
# Our checkpoints hold parameters as the optimizer sees them, and the bandwidth in use.
_STORED = ("log_threshold", "hyperparameter_units", "jumprelu_bandwidth", "jumprelu_bandwidth_std")


def refuse_wrong_checkpoint(cfg: Any, sae_cfg: Any = None) -> None:
    """Raise if there is no such checkpoint (FileNotFoundError), or if this run cannot resume it: it
    is damaged, of another SAE or of other activations, or the end of a run (ValueError).

    Args:
        cfg: SAELens' runner config.
        sae_cfg: of the SAE that is trained, if it is not `cfg.sae`.
    """
    folder = cfg.resume_from_checkpoint
    if folder is None:
        return
    _require_checkpoint(folder, folder)
    refuse_damaged(folder)
    remedy = "resume with the config the run started with"
    _refuse_other_sae(folder, sae_cfg or cfg.sae, remedy)
    _refuse_other_activations(folder, cfg, remedy)


def refuse_wrong_checkpoint_of_all(cfg: Any) -> None:
    """As `refuse_wrong_checkpoint`, of a run over several dictionaries.

    A checkpoint may hold others too, at the same hooks: a run goes on without one that diverged.
    """
    folder = cfg.resume_from_checkpoint
    if folder is None:
        return
    for name in cfg.saes:
        _require_checkpoint(folder, str(Path(folder, name)))
    refuse_damaged(folder)
    remedy = "resume with the dictionaries the run started with"
    for name, each in cfg.saes.items():
        _refuse_other_sae(str(Path(folder, name)), each, remedy)
    _refuse_other_activations(folder, cfg, remedy)


def refuse_past_the_end(trainer: Any, checkpoint: str | Path) -> None:
    """Raise ValueError if a trainer took from a checkpoint more samples than it is to train on."""
    done, wanted = trainer.n_training_samples, trainer.cfg.total_training_samples
    if done > wanted:
        raise ValueError(
            f"the checkpoint {checkpoint} has trained on {done:,} tokens and training_tokens is "
            f"{wanted:,}: give more than the checkpoint has, or an earlier checkpoint"
        )


def _require_checkpoint(given: str, folder: str) -> None:
    for name in (SAE_CFG_FILENAME, TRAINER_STATE_FILENAME):
        if not Path(folder, name).is_file():
            raise FileNotFoundError(
                f"{given} is not a checkpoint of this run (no {Path(folder, name)}); give "
                "resume_from_checkpoint a folder that an interrupted run or n_checkpoints wrote"
            )


def pretrained_sae(folder: str, sae_cfg: Any) -> TrainingSAE[Any]:
    """The SAE that a run with `from_pretrained_path` trains: this run's config, those weights.

    SAELens takes the folder's config with its weights, so that a target L0 given for the run would
    not be the one it trains for.

    Raises:
        FileNotFoundError: there is no SAE in the folder.
        ValueError: the weights do not fit this run.
    """
    if not Path(folder, SAE_CFG_FILENAME).is_file():
        raise FileNotFoundError(
            f"from_pretrained_path is {folder}, and there is no {SAE_CFG_FILENAME} in it; give the "
            "folder of a checkpoint"
        )
    _refuse_other_sae(folder, sae_cfg, "give this run the same")
    sae = TrainingSAE.from_dict(sae_cfg.to_dict())
    sae.load_weights_from_checkpoint(folder)
    return sae


def _refuse_other_sae(folder: str, sae_cfg: Any, remedy: str) -> None:
    saved = read_json(Path(folder, SAE_CFG_FILENAME))
    here = {**sae_cfg.to_dict(), "architecture": sae_cfg.architecture()}
    for field in (*_WHAT, *_MEANING):
        if field in _WHAT or (field in saved and field in here):
            _require_same(folder, field, saved.get(field), here.get(field), remedy)
    found, wanted = saved.get("normalize_activations", "none"), sae_cfg.normalize_activations
    if found != wanted:
        raise ValueError(
            f"the weights in {folder} take activations normalized as {found!r}, and this run "
            f"normalizes them as {wanted!r}{_about_normalization(folder, found)}"
        )
    if "standardize_activations" in saved:
        with explained(Path(folder, SAE_CFG_FILENAME)):
            saved_cfg = type(sae_cfg).from_dict(saved)
            require_types(saved_cfg)
        _refuse_other_training(folder, saved_cfg, sae_cfg, remedy)


def _refuse_other_training(folder: str, saved: Any, sae_cfg: Any, remedy: str) -> None:
    for field in _STORED:
        _require_same(folder, field, getattr(saved, field), getattr(sae_cfg, field), remedy)
    there, here = saved.resolve(), sae_cfg.resolve()
    _require_same(
        folder,
        "standardize_activations (by default on where target_l0 is given)",
        there.standardize_activations,
        here.standardize_activations,
        remedy,
    )
    if there.max_latent_density == 1.0:  # the checkpoint has no multipliers
        field, wanted = "max_latent_density (1: no limit)", here.max_latent_density
        _require_same(folder, field, 1.0, wanted, remedy)


def _refuse_other_activations(folder: str, cfg: Any, remedy: str) -> None:
    """Another hook of the same width would train on without a word, and so would other tokens."""
    if not Path(folder, RUNNER_CFG_FILENAME).is_file():
        return  # a checkpoint of an early SAELens
    saved, here = read_json(Path(folder, RUNNER_CFG_FILENAME)), plain(cfg.to_dict())
    if _hooks(saved) == _hooks(here):  # in this order rows of the mixing buffer hold them
        saved = {**saved, **_of_the_same(saved, here)}
    for field in _READ:
        if field in saved and field in here:
            _require_same(folder, field, saved[field], here[field], remedy)
    _require_same(folder, "hook_name_out", _output_hook(saved), _output_hook(here), remedy)
    for field in _NAMED:
        found, wanted = saved.get(field), here.get(field)
        if found != wanted:
            logger.warning(
                f"the checkpoint {folder} has {field} {found!r} and this run {wanted!r}: the run "
                "goes on with this run's"
            )
    _say_other_settings(folder, saved, here)


def _say_other_settings(folder: str, saved: dict[str, Any], here: dict[str, Any]) -> None:
    changed = {
        name: values
        for name, values in changed_settings(saved, here).items()
        if name.rpartition(".")[2] not in _SAID_OR_FREE
    }
    if changed:
        listed = ", ".join(f"{name} {there!r} ({now!r})" for name, (there, now) in changed.items())
        logger.warning(
            f"the checkpoint {folder} was trained with other settings, which this run changes to "
            f"those in brackets: {listed}"
        )


def _hooks(config: Mapping[str, Any]) -> list[Any] | None:
    """The hooks of a run over several dictionaries, in their order; None of any other run."""
    found = config.get("hook_names")
    return list(dict.fromkeys(found.values())) if isinstance(found, dict) else None


def _of_the_same(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says by dictionary, of those that this run trains."""
    return {
        field: {name: saved[field][name] for name in here[field] if name in saved[field]}
        for field in ("hook_names", "hook_head_indices")
        if isinstance(saved.get(field), dict) and isinstance(here.get(field), dict)
    }


def _output_hook(config: Mapping[str, Any]) -> Any:
    sae = config.get("sae")
    return sae.get("hook_name_out") if isinstance(sae, dict) else None


def _require_same(folder: str, field: str, found: Any, wanted: Any, remedy: str) -> None:
    if found != wanted:
        raise ValueError(
            f"the checkpoint {folder} has {field} {found!r} and this run {wanted!r}; {remedy}"
        )


def _about_normalization(folder: str, found: str) -> str:
    if found != "none":
        return f"; give this run normalize_activations={found!r}"
    return (
        ": at the end of a run the scale of its activations is folded into the weights. Train a "
        f"finished SAE further with `jumprelu finetune {folder}` "
        "(jumprelu_plugin.FinetuningRunner), or give a checkpoint from the middle of a run"
    )
