"""circuit-tracer's replacement model of a local language model, and its attribution graphs.

A replacement model gives the base model's outputs, while gradients pass through transcoders instead
of MLPs. `jumprelu export --to circuit-tracer` writes the folder of transcoders that it reads, and
circuit-tracer's `create_graph_files` displays a graph.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from jumprelu_plugin.circuits.layers import layers_and_width
from jumprelu_plugin.formats import circuit_tracer
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, build_hooked


def load_replacement_model(
    transcoders: str | Path, model: str | Path = EMBEDDED_MODEL, device: str = "cpu"
) -> Any:
    """circuit-tracer's `TransformerLensReplacementModel` of `model` with a folder's transcoders.

    Args:
        transcoders: a folder in circuit-tracer's format.
        model: as for `load_model`, which takes folders too; circuit-tracer takes only hub names.
        device: where the model runs.

    Raises:
        ImportError: circuit-tracer is not installed.
        ValueError: the number or width of the transcoders differs from the model's layers.
    """
    if not circuit_tracer.LOADER.installed:
        raise ImportError(
            f"circuit-tracer is not installed. Install it with: {circuit_tracer.LOADER.install}"
        )
    loaded = circuit_tracer.load_transcoders(Path(transcoders))
    replacement = build_hooked(_backend(), model, device)
    expected = replacement.cfg.n_layers, replacement.cfg.d_model
    n_layers, width = layers_and_width(loaded)
    if (n_layers, width) != expected:
        raise ValueError(
            f"{transcoders} holds {n_layers} transcoders of width {width}, and the "
            f"model has {expected[0]} layers of width {expected[1]}"
        )
    replacement._configure_replacement_model(loaded)
    return replacement


def attribute(model: Any, prompt: str | Tensor, **options: Any) -> Any:
    """circuit-tracer's attribution graph of a prompt.

    Args:
        model: the replacement model.
        prompt: text or token ids.
        options: keyword arguments of circuit-tracer's `attribute`.
    """
    options = {"max_n_logits": 5, "batch_size": 64, **options}
    with without_hook_warnings():
        return import_module("circuit_tracer").attribute(prompt, model, **options)


def _backend() -> Any:
    """circuit-tracer's replacement model class, without the errors it prints when Python exits."""
    circuit_tracer.make_importable()
    module = import_module("circuit_tracer.replacement_model.replacement_model_transformerlens")
    plain = module.TransformerLensReplacementModel
    is_finalizing = sys.is_finalizing  # at exit, this module's global names no longer exist

    def delete(self: Any) -> None:
        if not is_finalizing():  # at exit PyTorch is partly unloaded, and resetting hooks fails
            plain.__del__(self)

    return type(plain.__name__, (plain,), {"__del__": delete})


@contextmanager
def without_hook_warnings() -> Iterator[None]:
    """Suppress PyTorch's warning of backward hooks whose inputs require no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield
