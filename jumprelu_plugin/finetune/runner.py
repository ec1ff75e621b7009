"""Training goes on from a dictionary that somebody released.

`FinetuningRunner` is `JumpReLUTrainingRunner` with a dictionary to start from: a Gemma Scope
`params.npz` or any SAELens JumpReLU folder, ours or not. The first batches give the input scale, as
in every training, and the L0 that the dictionary has there, which is the target where none is set.
The dictionary's parameters are converted to that scale (`pretrained.py`), trained, folded, and saved
as a stock folder in the units they came in. Before the first update the training SAE computes what
the released one does.
"""

from __future__ import annotations

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
from jumprelu_plugin.finetune import pretrained as released
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.hooks import hook_widths
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig, as_plugin_config
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.training.runner import (
    JumpReLUTrainingRunner,
    language_model,
    quiet,
    refuse_used_output_folder,
)
from jumprelu_plugin.training.starting_weights import refuse_wrong_checkpoint

# L0 and FVU at the start are measured on this many batches.
MEASURED_BATCHES = 4
NORMALIZATIONS = ("none", "expected_average_only_in")


@dataclass(frozen=True)
class Start:
    """What the released dictionary does on the first batches, before anything is trained.

    Attributes:
        l0, fvu: as `evaluation.metrics.Metrics` defines them.
        target_l0: what is trained for; None with a fixed coefficient.
        scale: what activations are multiplied by in training; None where they are not.
    """

    l0: float
    fvu: float
    target_l0: float | None
    scale: float | None


class FinetuningRunner(JumpReLUTrainingRunner):
    """Train a released SAE further on a hook of a language model.

    Args:
        source: its folder, or Gemma Scope's params.npz.
        cfg: SAELens' runner config; `cfg.sae` says how to train. Its widths and
            `apply_b_dec_to_input` are the dictionary's, whatever it holds. Without `target_l0` and
            `l0_coefficient` the training holds the L0 the dictionary has. Dead latents restart only
            where `resample_dead_latents` is True: a latent that this text does not wake is not dead.
        log: takes one line about the start.
        override_dataset, override_model, metrics_path, save_buffer: as in `JumpReLUTrainingRunner`.

    Raises:
        ValueError: the source holds no usable SAE (`released.read`), its width is not the hook's,
            another input normalisation is asked for, and as `JumpReLUTrainingRunner` does.
        FileNotFoundError: there is no such source.
    """

    start: Start | None = None

    def __init__(
        self,
        source: str | Path,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: Any = None,
        override_model: Any = None,
        metrics_path: str | Path | None = None,
        save_buffer: bool = True,
        log: Callable[[str], None] = logger.info,
    ):
        self.source, self.log = Path(source), log
        dictionary = released.read(source, hook_name=cfg.hook_name, model_name=cfg.model_name)
        cfg.sae = _for_dictionary(cfg.sae, dictionary)
        refuse_used_output_folder(cfg.output_path)
        refuse_wrong_checkpoint(cfg.resume_from_checkpoint, cfg.sae)
        if cfg.resume_from_checkpoint is not None:
            cfg.sae.target_l0 = _target_of(cfg.resume_from_checkpoint)
        ours = override_model is None and override_dataset is None
        model = language_model(cfg) if override_model is None else override_model
        _refuse_wrong_width(model, cfg, dictionary)
        self._parameters = dictionary.parameters
        self._norms = released.decoder_norms(dictionary.parameters)
        self._scaler = ActivationScaler()
        with quiet() if ours else nullcontext():
            super().__init__(
                cfg, override_dataset, model, _training_sae(cfg.sae), metrics_path, save_buffer
            )

    @override
    def run(self) -> Any:
        if self.cfg.resume_from_checkpoint is None:
            self._enter()
        self.sae.cfg.metadata.continued_from = str(self.source)
        return super().run()

    @override
    def activation_scaler(self) -> ActivationScaler:
        return self._scaler

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        sae = super().run_trainer_with_interruption_handling(trainer)
        released.restore_norms_(sae, self._norms)
        return sae

    def _enter(self) -> None:
        """Convert the dictionary to the scale of the first batches, and say what it does there."""
        batches = self._first_batches()
        scale = self._scaler.scaling_factor
        unit_rows = self.sae.cfg.resolve().unit_norm_decoder
        parameters = released.scaled(self._parameters, scale or 1.0, unit_rows=unit_rows)
        released.load_(self.sae, parameters)
        l0, fvu = self._measure([self._scaler.scale(batch) for batch in batches])
        if self.sae.cfg.controls_l0 and self.cfg.sae.target_l0 is None:
            if l0 == 0:
                raise ValueError(
                    f"no latent of {self.source} fires on the activations of {self.cfg.hook_name}, "
                    "so it has no L0 to hold: is it this hook's and this model's? If so, give "
                    "target_l0"
                )
            self.cfg.sae.target_l0 = l0
            self.sae = _training_sae(self.cfg.sae).to(self.cfg.device)
            released.load_(self.sae, parameters)
        target = self.cfg.sae.target_l0 if self.sae.cfg.controls_l0 else None
        self.start = Start(l0, fvu, target, scale)
        self.log(_in_words(self.start))
        if fvu >= 1:
            logger.warning(
                f"{self.source} rebuilds the activations of {self.cfg.hook_name} worse than their "
                f"mean would (FVU {fvu:.3g}): is it this hook's and this model's?"
            )

    def _first_batches(self) -> list[Tensor]:
        """Activations to measure the dictionary on; on the way the scale is estimated."""
        kept: list[Tensor] = []

        def keeping() -> Any:
            while True:
                batch = next(self.activations_store)
                if len(kept) < MEASURED_BATCHES:
                    kept.append(batch)
                yield batch

        if self.sae.cfg.normalize_activations == "expected_average_only_in":
            self._scaler.estimate_scaling_factor(
                self.sae.cfg.d_in, keeping(), self.cfg.n_batches_for_norm_estimate
            )
        else:
            next(keeping())
        return kept

    @torch.no_grad()
    def _measure(self, batches: list[Tensor]) -> tuple[float, float]:
        metrics = StreamingMetrics()
        for x in batches:
            x = x.to(self.sae.device)
            acts = self.sae.encode(x)
            metrics.update(x, self.sae.decode(acts), acts)
        found = metrics.compute()
        return found.l0, found.fvu


