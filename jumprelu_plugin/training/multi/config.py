"""The config of one run over several dictionaries, from the config of each one's own run.

SAELens' multi-SAE config holds one learning rate and one seed for all. Here every dictionary is
described by the config that would train it alone, so that a recipe's numbers, which follow from
widths, are each dictionary's own. What the harvest is made of has to agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig

from jumprelu_plugin.training.lr_schedule import SCHEDULE_FIELDS

# Fields of SAELens' runner config that each dictionary may have its own of.
OWN_FIELDS = (
    *SCHEDULE_FIELDS,
    "dead_feature_window",
    "feature_sampling_window",
    "seed",
)
_PER_DICTIONARY = ("sae", "hook_name", "hook_head_index", *OWN_FIELDS)
# Not part of what is trained, and made anew for each config.
_INCIDENTAL = ("checkpoint_path", "logger")
# What SAELens' multi-SAE runner has no room for, with its value where it is not used.
_NOT_TAKEN = {
    "use_cached_activations": False,
    "from_pretrained_path": None,
    "compile_sae": False,
    "hook_eval": "NOT_IN_USE",
}


@dataclass
class MultiRunConfig(MultiSAETrainingRunnerConfig):
    """SAELens' config of a run over several dictionaries.

    Attributes:
        dictionaries: by name, the fields that each dictionary has of its own (`OWN_FIELDS`);
            SAELens' fields of these names are the first dictionary's.
    """

    dictionaries: dict[str, dict[str, Any]] = field(default_factory=dict)


def config_of_all(
    configs: Mapping[str, LanguageModelSAERunnerConfig[Any]],
) -> MultiRunConfig:
    """The config of the run that trains all of these.

    Args:
        configs: by name; the first gives what is common to all.

    Raises:
        ValueError: there is none, they do not agree on the harvest, or one asks for what a run over
            several dictionaries cannot do.
    """
    refuse_what_cannot_be_shared(configs)
    first = next(iter(configs.values()))
    own = {each.name for each in dataclasses.fields(MultiRunConfig) if each.init}
    shared = {
        each.name: getattr(first, each.name)
        for each in dataclasses.fields(first)
        if each.name in own
    }
    made = MultiRunConfig(
        saes={name: cfg.sae for name, cfg in configs.items()},
        hook_names={name: cfg.hook_name for name, cfg in configs.items()},
        hook_head_indices={name: cfg.hook_head_index for name, cfg in configs.items()},
        dictionaries={
            name: {each: getattr(cfg, each) for each in OWN_FIELDS} for name, cfg in configs.items()
        },
        **shared,
    )
    # Set afterwards: the constructor appends a random folder's name, as the first's did.
    made.checkpoint_path = first.checkpoint_path
    return made


def refuse_what_cannot_be_shared(
    configs: Mapping[str, LanguageModelSAERunnerConfig[Any]],
) -> None:
    """Raise ValueError, as `config_of_all` does."""
    if not configs:
        raise ValueError("there is no dictionary to train: give at least one")
    first_name, first = next(iter(configs.items()))
    for name, cfg in configs.items():
        _refuse_name(name)
        if "transcoder" in cfg.sae.architecture():
            raise ValueError(
                f"{name} is a {cfg.sae.architecture()}, which reads two hooks at once: train "
                "transcoders of several layers with `jumprelu train-transcoders`"
            )
        for each, unused in _NOT_TAKEN.items():
            if getattr(cfg, each) != unused:
                raise ValueError(
                    f"{each} is {getattr(cfg, each)!r}, which SAELens' runner for several "
                    f"dictionaries does not take: leave it out, or train {name} alone"
                )
        for each in dataclasses.fields(cfg):
            if each.name in _PER_DICTIONARY or each.name in _INCIDENTAL:
                continue
            if getattr(cfg, each.name) != getattr(first, each.name):
                raise ValueError(
                    f"{each.name} is {getattr(cfg, each.name)!r} for {name} and "
                    f"{getattr(first, each.name)!r} for {first_name}: one harvest has one. What "
                    f"may differ: the SAE's own fields, hook_name, {', '.join(OWN_FIELDS)}"
                )
    _refuse_different_heads(configs)


def _refuse_name(name: str) -> None:
    if not name or name.startswith(".") or set(name) & set('/\\\0:*?"<>|'):
        raise ValueError(
            f"a dictionary's name is {name!r}; it becomes a folder, so give letters, digits, "
            "_, - and ."
        )
    if name.endswith((".json", ".jsonl", ".safetensors", ".pt")):
        raise ValueError(
            f"a dictionary's name is {name!r}; it becomes a folder beside the run's own files, "
            "which have such names: leave out the ending"
        )


def _refuse_different_heads(configs: Mapping[str, LanguageModelSAERunnerConfig[Any]]) -> None:
    heads: dict[str, int | None] = {}
    for name, cfg in configs.items():
        before = heads.setdefault(cfg.hook_name, cfg.hook_head_index)
        if before != cfg.hook_head_index:
            raise ValueError(
                f"hook_head_index is {cfg.hook_head_index} for {name}, and {before} for another "
                f"dictionary at {cfg.hook_name}: a hook is read once, so train them in two runs"
            )
