"""The widths of a model's activations, read from one short forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from jumprelu_plugin.models.firing import hook_widths
from tests.tiny import D_HEAD, D_MODEL, HEADS, MLP, N_HEADS, RESIDUAL, tiny_models


def test_widths_come_in_the_order_in_which_hooks_fire(tmp_path: Path) -> None:
    models = tiny_models(tmp_path)
    for model in (models.hooked, models.bridge):
        widths = hook_widths(model, [RESIDUAL, MLP, HEADS])
        assert list(widths.items()) == [
            (HEADS, N_HEADS * D_HEAD),
            (MLP, D_MODEL),
            (RESIDUAL, D_MODEL),
        ]
        assert hook_widths(model, [HEADS], {HEADS: 2}) == {HEADS: D_HEAD}
        for head in (-1, N_HEADS):
            with pytest.raises(ValueError, match=rf"index is {head}, .* {N_HEADS} heads: give 0"):
                hook_widths(model, [HEADS], {HEADS: head})
    with pytest.raises(ValueError, match="exists but does not fire"):
        hook_widths(models.hooked, ["blocks.1.attn.hook_result"])
