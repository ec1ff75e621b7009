"""The recipe of Gemma Scope's transcoders."""

from __future__ import annotations

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from jumprelu_plugin.recipes import GEMMA_SCOPE_TRANSCODER
from jumprelu_plugin.saes.transcoder import JumpReLUTrainingTranscoder
from tests.saes.transcoders import D_IN, D_OUT, D_SAE, batches


def test_gemma_scope_s_recipe() -> None:
    cfg = GEMMA_SCOPE_TRANSCODER.sae_config(D_IN, D_SAE, d_out=D_OUT)
    sae = JumpReLUTrainingTranscoder(cfg)
    assert sae.bandwidth == pytest.approx(0.001 * D_IN**0.5)
    torch.testing.assert_close(sae.threshold.detach(), torch.full((D_SAE,), 0.001 * D_IN**0.5))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    square = JumpReLUTrainingTranscoder(GEMMA_SCOPE_TRANSCODER.sae_config(D_IN, D_SAE))
    assert not torch.allclose(square.W_enc, square.W_dec.T, atol=0.1)  # not a transposed start
    step = TrainStepInput(batches(1)[0], {"l0": cfg.l0_coefficient or 0.0}, None, 0, False)
    sae.training_forward_pass(step).loss.backward()
    assert sae.b_dec.count_nonzero() == 0  # no data-dependent start
    assert sae.control.l0 is None


def test_a_target_leaves_no_penalty_to_warm_up() -> None:
    held = {"l0_coefficient": None, "target_l0": 7.0, "d_out": D_OUT}
    cfg = GEMMA_SCOPE_TRANSCODER.sae_config(D_IN, D_SAE, **held)
    assert cfg.l0_warm_up_steps == 0
    assert JumpReLUTrainingTranscoder(cfg).control.l0 is not None
    fixed = GEMMA_SCOPE_TRANSCODER.sae_config(D_IN, D_SAE, d_out=D_OUT)
    assert fixed.l0_warm_up_steps == 10_000
