"""Text with known features, and latents that read one or two of them.

The features and their activations are SAELens' (`sae_lens.synthetic`). Each feature has a word, and
the text at a position is the word of the feature that is most active there. A model whose embedding
of a position is the generator's hidden vector lets the whole pipeline run on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, orthogonal_initializer
from torch import nn
from transformer_lens.hook_points import HookedRootModule, HookPoint

HOOK = "hook_hidden"


class Words:
    """A tokenizer of positions: position n has the word of its strongest feature."""

    all_special_ids = ()

    def __init__(self, feature: torch.Tensor) -> None:
        self.feature = feature.tolist()

    def convert_ids_to_tokens(self, token: int) -> str:
        return f" w{self.feature[token]}"

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(f" w{self.feature[token]}" for token in tokens)


class KnownModel(HookedRootModule):
    """Gives the hidden vector of each position at one hook."""

    def __init__(self, hidden: torch.Tensor, tokenizer: Any) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(device=hidden.device)
        self.hidden = nn.Parameter(hidden, requires_grad=False)
        self.hook_hidden = HookPoint()
        self.tokenizer = tokenizer
        self.setup()

    def forward(self, tokens: torch.Tensor, **_: object) -> torch.Tensor:
        return self.hook_hidden(self.hidden[tokens])


def known_text(
    features: int, sequences: int, length: int, seed: int = 0
) -> tuple[KnownModel, torch.Tensor, torch.Tensor]:
    """A model, its tokens and the features' directions, with three features active at a time."""
    torch.manual_seed(seed)
    dictionary = FeatureDictionary(
        features, features, bias=False, initializer=orthogonal_initializer()
    )
    generator = ActivationGenerator(
        features, firing_probabilities=3.0 / features, std_firing_magnitudes=0.3
    )
    with torch.no_grad():
        active = generator.sample(sequences * length)
        hidden = dictionary(active)
    model = KnownModel(hidden, Words(active.argmax(-1)))
    tokens = torch.arange(sequences * length).reshape(sequences, length)
    return model, tokens, dictionary.feature_vectors.detach()


def known_sae(directions: torch.Tensor, mixtures: Sequence[tuple[int, int]]) -> JumpReLUSAE:
    """One latent a feature, then one for each pair, which fires for either feature."""
    single = directions
    mixed = torch.stack([directions[a] + directions[b] for a, b in mixtures])
    encoder = torch.cat([single, mixed])
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(
            d_in=directions.shape[1],
            d_sae=len(encoder),
            apply_b_dec_to_input=False,
            metadata=SAEMetadata(hook_name=HOOK, model_name="known"),
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(encoder.T)
        sae.W_dec.copy_(encoder)
        sae.threshold.fill_(0.3)
    return sae.eval()
