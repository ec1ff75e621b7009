"""Random stock SAELens dictionaries to export: prime sizes, nothing zero, nothing one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
)

D_IN, D_OUT, D_SAE = 31, 23, 67
NORMED, RESID, MLP_OUT = "ln2.hook_normalized", "hook_resid_post", "hook_mlp_out"


def randomised(sae: Any, seed: int) -> Any:
    """Random parameters of different sizes; thresholds from 0.2 to 1.2."""
    generator = torch.Generator().manual_seed(seed)
    scales = {"W_enc": 0.5, "W_dec": 0.4, "b_enc": 0.3, "b_dec": 1.7, "W_skip": 0.2}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name == "threshold":
                parameter.copy_(0.2 + torch.rand(parameter.shape, generator=generator))
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scales[name] * noise)
    return sae.eval()


def random_sae(
    hook: str = f"blocks.2.{RESID}",
    *,
    d_in: int = D_IN,
    d_sae: int = D_SAE,
    model: str = "gemma-2-2b",
    subtract: bool = True,
    seed: int = 3,
) -> JumpReLUSAE:
    config = JumpReLUSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        apply_b_dec_to_input=subtract,
        reshape_activations="hook_z" if hook.endswith("hook_z") else "none",
        metadata=SAEMetadata(hook_name=hook, model_name=model, context_size=37),
    )
    return randomised(JumpReLUSAE(config), seed)


def random_transcoder(
    layer: int = 2,
    *,
    skip: bool = False,
    d_in: int = D_IN,
    d_out: int = D_IN,
    d_sae: int = D_SAE,
    hook_in: str = NORMED,
    hook_out: str = MLP_OUT,
    model: str = "gemma-2-2b",
    seed: int = 5,
) -> Any:
    config_class = JumpReLUSkipTranscoderConfig if skip else JumpReLUTranscoderConfig
    config = config_class(
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(
            hook_name=f"blocks.{layer}.{hook_in}",
            hook_name_out=f"blocks.{layer}.{hook_out}",
            model_name=model,
        ),
    )
    transcoder_class = JumpReLUSkipTranscoder if skip else JumpReLUTranscoder
    return randomised(transcoder_class(config), seed)


def saved(sae: Any, folder: Path) -> Path:
    sae.save_model(folder)
    return folder


def needs(module: str) -> None:
    """Skip a test whose target tool is not installed, saying how to install it."""
    pytest.importorskip(
        module, reason=f"{module} is not installed: tools/circuit_env.sh builds where it is"
    )
