"""Trained once for the tests of a module."""

from __future__ import annotations

import pytest

from jumprelu_plugin import JumpReLUTrainingSAE
from tests.saes.frequent_features import steered, trained


@pytest.fixture(scope="module")
def plain() -> JumpReLUTrainingSAE:
    return trained(steered())
