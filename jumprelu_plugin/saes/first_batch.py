"""What a training SAE takes from its first batch: units, directions, biases, thresholds, bandwidth.

What the config gives, and what was loaded, stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.control.calibration import raise_to_fire, soft_whitening
from jumprelu_plugin.control.decoder_norm import normalize_rows_
from jumprelu_plugin.control.standardization import measure
from jumprelu_plugin.control.units import set_value
from jumprelu_plugin.saes.losses import token_weights

if TYPE_CHECKING:
    from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE

# Anthropic, Circuits Updates January 2025: each latent starts by firing on 10,000/d_sae of tokens.
ANTHROPIC_START_L0 = 10_000
# Of the first batch, that is enough to place a bias.
_BIAS_SAMPLE = 4096


@torch.no_grad()
def start_from(sae: JumpReLUTrainingSAE, sample: Float[Tensor, "batch d_in"]) -> None:
    """Set what a training starts from.

    Args:
        sample: the encoder's normalized input for one batch, finite.

    Raises:
        ValueError: the batch's activations, or pre-activations, are all the same.
    """
    cfg, loaded = sae.cfg, sae.has_loaded_weights
    if sae.standardizes_itself and sae.resolved.standardize_activations:
        _standardize(sae, sample)
    if (weights := token_weights(sae.resolved, sample, center(sae))) is not None:
        # One outlier in the batch would widen every latent's spread, and with it ε.
        sample = sample[weights == 1]
    if sae.standardization is not None:
        sae.whitening = soft_whitening(sample - sample.mean(0))
        if cfg.initialization == "saelens" and not loaded:
            _whiten_start(sae, sae.whitening)
    if cfg.apply_b_dec_to_input:
        if not loaded:
            set_value(sae, "b_dec", sample.mean(0))
        sample = sample - sae.b_dec
    z = sample @ full_precision(sae.W_enc) + sae.b_enc
    if cfg.initialization == "anthropic" and not loaded:
        share = ANTHROPIC_START_L0 / sae.resolved.d_sae
        raised = raise_to_fire(z[:_BIAS_SAMPLE], sae.threshold, share)
        set_value(sae, "b_enc", sae.b_enc + raised)
        z = z + raised
    sae.control.calibrate(sae, z, keep_thresholds=loaded)


def center(sae: JumpReLUTrainingSAE) -> Float[Tensor, " d_in"] | None:
    """Where the normalized input has its center, if that is measured."""
    found = sae.standardization
    return None if found is None else found.center.to(sae.device)


def target_center(sae: JumpReLUTrainingSAE) -> Float[Tensor, " d_out"] | None:
    """The same for the target, which SAELens normalizes for the encoder alone."""
    per_token = sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
    return None if per_token else center(sae)


def full_precision(tensor: Tensor) -> Tensor:
    """Half-precision tensors as float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _standardize(sae: JumpReLUTrainingSAE, sample: Float[Tensor, "batch d_in"]) -> None:
    """Work in units of the sample's center and spread, with what the config gives in them."""
    found, given = measure(sample), sae.resolved
    sae.standardize(found)
    if given.jumprelu_bandwidth:
        sae.control.bandwidth = found.scale * given.jumprelu_bandwidth
    if given.jumprelu_init_threshold and not sae.has_loaded_weights:
        threshold = found.scale * given.jumprelu_init_threshold
        set_value(sae, "threshold", torch.full_like(sae.threshold, threshold))


def _whiten_start(sae: JumpReLUTrainingSAE, whitening: Float[Tensor, "d_in d_in"]) -> None:
    """Turn the random directions it starts from away from what dominates the data."""
    norms = sae.W_dec.norm(dim=1, keepdim=True)
    rows = sae.W_dec.data @ whitening.to(sae.W_dec)
    normalize_rows_(rows)
    sae.W_dec.data.copy_(norms * rows)
    sae.W_enc.data.copy_((sae.W_enc.norm(dim=0)[:, None] * rows).t())
