"""Which latents are clear and what follows them, on examples small enough to read."""

from __future__ import annotations

import torch

from jumprelu_plugin.analysis.top_activations import TOP, LatentExamples, clearest

# Token 1 is common, 7 and 8 are rare; 9 follows every 7.
TOKENS = torch.tensor([[1, 7, 9, 1, 1, 7, 9, 1, 8, 1], [1, 1, 7, 9, 1, 8, 1, 1, 1, 7]])


def examples() -> LatentExamples:
    def where(token: int) -> list[int]:
        found = (TOKENS.flatten() == token).nonzero().flatten().tolist()
        return (found * TOP)[:TOP]

    position = torch.tensor([where(1), where(7), where(8), where(7)])
    activation = torch.linspace(3.0, 1.0, TOP).expand(4, TOP).clone()
    activation[3, -1] = 0.0  # fired less often than TOP times
    return LatentExamples(TOKENS, activation, position, torch.tensor([0.04, 0.03, 0.01, 0.01]))


def test_clear_latents_are_of_telling_tokens() -> None:
    # All are perfectly clear; the rarer the token, the more it tells. Too few examples: left out.
    assert clearest(examples()) == [2, 1, 0]
    assert clearest(examples(), count=1) == [2]


def test_frequent_latents_and_other_tokens_are_left_out() -> None:
    found = examples()
    found.firing_frequency[2] = 0.2
    assert clearest(found) == [1, 0]
    among = torch.zeros(10, dtype=torch.bool)
    among[[1, 8]] = True
    assert clearest(examples(), among=among) == [2, 0]


def test_followers_come_next_within_the_sequence() -> None:
    # The 7 at the end of the second row has none; every other 7 is followed by 9.
    assert examples().followers(1).tolist() == [9]
    assert examples().followers(2).tolist() == [1]
    assert set(examples().followers(0, count=3).tolist()) <= {1, 7, 8}
