"""Hooks, text and config of transcoders of the tiny model."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from jumprelu_plugin.saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig,
    JumpReLUTrainingTranscoderConfig,
)
from tests.tiny import D_MODEL, tiny_tokens

LN, OUT, MID, Z = "ln2.hook_normalized", "hook_mlp_out", "hook_resid_mid", "attn.hook_z"
POSITIONS = 17


def text(sequences: int = 97) -> Dataset:
    return Dataset.from_dict({"tokens": tiny_tokens(sequences, POSITIONS).tolist()})


def transcoder_config(skip: bool = False, **changes: Any) -> JumpReLUTrainingTranscoderConfig:
    kind = JumpReLUTrainingSkipTranscoderConfig if skip else JumpReLUTrainingTranscoderConfig
    fields = {"d_in": D_MODEL, "d_sae": 59, "target_l0": 7, "hook_name_out": f"blocks.1.{OUT}"}
    return kind(**{**fields, **changes})
