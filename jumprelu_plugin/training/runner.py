"""SAELens' language-model runner with checks before a run, exact resuming and transcoders.

`JumpReLUTrainingRunner` takes SAELens' own config and trains whatever architecture it names. In
addition to `LanguageModelSAETrainingRunner` it
  - refuses a run that cannot work before anything is computed or written, and measures the first
    step before it starts (`health.preflight`);
  - takes the embedded model and local model folders as `model_name`;
  - seeds PyTorch with `cfg.seed`, so that a run can be repeated;
  - shows and records metrics, and saves checkpoints by the clock and when it is interrupted
    (`trainer.py`, `checkpoints.py`);
  - resumes exactly where it stopped (`activations/store.py`), from the newest whole checkpoint if
    `resume_from_checkpoint` is "auto" (`resuming.py`);
  - writes the output folder whole or not at all;
  - trains transcoders, reading both hooks in one forward pass (`activations/pairs.py`);
  - reads activations from disk where a cache is given (`activations/cache/`).
A script that keeps SAELens' own runner trains the same SAE.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import wandb
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, logger
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.load_model import load_model as load_hub_model
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from jumprelu_plugin.models.firing import hook_widths
from jumprelu_plugin.models.hooked_auto_model import load_hooked_model
from jumprelu_plugin.models.language_models import hub_errors_explained, local_folder
from jumprelu_plugin.models.sequences import fitting_context
from jumprelu_plugin.models.text import tokenized_dataset
from jumprelu_plugin.records import whole_files
from jumprelu_plugin.saes.transcoder import JumpReLUTrainingTranscoder
from jumprelu_plugin.saes.transcoder_config import JumpReLUTrainingTranscoderConfig
from jumprelu_plugin.training.activations.cache.store import (
    cached,
    open_cache_for,
    require_same_model,
)
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.activations.pairs import HookPair, PairStore
from jumprelu_plugin.training.activations.read_ahead import PausingEvaluator, passes_ahead
from jumprelu_plugin.training.activations.scaler import pair_scaler
from jumprelu_plugin.training.activations.store import ResumableActivationsStore, resumable
from jumprelu_plugin.training.checkpoints import (
    DEFAULT_MINUTES,
    Checkpoints,
    explained_at_the_end,
    refuse_negative_minutes,
    refuse_unwritable,
)
from jumprelu_plugin.training.distributed.division import ALONE, Division
from jumprelu_plugin.training.health.findings import log_findings
from jumprelu_plugin.training.health.preflight import Preflight, run_preflight
from jumprelu_plugin.training.health.schedule import repaired
from jumprelu_plugin.training.metrics_file import keep_before
from jumprelu_plugin.training.requirements import (
    require_possible_numbers,
    require_same_sae,
    require_taken_by_model,
    require_what_a_run_needs,
)
from jumprelu_plugin.training.resuming import resolve_auto
from jumprelu_plugin.training.starting_weights import pretrained_sae, refuse_wrong_checkpoint
from jumprelu_plugin.training.text_source import (
    local_dataset,
    one_split,
    refuse_unread_fields,
    without_false_alarms,
)
from jumprelu_plugin.training.trainer import JumpReLUTrainer
from jumprelu_plugin.training.transcoder_evaluator import TranscoderEvaluator

METRICS_FILENAME = "metrics.jsonl"


class JumpReLUTrainingRunner(LanguageModelSAETrainingRunner):
    """Train one SAE on a hook of a language model, or one transcoder on a pair of hooks.

    Args:
        cfg: SAELens' runner config. `model_name` may also be the embedded model's name or a folder
            with a model and its tokenizer. An empty `dataset_path` means the text of the `demo`
            extra.
        override_dataset, override_model, override_sae: as in SAELens.
        metrics_path: where to append the metrics as JSON lines; `metrics.jsonl` in the output
            folder by default. Every line is complete when it is written. A run that is not resumed
            starts the file anew.
        save_buffer: whether checkpoints hold the rows that wait in the mixing buffer. Without them
            they are smaller, and a resumed run sees its data in another order
            (`activations/store.py` gives the size).
        check_first: whether `run` checks the run before it starts (`health.preflight`), warns, and
            refuses what cannot work.
        activations: folder of an activation cache to train on, in place of the model's forward
            passes (`activations/cache/`). The model is still loaded, for checks and evaluations.
        checkpoint_every_n_minutes: how often a checkpoint is saved beside those of
            `cfg.n_checkpoints`. The last two of these are kept until the SAE is saved. 0 for never;
            without `cfg.checkpoint_path` there are none.

    Raises:
        ValueError: the hook does not exist, its width is not the SAE's d_in, the context is longer
            than the model's, the output folder already holds an SAE, there is no text, or the
            checkpoint to resume is of another SAE or the end of a run, or the cache is of another
            model, text or hook; on `run`, if the check finds that it cannot work.
        OSError: the model cannot be loaded, or there is no such checkpoint.

    Attributes:
        division: over which processes the run will be; `preflight` looks at one.
    """

    division: Division = ALONE
    _hidden: Mapping[str, Any] = MappingProxyType({})  # the config's, while SAELens runs

    @without_false_alarms()
    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: Any = None,
        override_model: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
        metrics_path: str | Path | None = None,
        save_buffer: bool = True,
        check_first: bool = True,
        activations: str | Path | None = None,
        checkpoint_every_n_minutes: float = DEFAULT_MINUTES,
    ):
        refuse_negative_minutes(checkpoint_every_n_minutes)
        self.checkpoint_every_n_minutes = checkpoint_every_n_minutes
        require_possible_numbers(cfg)
        cfg, self._repairs = repaired(cfg) if check_first else (cfg, [])
        self._check_first = check_first
        require_what_a_run_needs(cfg)
        refuse_used_output_folder(cfg.output_path)
        refuse_unwritable(cfg.output_path, "output_path")
        refuse_unwritable(cfg.checkpoint_path, "checkpoint_path")
        cfg = resolve_auto(cfg)
        refuse_wrong_checkpoint(cfg)
        cache = None if activations is None else open_cache_for(activations, cfg)
        if cfg.from_pretrained_path is not None and override_sae is None:
            override_sae = pretrained_sae(cfg.from_pretrained_path, cfg.sae)
        if override_sae is not None:
            require_same_sae(cfg, override_sae)
        override_dataset = one_split(override_dataset)
        refuse_empty_text(override_dataset)
        overrides_nothing = override_model is None and override_dataset is None
        model = language_model(cfg) if override_model is None else override_model
        refuse_wrong_hook(model, cfg.hook_name, cfg.sae.d_in, cfg.hook_head_index)
        require_taken_by_model(cfg, model)
        if cache is not None:
            require_same_model(cache, model)
        fitting_context(model, cfg.context_size)
        if override_dataset is None:
            override_dataset = own_text(cfg, model)
        torch.manual_seed(cfg.seed)
        try:
            with quiet() if overrides_nothing else nullcontext():
                super().__init__(cfg, override_dataset, model, override_sae)
        except StopIteration:  # from the first look at a dataset that was read from dataset_path
            refuse_empty_text([])
        refuse_unread_fields(cfg, self.activations_store)
        if cache is None:
            self.activations_store = resumable(self.activations_store, cfg, save_buffer)
        else:
            self.activations_store = cached(self.activations_store, cfg, cache)
        self.evaluator.activations_store = self.activations_store
        if isinstance(self.sae, JumpReLUTrainingTranscoder):
            if cache is not None:
                raise ValueError("a transcoder reads two hooks at once: train it without a cache")
            self._read_pairs(self.sae.cfg)
        if metrics_path is None and cfg.output_path is not None:
            metrics_path = Path(cfg.output_path, METRICS_FILENAME)
        self.metrics_path = None if metrics_path is None else Path(metrics_path)

    def _read_pairs(self, transcoder: JumpReLUTrainingTranscoderConfig) -> None:
        """Have the store give rows [input ‖ output], and evaluate what is trained on them."""
        pair = HookPair(self.cfg.hook_name, output_hook(transcoder))
        refuse_wrong_hook(self.model, pair.hook_out, transcoder.width_out, width_field="d_out")
        widths = pair_widths(self.model, [pair], self.cfg.hook_head_index)
        transcoder.metadata.hook_name_out = pair.hook_out
        self.activations_store = PairStore.like(
            self.activations_store, {"": pair}, widths, self.cfg.seed
        )
        self.evaluator = TranscoderEvaluator(  # type: ignore[assignment]
            self.model, self.activations_store, self.cfg.n_eval_batches
        )

    def preflight(self) -> Preflight:
        """Memory, first step and findings of this run, from one batch; nothing is changed."""
        scaler = None
        if isinstance(self.sae, JumpReLUTrainingTranscoder):
            scaler = pair_scaler(self.sae)
        return run_preflight(
            self.cfg,
            self.sae,
            self.activations_store,
            scaler=scaler,
            repairs=self._repairs,
            division=self.division,
        )

    @override
    @without_false_alarms()
    def run(self) -> Any:
        if self._check_first:
            report = self.preflight()
            report.refuse()
            log_findings([*report.of("repaired"), *report.of("warning")])
        # SAELens' trainer would fail on a checkpoint of another schedule; ours loads it.
        hidden: dict[str, Any] = {"resume_from_checkpoint": None}
        store = self.activations_store
        if isinstance(store, ResumableActivationsStore):
            store.feed(self.cfg.device, self.passes_ahead())
            if store.ahead:
                self.evaluator = PausingEvaluator(self.evaluator, store)  # type: ignore[assignment]
            # SAELens would put a queue behind the mixing buffer, where no checkpoint sees it.
            hidden["prefetch_llm_batches"] = False
        self._hidden = {name: getattr(self.cfg, name) for name in hidden}
        vars(self.cfg).update(hidden)
        try:
            return super().run()
        finally:
            self._restore_config()
            if isinstance(store, ResumableActivationsStore):
                store.stop_reading()

    def passes_ahead(self) -> int:
        """Passes of the model that a thread makes before training asks for them."""
        return passes_ahead(self.cfg)

    def _restore_config(self) -> None:
        """What the config says, for what is recorded of it."""
        hidden, self._hidden = self._hidden, {}
        vars(self.cfg).update(hidden)
        if hidden and self.cfg.logger.log_to_wandb and wandb.run is not None:
            wandb.config.update(dict(hidden), allow_val_change=True)

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self._restore_config()
        checkpoint = self.cfg.resume_from_checkpoint
        if checkpoint is not None:
            self.load_weights(checkpoint)
            self.activations_store.load_from_checkpoint(checkpoint)
        # Not SAELens' handling: it saves no weights, and cuts a step in two.
        self.trainer = self.make_trainer(
            cfg=trainer.cfg,
            sae=trainer.sae,
            data_provider=trainer.data_provider,
            evaluator=trainer.evaluator,
            save_checkpoint_fn=trainer.save_checkpoint_fn,
        )
        self.trainer.metrics_path = self.metrics_path
        self.trainer.activation_scaler = self.activation_scaler()
        if self.cfg.checkpoint_path is not None:
            self.trainer.checkpoints = self.make_checkpoints(self.cfg.checkpoint_path)
        if checkpoint is not None:
            self.trainer.load_trainer_state(checkpoint)
            if self.metrics_path is not None:
                keep_before(self.metrics_path, self.trainer.n_training_steps)
        elif self.metrics_path is not None:
            self.metrics_path.unlink(missing_ok=True)
        return self.trainer.fit()

    def load_weights(self, checkpoint: str) -> None:
        """Give the SAE what a checkpoint holds of it."""
        self.sae.load_weights_from_checkpoint(checkpoint)

    def make_trainer(self, **parts: Any) -> JumpReLUTrainer:
        """The trainer of this run."""
        return JumpReLUTrainer(**parts)

    def make_checkpoints(self, folder: str) -> Checkpoints:
        """Where its checkpoints are saved."""
        return Checkpoints(folder, self.checkpoint_every_n_minutes)

    def activation_scaler(self) -> ActivationScaler:
        """The scaler the training starts with; it estimates its scale if it has none."""
        if isinstance(self.sae, JumpReLUTrainingTranscoder):
            return pair_scaler(self.sae)
        return ActivationScaler()

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        """Write the output folder; `cfg.json`, by which it is known as an SAE, comes last."""
        checkpoints = self.trainer.checkpoints
        last = None if checkpoints is None else checkpoints.last
        with (
            explained_at_the_end(
                output_path, last, "the same command with --resume_from_checkpoint auto"
            ),
            whole_files(output_path, last=SAE_CFG_FILENAME) as unfinished,
        ):
            # What is handed in comes from the trainer SAELens made, which trained nothing.
            super().save_final_sae(sae, str(unfinished), self.trainer.log_feature_sparsity)
        if checkpoints is not None:
            checkpoints.remove_replaceable()


def language_model(cfg: LanguageModelSAERunnerConfig[Any]) -> Any:
    """The model a config names, with its `model_from_pretrained_kwargs`.

    A folder is loaded as HookedSAETransformer where `model_class_name` is left at SAELens' default.

    Raises:
        ValueError: there is no such model or class, or a keyword argument is none of its own.
    """
    name, kind, device = cfg.model_name, cfg.model_class_name, cfg.llm_device or cfg.device
    keywords = cfg.model_from_pretrained_kwargs or {}
    if kind == "HookedMamba":
        with hub_errors_explained(name):
            return load_hub_model(kind, name, device, keywords, hook_names=[cfg.hook_name])
    if local_folder(name) is not None and kind == "HookedTransformer":
        kind = "HookedSAETransformer"
    return load_hooked_model(name, kind, device, **keywords)


def own_text(cfg: Any, model: Any) -> Any:
    """The text where it is this machine's: the demo extra's, or a folder's; None: the hub's."""
    if not cfg.dataset_path:
        return tokenized_dataset(
            model.tokenizer, cfg.context_size, split="train", prepend_bos=cfg.prepend_bos
        )
    dataset = local_dataset(cfg.dataset_path, streaming=cfg.streaming)
    refuse_empty_text(dataset)
    return dataset


@contextmanager
def quiet() -> Iterator[None]:
    """Without SAELens' warnings that the config does not name what overrides it: here it does."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def refuse_empty_text(dataset: Any) -> None:
    """Raise ValueError for a dataset without rows."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("the dataset has no rows: too little text to train on; give another one")


def refuse_used_output_folder(output_path: str | None) -> None:
    """Raise ValueError if a run would overwrite an SAE."""
    if output_path is not None and Path(output_path, SAE_CFG_FILENAME).exists():
        raise ValueError(
            f"the output folder {output_path} already holds an SAE ({SAE_CFG_FILENAME}); "
            "give another output_path, or move the SAE away"
        )


def output_hook(transcoder: JumpReLUTrainingTranscoderConfig) -> str:
    """The output hook a transcoder's config names.

    Raises:
        ValueError: it names none.
    """
    hook = transcoder.hook_name_out or transcoder.metadata.hook_name_out
    if not hook:
        raise ValueError(
            "a transcoder needs an output hook: set hook_name_out in its config, for example "
            "hook_name='blocks.3.ln2.hook_normalized' with hook_name_out='blocks.3.hook_mlp_out'"
        )
    return hook


def refuse_wrong_hook(
    model: Any, hook_name: str, d_in: int, head: int | None = None, width_field: str = "d_in"
) -> None:
    """Raise ValueError if the model has no such hook or its activations are not d_in wide."""
    if hook_name not in model.hook_dict:
        close = difflib.get_close_matches(hook_name, list(model.hook_dict), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"the model has no hook {hook_name!r}{hint}")
    heads = None if head is None else {hook_name: head}
    width = hook_widths(model, [hook_name], heads)[hook_name]
    if width != d_in:
        flattened = " (heads flattened)" if hook_name.endswith("hook_z") else ""
        raise ValueError(
            f"the SAE's {width_field} is {d_in}, but the activations at {hook_name} are "
            f"{width} wide{flattened}: set {width_field}={width}"
        )
