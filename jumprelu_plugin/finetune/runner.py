"""Finetunes a pretrained SAE.

`FinetuningRunner` is a `JumpReLUTrainingRunner` that starts from a dictionary: a Gemma Scope
`params.npz` or any JumpReLU folder that `load_dictionary` reads. The first batches give the input
scale, as in every training, and the dictionary's L0, which is the default target. The parameters
are converted to that scale (`pretrained.py`), trained, converted back, and saved as a stock folder.
Before the first update, the training SAE computes the same function as the pretrained one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, logger
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.evaluation.metrics import StreamingMetrics
from jumprelu_plugin.finetune.pretrained import (
    decoder_norms,
    load_parameters_,
    read_pretrained,
    rescale,
    restore_decoder_norms_,
)
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.firing import hook_widths
from jumprelu_plugin.models.options import recorded_keywords
from jumprelu_plugin.records import is_number, read_json
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig, as_plugin_config
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.training.checkpoints import DEFAULT_MINUTES
from jumprelu_plugin.training.health.preflight import Preflight
from jumprelu_plugin.training.requirements import require_what_a_run_needs
from jumprelu_plugin.training.resuming import AUTO, resolve_auto
from jumprelu_plugin.training.runner import (
    JumpReLUTrainingRunner,
    language_model,
    quiet,
    refuse_used_output_folder,
)
from jumprelu_plugin.training.starting_weights import refuse_wrong_checkpoint

# The initial L0 and FVU are measured on this many batches.
MEASURED_BATCHES = 4
NORMALIZATIONS = ("none", "expected_average_only_in")
SEPARATOR, SHORT_LEFT_OUT = "sequence_separator_token", "disable_concat_sequences"
# Entries of a dictionary's metadata that are flags of a training, too.
RECORDED_OF_TEXT = (
    "dataset_path",
    "context_size",
    "prepend_bos",
    "exclude_special_tokens",
    "seqpos_slice",
    SEPARATOR,
    SHORT_LEFT_OUT,
)
RECORDED_OF_HOOK = ("hook_head_index",)


@dataclass(frozen=True)
class InitialMetrics:
    """The pretrained dictionary's metrics on the first batches, before training.

    Attributes:
        l0, fvu: as `evaluation.metrics.Metrics` defines them.
        target_l0: the L0 that training holds; None with a fixed coefficient.
        scale: the factor of activations in training; None if they are not scaled.
    """

    l0: float
    fvu: float
    target_l0: float | None
    scale: float | None


class FinetuningRunner(JumpReLUTrainingRunner):
    """Finetunes a pretrained SAE on a hook of a language model.

    Args:
        source: the SAE's folder, or Gemma Scope's params.npz.
        cfg: SAELens' runner config. In `cfg.sae`, the dictionary's widths and its
            `apply_b_dec_to_input` replace the given ones. Without `target_l0` and
            `l0_coefficient`, training holds the dictionary's L0. Dead latents are resampled only if
            `resample_dead_latents` is True, because a latent that does not fire on this text may
            fire on another.
        log: called with one line about the initial metrics.
        override_dataset, override_model, metrics_path, save_buffer: as in `JumpReLUTrainingRunner`.
        checkpoint_every_n_minutes: as there.

    Attributes:
        initial_metrics: the dictionary's metrics before training; None before `run`.

    Raises:
        ValueError: the source holds no usable SAE (`read_pretrained`), its width is not the hook's,
            the input normalization cannot be folded, `cfg` names other weights or another target L0
            than the checkpoint to resume, or as in `JumpReLUTrainingRunner`.
        FileNotFoundError: the source does not exist.
    """

    initial_metrics: InitialMetrics | None = None

    def __init__(
        self,
        source: str | Path,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: Any = None,
        override_model: Any = None,
        metrics_path: str | Path | None = None,
        save_buffer: bool = True,
        checkpoint_every_n_minutes: float = DEFAULT_MINUTES,
        log: Callable[[str], None] = logger.info,
    ):
        self.source, self.log = Path(source), log
        dictionary = read_pretrained(source, hook_name=cfg.hook_name, model_name=cfg.model_name)
        cfg = copy.copy(cfg)  # what is given may be the config of the next run too
        cfg.sae = _for_dictionary(cfg.sae, dictionary)
        _refuse_other_weights(cfg, self.source)
        require_what_a_run_needs(cfg)
        refuse_used_output_folder(cfg.output_path)
        if cfg.resume_from_checkpoint == AUTO:
            cfg = resolve_auto(cfg, finetuned_from=str(self.source))
        refuse_wrong_checkpoint(cfg)
        if cfg.resume_from_checkpoint is not None:
            _take_target(cfg.sae, cfg.resume_from_checkpoint)
        loads_everything = override_model is None and override_dataset is None
        model = language_model(cfg) if override_model is None else override_model
        _refuse_wrong_width(model, cfg, dictionary)
        self._parameters = dictionary.parameters
        self._norms = decoder_norms(dictionary.parameters)
        self._scaler = ActivationScaler()
        with quiet() if loads_everything else nullcontext():
            super().__init__(
                cfg,
                override_dataset,
                model,
                _training_sae(cfg.sae),
                metrics_path,
                save_buffer,
                checkpoint_every_n_minutes=checkpoint_every_n_minutes,
            )

    @override
    def run(self) -> Any:
        if self.cfg.resume_from_checkpoint is None:
            self._load_pretrained()
        self.sae.cfg.metadata.finetuned_from = str(self.source)
        return super().run()

    @override
    def preflight(self) -> Preflight:
        """Without a word about `lr`: weights that are there want a lower one than new ones."""
        report = super().preflight()
        findings = tuple(finding for finding in report.findings if finding.name != "lr")
        return dataclasses.replace(report, findings=findings)

    @override
    def activation_scaler(self) -> ActivationScaler:
        return self._scaler

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        sae = super().run_trainer_with_interruption_handling(trainer)
        restore_decoder_norms_(sae, self._norms)
        return sae

    def _load_pretrained(self) -> None:
        """Load the parameters in the scale of the first batches, and measure and log them there."""
        batches = self._first_batches()
        scale = self._scaler.scaling_factor
        unit_rows = self.sae.cfg.resolve().unit_norm_decoder
        parameters = rescale(self._parameters, scale or 1.0, unit_rows=unit_rows)
        load_parameters_(self.sae, parameters)
        l0, fvu = self._measure([self._scaler.scale(batch) for batch in batches])
        if self.sae.cfg.controls_l0 and self.cfg.sae.target_l0 is None:
            if l0 == 0:
                raise ValueError(
                    f"no latent of {self.source} fires on the activations of {self.cfg.hook_name}, "
                    "so there is no L0 to hold: was it trained on this hook of this model? If so, "
                    "give target_l0"
                )
            self.cfg.sae.target_l0 = l0
            self.sae = _training_sae(self.cfg.sae).to(self.cfg.device)
            load_parameters_(self.sae, parameters)
        target = self.cfg.sae.target_l0 if self.sae.cfg.controls_l0 else None
        self.initial_metrics = InitialMetrics(l0, fvu, target, scale)
        self.log(_summary(self.initial_metrics))
        if fvu >= 1:
            logger.warning(
                f"{self.source} reconstructs the activations of {self.cfg.hook_name} worse than "
                f"their mean (FVU {fvu:.3g}): was it trained on this hook of this model?"
            )

    def _first_batches(self) -> list[Tensor]:
        """Estimate the input scale, and return the first of the batches it is estimated on."""
        first: list[Tensor] = []

        def batches() -> Any:
            while True:
                batch = next(self.activations_store)
                if len(first) < MEASURED_BATCHES:
                    first.append(batch)
                yield batch

        if self.sae.cfg.normalize_activations == "expected_average_only_in":
            self._scaler.estimate_scaling_factor(
                self.sae.cfg.d_in, batches(), self.cfg.n_batches_for_norm_estimate
            )
        else:
            next(batches())
        return first

    @torch.no_grad()
    def _measure(self, batches: list[Tensor]) -> tuple[float, float]:
        metrics = StreamingMetrics()
        for x in batches:
            x = x.to(self.sae.device)
            acts = self.sae.encode(x)
            metrics.update(x, self.sae.decode(acts), acts)
        result = metrics.compute()
        return result.l0, result.fvu


def pretrained_flags(source: str | Path, flags: list[str]) -> list[str]:
    """What the dictionary's files say, as flags of `jumprelu train`.

    Its widths, hook and model, and what its metadata records of the model and the text: the
    model's class and keyword arguments, the hook's head, the dataset, and how sequences are made
    and which of their tokens are read.

    Args:
        source: the SAE's folder, or Gemma Scope's params.npz.
        flags: the user's flags, which must name the hook and the model if the files do not. What
            was recorded for another model than theirs is left out.

    Raises:
        ValueError: neither the files nor the flags name the hook or the model, or as in
            `read_pretrained`.
        FileNotFoundError: the source does not exist.
    """
    dictionary = read_pretrained(source)
    names = {flag.partition("=")[0] for flag in flags}
    values: dict[str, Any] = {
        "d_in": dictionary.parameters.d_in,
        "d_sae": dictionary.parameters.d_sae,
        "hook_name": dictionary.hook_name,
        "model_name": dictionary.model_name,
    }
    _refuse_other_shape(source, dictionary, flags)
    for name, value in values.items():
        if value is None and f"--{name}" not in names:
            raise ValueError(f"the files of {source} do not name it: give --{name}")
    other_model = "--model_name" in names
    recorded = (*RECORDED_OF_TEXT, "model_from_pretrained_kwargs")
    recorded += () if other_model else ("model_class_name",)
    recorded += () if "--hook_name" in names else RECORDED_OF_HOOK
    metadata = dictionary.metadata
    if metadata.get(SEPARATOR, "") is None:
        metadata = {**metadata, SEPARATOR: "none"}  # and not SAELens' default
    if "--dataset_path" not in names and not metadata.get("dataset_path"):
        # The demo extra's rows are given: nothing says how they are made.
        recorded = tuple(name for name in recorded if name not in (SEPARATOR, SHORT_LEFT_OUT))
    keywords = recorded_keywords(metadata, other_model=other_model)
    metadata = {**metadata, "model_from_pretrained_kwargs": keywords}
    values |= {name: metadata.get(name) for name in recorded}
    # In one word: a value of its own that begins with - would be taken for a flag.
    return [
        f"--{name}={_flag_text(value)}"
        for name, value in values.items()
        if value is not None and value != {}
    ]


def _refuse_other_shape(source: str | Path, dictionary: Dictionary, flags: list[str]) -> None:
    """Raise ValueError for a flag that would change what the weights are."""
    parameters = dictionary.parameters
    own = {
        "--d_in": parameters.d_in,
        "--d_sae": parameters.d_sae,
        "--apply_b_dec_to_input": parameters.subtracts_b_dec,
    }
    for place, flag in enumerate(flags):
        name, _, text = flag.partition("=")
        if name in own:
            given = text or next(iter(flags[place + 1 : place + 2]), "")
            if given.lower() != str(own[name]).lower():
                raise ValueError(
                    f"{name} is {given}, and the dictionary in {source} has {own[name]}: leave it "
                    "out, or train a new one with jumprelu train"
                )


def _flag_text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _for_dictionary(cfg: Any, dictionary: Dictionary) -> JumpReLUTrainingSAEConfig:
    """The config with the fields that the dictionary determines.

    Raises:
        ValueError: the architecture is not `jumprelu`, or the input normalization cannot be folded.
    """
    if cfg.architecture() != "jumprelu":
        raise ValueError(
            f"the architecture is {cfg.architecture()!r}; a pretrained SAE is finetuned as "
            "'jumprelu'"
        )
    if cfg.normalize_activations not in NORMALIZATIONS:
        raise ValueError(
            f"normalize_activations is {cfg.normalize_activations!r}; expected "
            f"{' or '.join(NORMALIZATIONS)}, because the finetuned SAE reads raw activations again "
            "and only these can be folded into its parameters"
        )
    parameters = dictionary.parameters
    cfg = as_plugin_config(cfg)
    return dataclasses.replace(
        cfg,
        d_in=parameters.d_in,
        d_sae=parameters.d_sae,
        apply_b_dec_to_input=parameters.subtracts_b_dec,
        resample_dead_latents=bool(cfg.resample_dead_latents),
    )


def _training_sae(cfg: JumpReLUTrainingSAEConfig) -> JumpReLUTrainingSAE:
    """The SAE to load parameters into, with target L0 1 until the dictionary's L0 is known."""
    if cfg.controls_l0 and cfg.target_l0 is None:
        cfg = dataclasses.replace(cfg, target_l0=1.0)
    return JumpReLUTrainingSAE(dataclasses.replace(cfg))


