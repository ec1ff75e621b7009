"""Configs of transcoders that cannot train, and the registered classes."""

from __future__ import annotations

from typing import Any

import pytest
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

import jumprelu_plugin
from jumprelu_plugin.saes.transcoder import (
    JumpReLUTrainingSkipTranscoder,
    JumpReLUTrainingTranscoder,
)
from tests.saes.transcoders import make


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations"),
        ({"d_out": 0}, "d_out is 0"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"target_l0": None}, "target_l0"),
    ],
)
def test_a_config_that_cannot_train_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(False, **fields)


def test_both_architectures_are_registered_for_training_alone() -> None:
    stock = dict(SAE_CLASS_REGISTRY)
    names = ("jumprelu_transcoder", "jumprelu_skip_transcoder")
    jumprelu_plugin.unregister()
    try:
        assert not any(name in SAE_TRAINING_CLASS_REGISTRY for name in names)
    finally:
        jumprelu_plugin.register()
    ours = [SAE_TRAINING_CLASS_REGISTRY[name][0] for name in names]
    assert ours == [JumpReLUTrainingTranscoder, JumpReLUTrainingSkipTranscoder]
    assert stock == SAE_CLASS_REGISTRY
