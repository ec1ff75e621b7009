"""The learning rate of a run, from its size.

In the units of `control.standardization`. Fitted to runs of 300 to 32,000 steps, on sites of two
models and on made data (docs/ablations.md).
"""

from __future__ import annotations

# 1/lr² = d_in · (30 + 0.35 · steps / firings).
_SHORT, _LONG = 30.0, 0.35
# On narrow made data latents die of more: 67 wide, 3 % at 8.8e-3 and 17 % at 1.3e-2.
_HIGHEST = 1e-2
# Transcoders were measured at one size of run alone (recipes/transcoder.py).
HIGHEST_OF_TRANSCODERS = 4e-3


def learning_rate(d_in: int, d_sae: int, target_l0: float, batch: int, steps: int) -> float:
    """The learning rate for Adam that is best or near it, to two digits.

    Adam moves a number by about the learning rate, and a unit direction has numbers of about
    1/√d_in, so lr·√d_in is how far a direction turns in a step, in radians: 0.18 in a short run.
    In a long run it falls with √(firings / steps), as the steps at which a latent saw few tokens
    add up to a random walk.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        target_l0: active latents a token.
        batch: tokens a step. A latent fires in batch · target_l0 / d_sae of them.
        steps: steps of the run.
    """
    firings = batch * target_l0 / d_sae
    found = (d_in * (_SHORT + _LONG * steps / firings)) ** -0.5
    return float(f"{min(found, _HIGHEST):.1e}")
