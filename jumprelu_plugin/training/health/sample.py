"""Activations to look at before a run, read apart from the stream that it will train on."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from jumprelu_plugin.training.activations.pairs import PairStore
from jumprelu_plugin.training.activations.store import resumable


@torch.no_grad()
def first_rows(store: ActivationsStore, cfg: Any, tokens: int) -> Float[Tensor, "tokens width"]:
    """The text's first `tokens` activations, special tokens dropped, as a store of its own reads
    them: nothing is taken from `store`, and nothing is shuffled.

    Raises:
        ValueError: there is no text, or the activations are NaN or infinite.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what SAELens has to say, it said about `store`
        return _read(store, cfg, tokens)


def _read(store: ActivationsStore, cfg: Any, tokens: int) -> Tensor:
    pieces: list[Tensor] = []
    if isinstance(store, PairStore):
        assert store._hook_d_ins is not None
        apart = PairStore.like(store, store.pairs, store._hook_d_ins, store.seed)
        (pair,) = store.pairs.values()
        while sum(map(len, pieces)) < tokens:
            found = apart.next_text()
            pieces.append(torch.cat([found[pair.hook_in], found[pair.hook_out]], 1))
    else:
        for activations in resumable(store, cfg)._iterate_filtered_activations():
            pieces.append(activations)
            if sum(map(len, pieces)) >= tokens:
                break
    return torch.cat(pieces)[:tokens]


def scaled(
    rows: Float[Tensor, "tokens width"], sae_cfg: Any, scaler: ActivationScaler
) -> Float[Tensor, "tokens width"]:
    """The rows as the trainer will scale them, by the scale of these rows alone."""
    how = sae_cfg.normalize_activations
    if how == "expected_average_only_in":
        scaler.estimate_scaling_factor(sae_cfg.d_in, iter([rows]), 1)
    elif how == "covariance_whitening":
        scaler.estimate_whitening(sae_cfg.d_in, iter([rows]), 1)
    return scaler(rows)
