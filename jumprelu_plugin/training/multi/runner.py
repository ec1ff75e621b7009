"""SAELens' multi-SAE runner with checks before a run, exact resuming and whole output folders.

`JumpReLUMultiTrainingRunner` trains several dictionaries, at one hook or several, in one pass over
the text: the model runs once for all of them, and dictionaries at one hook share its activations.
Each is what `JumpReLUTrainingRunner` would train from its own config.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import wandb
from rich.table import Table
from sae_lens import LanguageModelSAERunnerConfig, logger
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.registry import get_sae_training_class
from typing_extensions import override

from jumprelu_plugin.models.firing import hook_widths
from jumprelu_plugin.models.sequences import fitting_context
from jumprelu_plugin.records import provenance, was_cut_short, whole_files, write_json
from jumprelu_plugin.training.activations.multi_hook import MultiHookStore, for_hooks
from jumprelu_plugin.training.activations.read_ahead import PausingEvaluator, passes_ahead
from jumprelu_plugin.training.checkpoints import (
    DEFAULT_MINUTES,
    Checkpoints,
    explained_at_the_end,
    refuse_negative_minutes,
    refuse_unwritable,
)
from jumprelu_plugin.training.health.findings import Finding
from jumprelu_plugin.training.health.preflight import Preflight, run_preflight
from jumprelu_plugin.training.health.schedule import repaired
from jumprelu_plugin.training.interruption import InterruptibleIterator
from jumprelu_plugin.training.metrics_file import keep_before
from jumprelu_plugin.training.multi.check import MultiCheck
from jumprelu_plugin.training.multi.config import config_of_all, refuse_what_cannot_be_shared
from jumprelu_plugin.training.multi.memory import forecast_of_all
from jumprelu_plugin.training.multi.trainer import MultiTrainer, fit_until_stopped
from jumprelu_plugin.training.requirements import (
    require_possible_numbers,
    require_taken_by_model,
    require_what_a_run_needs,
)
from jumprelu_plugin.training.resuming import resolve_auto
from jumprelu_plugin.training.runner import (
    METRICS_FILENAME,
    language_model,
    own_text,
    quiet,
    refuse_empty_text,
    refuse_used_output_folder,
    refuse_wrong_hook,
)
from jumprelu_plugin.training.starting_weights import refuse_wrong_checkpoint_of_all
from jumprelu_plugin.training.text_source import (
    one_split,
    refuse_unread_fields,
    without_false_alarms,
)

RECORD_FILENAME = "dictionaries.json"
_REMEDY = "the same command with --resume_from_checkpoint auto"


class JumpReLUMultiTrainingRunner(MultiSAETrainingRunner):
    """Train several SAEs on the activations of one model, in one pass over the text.

    Each is described by the config that `JumpReLUTrainingRunner` would train it from. The configs
    agree on model, text, tokens, batch, buffer and devices. The SAEs' own fields, the hook, the
    learning rate and its schedule, Adam's betas, windows and seed may differ. The order of the data
    follows the first one's seed.

    Args:
        configs: by name; the name becomes a folder in the first one's `output_path`. The first
            one's `checkpoint_path`, `resume_from_checkpoint` and `logger` are the run's.
        override_dataset, override_model: as in SAELens.
        save_buffer: whether checkpoints hold the mixing buffer, for an exact resume. Its rows are
            as wide as the activations of all hooks together.
        check_first: whether `run` checks the run before it starts, warns, and refuses what cannot
            work.
        checkpoint_every_n_minutes: how often a checkpoint is saved beside those of
            `n_checkpoints`; the last two of these are kept until the SAEs are saved. 0 for never.
        log: called with what the check found about memory, and with the results' table.

    Raises:
        ValueError: the configs do not agree, a hook does not exist or has another width than its
            SAE's d_in, the output folder holds a result, there is no text, or the checkpoint is of
            other dictionaries; on `run`, if the check finds that the run cannot work.
        OSError: the model cannot be loaded, or there is no such checkpoint.

    Attributes:
        configs: what each is trained by, with schedules that fit into the run.
    """

    @without_false_alarms()
    def __init__(
        self,
        configs: Mapping[str, LanguageModelSAERunnerConfig[Any]],
        override_dataset: Any = None,
        override_model: Any = None,
        *,
        save_buffer: bool = True,
        check_first: bool = True,
        checkpoint_every_n_minutes: float = DEFAULT_MINUTES,
        log: Callable[[Any], None] = lambda _: None,
    ):
        refuse_negative_minutes(checkpoint_every_n_minutes)
        refuse_before_the_model(configs)
        self._check_first, self._minutes = check_first, checkpoint_every_n_minutes
        self._log = log
        fitting = {
            name: repaired(cfg) if check_first else (cfg, []) for name, cfg in configs.items()
        }
        self.configs = {name: cfg for name, (cfg, _) in fitting.items()}
        self._repairs: dict[str, list[Finding]] = {
            name: made for name, (_, made) in fitting.items()
        }
        first = next(iter(self.configs.values()))
        cfg = resolve_auto(config_of_all(self.configs))
        refuse_wrong_checkpoint_of_all(cfg)
        override_dataset = one_split(override_dataset)
        refuse_empty_text(override_dataset)
        model = language_model(first) if override_model is None else override_model
        for name, each in self.configs.items():
            _refuse_wrong_hook(name, model, each)
        require_taken_by_model(first, model)
        fitting_context(model, cfg.context_size)
        if override_dataset is None:
            override_dataset = own_text(cfg, model)
        saes, drawn = self._untrained()
        try:
            with quiet():
                super().__init__(cfg, override_dataset, model, saes)
        except StopIteration:  # from the first look at a dataset that was read from dataset_path
            refuse_empty_text([])
        refuse_unread_fields(cfg, self.activations_store)
        torch.set_rng_state(drawn)
        heads = {each.hook_name: each.hook_head_index for each in self.configs.values()}
        widths = {each.hook_name: each.sae.d_in for each in self.configs.values()}
        text = self.activations_store.dataset
        self.activations_store: MultiHookStore = for_hooks(
            MultiHookStore, self.activations_store, text, widths, heads
        )
        self.activations_store.save_buffer = save_buffer
        self.evaluator.activations_store = self.activations_store

    def _untrained(self) -> tuple[dict[str, Any], torch.Tensor]:
        """The SAEs, each of its own seed, and the random state after the first one's draws, from
        which the order of the data follows as in the first one's own run."""
        made, states = {}, []
        for name, cfg in self.configs.items():
            torch.manual_seed(cfg.seed)
            kind, _ = get_sae_training_class(cfg.sae.architecture())
            # A config of its own: training sets fields in it.
            made[name] = kind(copy.deepcopy(cfg.sae))
            states.append(torch.get_rng_state())
        return made, states[0]

    # ---------------------------------------------------------------- before training

    def check(self) -> MultiCheck:
        """Each dictionary's first step and findings, from one batch, and the memory of all; nothing
        is changed."""
        found = {name: self._preflight_of(name) for name in self.configs}
        firsts = {name: each.first for name, each in found.items()}
        memory = forecast_of_all(
            self.cfg,
            self.saes,
            self.model,
            {name: first.entries for name, first in firsts.items() if first is not None},
            self.activations_store.hook_d_ins,
            calibrates=self.cfg.resume_from_checkpoint is None,
            saves_buffer=self.activations_store.save_buffer,
        )
        return MultiCheck(found, memory)

    def _preflight_of(self, name: str) -> Preflight:
        cfg = copy.copy(self.configs[name])
        cfg.resume_from_checkpoint = self.cfg.resume_from_checkpoint
        found = run_preflight(
            cfg, self.saes[name], self.activations_store, repairs=self._repairs[name]
        )
        # Memory is that of all dictionaries together.
        others = tuple(each for each in found.findings if each.name != "memory")
        return replace(found, memory=None, findings=others)

    def _check(self) -> None:
        found = self.check()
        found.refuse()
        self._log(str(found))
        for severity in ("repaired", "warning"):
            for name, one in found.of(severity):
                logger.warning(f"{f'{name}, ' if name else ''}{one.name} ({severity}): {one}")

    # ---------------------------------------------------------------- training

    @override
    @without_false_alarms()
    def run(self) -> dict[str, Any]:
        """Train, and save each SAE as a stock folder; the SAEs by name.

        Stopped by Ctrl-C or SIGTERM, it finishes the step, saves a checkpoint where
        `checkpoint_path` is set, and raises SAELens' `InterruptedException`.
        """
        if self._check_first:
            self._check()
        self._set_sae_metadata()
        logs = self.cfg.logger
        if logs.log_to_wandb:
            wandb.init(
                project=logs.wandb_project,
                entity=logs.wandb_entity,
                config=self.cfg.to_dict(),
                name=logs.run_name,
                id=logs.wandb_id,
            )
        store = self.activations_store
        store.feed(self.cfg.device, passes_ahead(self.cfg))
        if store.ahead:
            self.evaluator = PausingEvaluator(self.evaluator, store)  # type: ignore[assignment]
        batches = InterruptibleIterator(
            self.activations_store.get_multi_hook_data_loader(), f"{_REMEDY} goes on"
        )
        trainer = self._trainer(batches)
        try:
            saes = fit_until_stopped(trainer, batches)
        finally:
            store.stop_reading()
        self._save(saes, trainer)
        self._log(self._results(saes))
        if logs.log_to_wandb:
            wandb.finish()
        return saes

    def _trainer(self, batches: InterruptibleIterator) -> MultiTrainer:
        trainer = MultiTrainer(
            cfg=self.cfg.to_sae_trainer_config(),
            saes=self.saes,
            hook_names=self.cfg.hook_names_per_sae,
            data_provider=batches,
            evaluator=self.evaluator,
            save_checkpoint_fn=self._save_runner_checkpoint_files,
        )
        trainer.give_schedules(
            {name: cfg.to_sae_trainer_config() for name, cfg in self.configs.items()}
        )
        if self.cfg.checkpoint_path is not None:
            trainer.checkpoints = Checkpoints(self.cfg.checkpoint_path, self._minutes)
            trainer.keeps_checkpoints = True
        if self.cfg.output_path is not None:
            trainer.metrics_path = Path(self.cfg.output_path, METRICS_FILENAME)
        if self.cfg.resume_from_checkpoint is not None:
            trainer.load_checkpoint(self.cfg.resume_from_checkpoint)
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)
            if trainer.metrics_path is not None:
                keep_before(trainer.metrics_path, trainer.n_training_steps + 1)
        elif trainer.metrics_path is not None:
            trainer.metrics_path.unlink(missing_ok=True)
        return trainer

    def _save(self, saes: dict[str, Any], trainer: MultiTrainer) -> None:
        """Write the output folder; the record, by which it is known as finished, comes last."""
        output, checkpoints = self.cfg.output_path, trainer.checkpoints
        if output is not None:
            last = None if checkpoints is None else checkpoints.last
            with (
                explained_at_the_end(output, last, _REMEDY),
                whole_files(output, last=RECORD_FILENAME) as unfinished,
            ):
                self.cfg.output_path = str(unfinished)
                try:
                    self._save_final_outputs(saes, trainer)
                finally:
                    self.cfg.output_path = output
                # Without the place where the folder was written.
                (unfinished / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict()))
                write_json(unfinished / RECORD_FILENAME, self._record(saes))
        if checkpoints is not None:
            checkpoints.remove_replaceable()

    def _results(self, saes: dict[str, Any]) -> Table:
        table = Table(title=f"{len(saes)} dictionaries after {self.cfg.training_tokens:,} tokens")
        for column in ("folder", "d_sae", "L0", "dead"):
            table.add_column(column, justify="left" if column == "folder" else "right")
        for name, sae in saes.items():
            l0, dead = sae.cfg.metadata.l0, sae.cfg.metadata.num_dead_features
            table.add_row(name, f"{sae.cfg.d_sae:,}", f"{l0:.1f}", f"{dead:,}")
        return table

    def _record(self, saes: dict[str, Any]) -> dict[str, Any]:
        return {
            "kind": "dictionaries",
            "dictionaries": [
                {
                    "folder": name,
                    "hook_name": self.configs[name].hook_name,
                    "architecture": sae.cfg.architecture(),
                    "d_in": sae.cfg.d_in,
                    "d_sae": sae.cfg.d_sae,
                    "target_l0": getattr(sae.cfg, "target_l0", None),
                    "lr": self.configs[name].lr,
                    "seed": self.configs[name].seed,
                    "l0_in_training": sae.cfg.metadata.l0,
                    "dead_in_training": sae.cfg.metadata.num_dead_features,
                }
                for name, sae in saes.items()
            ],
            "training_tokens": self.cfg.training_tokens,
            "provenance": provenance(seed=self.cfg.seed),
        }