def _refuse_other_weights(cfg: Any, source: Path) -> None:
    if cfg.from_pretrained_path is not None:
        raise ValueError(
            f"from_pretrained_path is {cfg.from_pretrained_path}, and finetuning starts from the "
            f"weights of {source}: leave it out, or give that folder as the SAE to finetune"
        )


def _take_target(sae: JumpReLUTrainingSAEConfig, checkpoint: str) -> None:
    """Have a run that names no target L0 hold its checkpoint's.

    Raises:
        ValueError: it names another.
    """
    target = _checkpoint_target(checkpoint)
    if not sae.controls_l0 or target is None:
        return
    if sae.target_l0 not in (None, target):
        raise ValueError(
            f"target_l0 is {sae.target_l0:g}, and the checkpoint {checkpoint} trains for "
            f"{target:g}: leave target_l0 out to go on with that, or start anew without "
            "resume_from_checkpoint"
        )
    sae.target_l0 = target


def _checkpoint_target(checkpoint: str) -> float | None:
    target = read_json(Path(checkpoint, SAE_CFG_FILENAME)).get("target_l0")
    if target is not None and not (is_number(target) and target > 0):
        raise ValueError(
            f"{Path(checkpoint, SAE_CFG_FILENAME)} has target_l0 {target!r}; expected a positive "
            "number: resume from another checkpoint"
        )
    return target


def _refuse_wrong_width(model: Any, cfg: Any, dictionary: Dictionary) -> None:
    if cfg.hook_name not in model.hook_dict:
        return  # the runner refuses unknown hooks
    head = cfg.hook_head_index
    heads = None if head is None else {cfg.hook_name: head}
    width = hook_widths(model, [cfg.hook_name], heads)[cfg.hook_name]
    d_in = dictionary.parameters.d_in
    if width != d_in:
        raise ValueError(
            f"the dictionary reads activations {d_in} wide, and those at {cfg.hook_name} of "
            f"{cfg.model_name} are {width} wide: set hook_name and model_name to those it was "
            "trained on"
        )


def _summary(initial: InitialMetrics) -> str:
    target = "" if initial.target_l0 is None else f"; target L0 {initial.target_l0:.4g}"
    return f"the pretrained dictionary: L0 {initial.l0:.4g}, FVU {initial.fvu:.4g}{target}"
