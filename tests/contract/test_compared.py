"""The comparison can fail."""

from __future__ import annotations

import torch

from tests.contract.compared import differences


def test_a_difference_is_found() -> None:
    value = torch.linspace(1, 2, 7)
    other = value.clone()
    other[3] *= 1 + 3e-7  # the last bits
    assert differences("w", value, value.clone(), 0) == []
    assert len(differences("w", other, value, 0)) == 1
    assert differences("w", other, value, 1e-6) == []
    assert len(differences("w", other, value, 1e-8)) == 1
    assert len(differences("w", {"a": 1, "b": [2]}, {"a": 1, "b": [3]}, 0)) == 1
    assert len(differences("w", {"a": 1}, {"a": 1, "b": [3]}, 0)) == 1
    assert len(differences("w", value[:5], value, 1e-6)) == 1
