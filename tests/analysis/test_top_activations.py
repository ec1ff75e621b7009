"""The clearest latents and the tokens that follow, on top activations small enough to read."""

from __future__ import annotations

import torch

from jumprelu_plugin.analysis.top_activations import TOP, TopActivations, clearest_latents

# Token 1 is common, 7 and 8 are rare; 9 follows every 7.
TOKENS = torch.tensor([[1, 7, 9, 1, 1, 7, 9, 1, 8, 1], [1, 1, 7, 9, 1, 8, 1, 1, 1, 7]])


def top_activations() -> TopActivations:
    def where(token: int) -> list[int]:
        found = (TOKENS.flatten() == token).nonzero().flatten().tolist()
        return (found * TOP)[:TOP]

    position = torch.tensor([where(1), where(7), where(8), where(7)])
    activation = torch.linspace(3.0, 1.0, TOP).expand(4, TOP).clone()
    activation[3, -1] = 0.0  # fired less often than TOP times
    return TopActivations(TOKENS, activation, position, torch.tensor([0.04, 0.03, 0.01, 0.01]))


def test_clear_latents_are_of_informative_tokens() -> None:
    # All are perfectly clear, and rare tokens are more informative. The last latent has too few
    # activations.
    assert clearest_latents(top_activations()) == [2, 1, 0]
    assert clearest_latents(top_activations(), count=1) == [2]


def test_frequent_latents_and_other_tokens_are_left_out() -> None:
    top = top_activations()
    top.latent_density[2] = 0.2
    assert clearest_latents(top) == [1, 0]
    allowed = torch.zeros(10, dtype=torch.bool)
    allowed[[1, 8]] = True
    assert clearest_latents(top_activations(), allowed=allowed) == [2, 0]


def test_followers_come_next_within_the_sequence() -> None:
    # The 7 at the end of the second row has none; every other 7 is followed by 9.
    assert top_activations().followers(1).tolist() == [9]
    assert top_activations().followers(2).tolist() == [1]
    assert set(top_activations().followers(0, count=3).tolist()) <= {1, 7, 8}