def flags(source: str | Path, given: list[str]) -> list[str]:
    """What the dictionary says of itself, as flags of `jumprelu train`.

    Args:
        given: the user's own flags; the hook and the model are taken from them where the files do
            not say.

    Raises:
        ValueError: neither says the hook or the model, and as `released.read` does.
        FileNotFoundError: there is no such source.
    """
    dictionary = released.read(source)
    parameters = dictionary.parameters
    said = {
        "--d_in": parameters.d_in,
        "--d_sae": parameters.d_sae,
        "--hook_name": dictionary.hook_name,
        "--model_name": dictionary.model_name,
    }
    for name, value in said.items():
        if value is None and not any(flag.partition("=")[0] == name for flag in given):
            raise ValueError(f"{source} does not say it: give {name}")
    return [text for name, value in said.items() if value for text in (name, str(value))]


def _for_dictionary(cfg: Any, dictionary: Dictionary) -> JumpReLUTrainingSAEConfig:
    """The config with what the dictionary decides.

    Raises ValueError for an input normalisation that cannot be undone exactly.
    """
    if cfg.architecture() != "jumprelu":
        raise ValueError(
            f"the architecture to train is {cfg.architecture()!r}; a released SAE is trained "
            "further as 'jumprelu'"
        )
    if cfg.normalize_activations not in NORMALIZATIONS:
        raise ValueError(
            f"normalize_activations is {cfg.normalize_activations!r}: a released SAE reads raw "
            f"activations, and only {' or '.join(NORMALIZATIONS)} can be folded out of them again"
        )
    parameters = dictionary.parameters
    cfg = as_plugin_config(cfg)
    # Which latents of a released dictionary come first means nothing.
    nested = cfg.matryoshka_widths is not None or cfg.matryoshka_loss_weight is not None
    return dataclasses.replace(
        cfg,
        matryoshka_loss_weight=cfg.matryoshka_loss_weight if nested else 0.0,
        d_in=parameters.d_in,
        d_sae=parameters.d_sae,
        apply_b_dec_to_input=parameters.subtracts_b_dec,
        resample_dead_latents=bool(cfg.resample_dead_latents),
    )


def _training_sae(cfg: JumpReLUTrainingSAEConfig) -> JumpReLUTrainingSAE:
    """The SAE to load parameters into; any target will do until the dictionary's L0 is known."""
    if cfg.controls_l0 and cfg.target_l0 is None:
        cfg = dataclasses.replace(cfg, target_l0=1.0)
    return JumpReLUTrainingSAE(dataclasses.replace(cfg))


def _target_of(checkpoint: str) -> float | None:
    return json.loads(Path(checkpoint, SAE_CFG_FILENAME).read_text()).get("target_l0")


def _refuse_wrong_width(model: Any, cfg: Any, dictionary: Dictionary) -> None:
    if cfg.hook_name not in model.hook_dict:
        return  # the runner says which hooks there are
    one_head = () if cfg.hook_head_index is None else (cfg.hook_name,)
    width = hook_widths(model, [cfg.hook_name], one_head)[cfg.hook_name]
    d_in = dictionary.parameters.d_in
    if width != d_in:
        raise ValueError(
            f"the dictionary reads activations {d_in} wide, and those at {cfg.hook_name} of "
            f"{cfg.model_name} are {width} wide: give the hook and the model it was trained on "
            "(hook_name, model_name)"
        )


def _in_words(start: Start) -> str:
    held = "" if start.target_l0 is None else f"; trained for L0 {start.target_l0:.4g}"
    return f"the released dictionary: L0 {start.l0:.4g}, FVU {start.fvu:.4g}{held}"