def train_many(
    read: Callable[[Mapping[str, int]], Mapping[str, LanguageModelSAERunnerConfig[Any]]],
    *,
    check_only: bool = False,
    log: Callable[[Any], None] = print,
    **options: Any,
) -> None:
    """Train dictionaries whose configs depend on how wide the model's activations are.

    Args:
        read: the configs by name, from the width of the activations at their hooks. First called
            with none, for what can be refused before the model is loaded.
        check_only: whether to say what the check finds, in place of training.
        log: called with what there is to say.
        options: of `JumpReLUMultiTrainingRunner`.

    Raises:
        ValueError, OSError: as `JumpReLUMultiTrainingRunner`, and with `check_only` as its `run`.
    """
    drafts = read({})
    refuse_before_the_model(drafts)
    model = language_model(next(iter(drafts.values())))
    heads = {
        cfg.hook_name: cfg.hook_head_index
        for cfg in drafts.values()
        if cfg.hook_head_index is not None
    }
    widths = hook_widths(model, [cfg.hook_name for cfg in drafts.values()], heads)
    runner = JumpReLUMultiTrainingRunner(read(widths), override_model=model, log=log, **options)
    if not check_only:
        runner.run()
        return
    found = runner.check()
    for part in (*found.tables(), str(found)):
        log(part)
    found.refuse()


def refuse_before_the_model(configs: Mapping[str, LanguageModelSAERunnerConfig[Any]]) -> None:
    """Raise ValueError for what can be seen to be wrong before the model is loaded."""
    for cfg in configs.values():
        require_possible_numbers(cfg)
    refuse_what_cannot_be_shared(configs)
    for cfg in configs.values():
        require_what_a_run_needs(cfg)
    first = next(iter(configs.values()))
    refuse_unwritable(first.output_path, "output_path")
    refuse_unwritable(first.checkpoint_path, "checkpoint_path")
    if first.output_path is None:
        return
    refuse_used_output_folder(first.output_path)
    # SAEs that a killed run had moved into their places are written again.
    saes = () if was_cut_short(first.output_path) else tuple(configs)
    for name in (RECORD_FILENAME, *saes):
        if Path(first.output_path, name).exists():
            raise ValueError(
                f"the output folder {first.output_path} already holds {name}; give another "
                "output_path, or move what is there away"
            )


def _refuse_wrong_hook(name: str, model: Any, cfg: Any) -> None:
    try:
        refuse_wrong_hook(model, cfg.hook_name, cfg.sae.d_in, cfg.hook_head_index)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
