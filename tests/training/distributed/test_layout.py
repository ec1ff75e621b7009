"""Latents dealt to shards: every latent once, every prefix evenly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.transcoder import JumpReLUTrainingTranscoder
from jumprelu_plugin.saes.transcoder_config import JumpReLUTrainingTranscoderConfig
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.distributed.sharded_sae import OwnRows


@pytest.mark.parametrize("prefixes", [(), (6,), (3, 12, 27)])
def test_parts_join_to_the_whole(prefixes: tuple[int, ...]) -> None:
    layout = LatentLayout(69, 3, prefixes)
    values = torch.randn(69, 7)
    parts = [layout.part(values, shard) for shard in range(3)]
    assert torch.equal(layout.join(parts), values)
    columns = [layout.part(values.t(), shard, axis=1) for shard in range(3)]
    assert all(torch.equal(c.t(), p) for c, p in zip(columns, parts, strict=True))


def test_every_shard_holds_its_share_of_every_prefix() -> None:
    layout = LatentLayout(69, 3, (3, 12, 27))
    latents = torch.arange(69)
    for shard in range(3):
        own = layout.part(latents, shard)
        for width, held in zip(layout.prefixes, layout.held_prefixes, strict=True):
            assert (own[:held] < width).all() and (own[held:] >= width).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((70, 3), "d_sae is 70, which model_parallel_size=3 does not divide.*such as 72"),
        ((69, 3, (4,)), "a Matryoshka prefix has 4 latents"),
    ],
)
def test_what_cannot_be_dealt_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentLayout(*arguments)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
        (JumpReLUTrainingTranscoder, JumpReLUTrainingTranscoderConfig),
    ],
    ids=["SAE", "transcoder"],
)
def test_a_shard_starts_as_its_part_of_the_whole(kind: Any, config: Any) -> None:
    layout = LatentLayout(69, 3, (3, 12))
    torch.manual_seed(5)
    whole = kind(config(d_in=13, d_sae=69, target_l0=4)).state_dict()
    for shard in range(3):
        torch.manual_seed(5)
        with OwnRows(layout, shard):
            own = kind(config(d_in=13, d_sae=layout.held, target_l0=4)).state_dict()
        for name, axis in {"W_enc": 1, "W_dec": 0}.items():
            assert torch.equal(own[name], layout.part(whole[name], shard, axis=axis)), name
