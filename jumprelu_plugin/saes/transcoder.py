"""The training transcoders behind `jumprelu_transcoder` and `jumprelu_skip_transcoder`.

    f = JumpReLU_θ(x W_enc + b_enc),     ŷ = f W_dec + b_dec  (+ x W_skipᵀ)

A subclass of the training SAE: the same step, sparsity control and calibration, with another
target. A batch's rows hold both sides, [x ‖ y]: SAELens' trainer hands one tensor to a step, and
rows keep the two sides of a token together through shuffling. What is saved is the folder of
SAELens' own inference class of the same name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from jumprelu_plugin.control.calibration import output_directions
from jumprelu_plugin.control.decoder_norm import normalize_rows_
from jumprelu_plugin.control.resampling import unusual_inputs
from jumprelu_plugin.control.units import set_value
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.parameters import PairScale, fold_scales_
from jumprelu_plugin.saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig,
    JumpReLUTrainingTranscoderConfig,
)
from jumprelu_plugin.saes.validation import TRANSCODER_RULES


class JumpReLUTrainingTranscoder(JumpReLUTrainingSAE):
    """A JumpReLU transcoder in training (arXiv 2406.11944; Gemma Scope, arXiv 2408.05147).

    Shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], threshold
    [d_sae]. A training step takes rows [batch, d_in + d_out] and returns the target as its
    `sae_in`, which is what SAELens' metrics compare the output with.

    Raises:
        ValueError: on construction, if the config cannot train; on a step, if the rows have
            another width or hold NaN or infinite values.
    """

    cfg: JumpReLUTrainingTranscoderConfig  # type: ignore[assignment]

    rules = TRANSCODER_RULES
    # `training.activations.scaler.PairScaler` does it, for both sides.
    standardizes_itself = False

    @override
    def initialize_weights(self) -> None:
        """He-uniform encoder and decoder, drawn apart: the two spaces have nothing in common.

        The decoder's rows then get the norm `decoder_init_norm`, or 1 where they are held at 1.
        """
        d_in, d_sae, d_out = self.cfg.d_in, self.cfg.d_sae, self.cfg.width_out
        where: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        # Stored by latent before it is drawn: shards of it draw latent by latent.
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, **where).t())
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out, **where))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **where))
        self.b_dec = nn.Parameter(torch.zeros(d_out, **where))
        nn.init.kaiming_uniform_(self.W_enc.data.t())  # fan_in: d_in
        nn.init.kaiming_uniform_(self.W_dec.data)
        if self.resolved.unit_norm_decoder:
            normalize_rows_(self.W_dec.data)
        elif self.cfg.decoder_init_norm is not None:
            normalize_rows_(self.W_dec.data)
            self.W_dec.data *= self.cfg.decoder_init_norm

    # ---------------------------------------------------------------- one step

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        expected = self.cfg.d_in + self.cfg.width_out
        found = step_input.sae_in.shape[-1]
        if found != expected:
            raise ValueError(
                f"a transcoder trains on rows [input ‖ output], d_in + d_out = {self.cfg.d_in} + "
                f"{self.cfg.width_out} = {expected} wide, and got rows {found} wide. SAELens' own "
                "runner reads one hook alone: train with jumprelu_plugin."
                "JumpReLUTrainingRunner or `jumprelu train`, which read both in one forward pass"
            )
        return super().training_forward_pass(step_input)

    @override
    def input_and_target(
        self, rows: Float[Tensor, "batch d_in+d_out"]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        # Copied apart: the sparse products read whole rows, and half a row is not contiguous.
        source, target = rows.split([self.cfg.d_in, self.cfg.width_out], dim=1)
        return source.contiguous(), target.contiguous()

    @override
    def calibrate(self, rows: Float[Tensor, "batch d_in+d_out"]) -> None:
        """As an SAE, and b_dec at the target's mean, decoder rows along what their latents see."""
        super().calibrate(rows)
        if self.has_loaded_weights:
            return
        source, target = self.input_and_target(rows)
        mean = target.mean(0)
        set_value(self, "b_dec", mean)
        z = self.normalized_input(source) @ self.W_enc + self.b_enc
        rows, fires = output_directions(z, self.threshold, (target - mean).to(z.dtype))
        norms = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.data[fires] = (rows * norms)[fires].to(self.dtype)

    @override
    def resampling_directions(
        self, x: Tensor, residual: Tensor, tokens: Tensor
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " d_in"]]:
        return unusual_inputs(x, residual, tokens)

    # ---------------------------------------------------------------- inference

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        return self.normalized_input(sae_in)

    # ---------------------------------------------------------------- folding, saving

    @override
    def fold_activation_norm_scaling_factor(
        self, scaling_factor: float | tuple[float, float] | PairScale
    ) -> None:
        """Make the weights take and give raw activations.

        Args:
            scaling_factor: what inputs and targets were multiplied by in training: one number for
                both, or one for each, with the centers that were subtracted before.
        """
        self.store_plainly()
        fold_scales_(self, *_pair(scaling_factor))
        self.cfg.normalize_activations = "none"

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write the folder of SAELens' inference class.

        Raises:
            ValueError: the scales of input and target are not folded yet.
        """
        if self.cfg.normalize_activations != "none":
            raise ValueError(
                "this transcoder's weights expect scaled inputs: training is not over, or it was "
                "loaded from a checkpoint. Finish the run, or fold the two numbers that "
                "activation_scaler.json holds: transcoder.fold_activation_norm_scaling_factor("
                "(scale_in, scale_out))"
            )
        return super().save_inference_model(path)


class JumpReLUTrainingSkipTranscoder(JumpReLUTrainingTranscoder):
    """As `JumpReLUTrainingTranscoder`, with W_skip [d_out, d_in], which starts at zero."""

    cfg: JumpReLUTrainingSkipTranscoderConfig  # type: ignore[assignment]

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        shape = (self.cfg.width_out, self.cfg.d_in)
        self.W_skip = nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.device))

    @override
    def decoder_offset(self, x: Tensor, b_dec: Tensor) -> Tensor:
        return torch.addmm(b_dec, x, self.W_skip.t().to(x.dtype))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.to(self.dtype) @ self.W_skip.t()


def _pair(scaling_factor: float | tuple[float, float] | PairScale) -> PairScale:
    if isinstance(scaling_factor, tuple | list):
        return PairScale.of(scaling_factor)
    return PairScale(scaling_factor, scaling_factor)
