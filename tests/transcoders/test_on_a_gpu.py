"""Sets of transcoders trained, stopped and resumed on a GPU.

Sums are added in any order there, so a resumed run is close to the uninterrupted one and not the
same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from jumprelu_plugin.transcoders.clt.run import train_clt
from jumprelu_plugin.transcoders.clt.trainer import Trainer
from jumprelu_plugin.transcoders.per_layer.run import train_transcoders
from jumprelu_plugin.transcoders.per_layer.runner import LayerwiseTrainer
from tests.transcoders.clt import test_run as clt
from tests.transcoders.per_layer import test_run as per_layer

pytestmark = pytest.mark.gpu


class Stopped(Exception):
    """As a process that dies."""


@pytest.fixture
def model_on_gpu(model: Any) -> Iterator[Any]:
    yield model.to("cuda")
    model.to("cpu")


def stopping(method: Callable[..., Any], step_of: str, last: int) -> Callable[..., Any]:
    """The method, which raises once `step_of` is `last`."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, step_of) == last:
            raise Stopped
        return method(self, *args, **kwargs)

    return wrapped


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.05 * value.norm() + 1e-3, name


def test_a_cross_layer_transcoder(
    model_on_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, text = clt.settings(device="cuda"), clt.text()
    train_clt(tmp_path / "whole", settings, model=model_on_gpu, dataset=text)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Trainer, "_show", stopping(Trainer._show, "step", 7))
        train_clt(stopped, settings, model=model_on_gpu, dataset=text)
    assert list((stopped / "checkpoints").iterdir())
    train_clt(stopped, settings, model=model_on_gpu, dataset=text)
    assert_close(clt.weights(stopped), clt.weights(tmp_path / "whole"))


def test_a_transcoder_a_layer(
    model_on_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, text = per_layer.settings(device="cuda"), per_layer.text()
    train_transcoders(tmp_path / "whole", settings, model=model_on_gpu, dataset=text)
    stopped, update = tmp_path / "stopped", LayerwiseTrainer._update_pbar
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(LayerwiseTrainer, "_update_pbar", stopping(update, "n_training_steps", 7))
        train_transcoders(stopped, settings, model=model_on_gpu, dataset=text)
    assert list((stopped / "checkpoints").iterdir())
    train_transcoders(stopped, settings, model=model_on_gpu, dataset=text)
    assert_close(per_layer.weights(stopped), per_layer.weights(tmp_path / "whole"))
