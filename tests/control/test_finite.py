"""The refusal of a step that is not finite, at once or before its update."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.control.finite import FiniteCheck, LastCheck

HOOK = "blocks.1.hook_mlp_out"


def check(loss: float, *, b_enc: float = 0.3, rows: Tensor | None = None) -> FiniteCheck:
    dictionary = SimpleNamespace(b_enc=torch.full((7,), b_enc), threshold=torch.full((7,), 0.2))
    rows = torch.ones(3, 5) if rows is None else rows
    remedies = {"input_remedy": "run in float32", "remedy": "lower lr"}
    return FiniteCheck(torch.tensor(loss), [dictionary], {HOOK: rows}, 41, **remedies)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_cause_is_named(bad: float) -> None:
    check(1.75)()
    with pytest.raises(ValueError, match="step 41.*the training diverged; lower lr"):
        check(bad)()
    with pytest.raises(ValueError, match="the loss became 1.75.*diverged"):
        check(1.75, b_enc=bad)()
    with pytest.raises(ValueError, match=rf"{HOOK} hold NaN or infinite.*step 41.*run in float32"):
        check(bad, rows=torch.tensor([[0.1, bad]]))()


def test_a_check_for_later_is_read_once() -> None:
    last = LastCheck()
    last.begin(check(math.nan), later=True)
    with pytest.raises(ValueError, match="diverged"):
        last.finish()
    last.finish()
    with pytest.raises(ValueError, match="diverged"):
        last.begin(check(math.nan), later=False)
    last.finish()
