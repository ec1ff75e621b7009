"""What a training loop or a subclass of a user's own has to hold."""

from __future__ import annotations

from sae_lens import JumpReLUTrainingSAE as StockTrainingSAE
from torch import Tensor, nn


def require_rows(x: Tensor, given: Tensor, d_in: int) -> None:
    """Raise ValueError for a batch that is not [batch, d_in], of one row at least.

    Args:
        x: the batch with its heads flattened.
        given: as it was given.
    """
    if x.ndim != 2 or not len(x):
        raise ValueError(
            f"a training step got rows of shape {list(given.shape)}; expected [batch, {d_in}] with "
            "one row at least: flatten sequences first"
        )


def refuse_uncalled_overrides(kind: type[StockTrainingSAE]) -> None:
    """Raise TypeError for a subclass with a loss of its own that no step here would call."""
    if kind.calculate_aux_loss is not StockTrainingSAE.calculate_aux_loss:
        raise TypeError(
            f"{kind.__name__} overrides calculate_aux_loss, which no training step here calls: "
            "override training_forward_pass, and add to the losses that it returns"
        )


def trained_parameter(sae: nn.Module, usual: nn.Parameter) -> nn.Parameter:
    """A parameter that the SAE's optimizer holds: the usual one, or another where it is frozen."""
    return next((each for each in (usual, *sae.parameters()) if each.requires_grad), usual)
