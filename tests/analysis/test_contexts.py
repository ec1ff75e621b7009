"""Contexts of a latent's strongest tokens."""

from __future__ import annotations

import torch

from jumprelu_plugin.analysis.contexts import collect_contexts
from jumprelu_plugin.analysis.top_activations import TOP, collect_top_activations
from tests.analysis.latents import SPECIAL, activations
from tests.tiny import RESIDUAL, tiny_sae


def test_contexts_are_the_activations_around_the_strongest_tokens(tiny, tokens) -> None:
    sae = tiny_sae(RESIDUAL)
    acts = activations(tiny, sae, tokens)
    found = collect_top_activations(
        tiny.hooked, sae, tokens, batch_size=7, special_token_ids=SPECIAL
    )
    before, after, bins = 5, 3, 11
    read = collect_contexts(
        tiny.hooked, sae, found, count=4, before=before, after=after, bins=bins, batch_size=5,
        special_token_ids=SPECIAL,
    )  # fmt: skip
    assert read.tokens.shape == (41, 4, before + after + 1) and read.focus == before
    length = tokens.shape[1]
    for latent in range(41):
        own = acts[..., latent]
        covered: list[tuple[int, int]] = []
        expected = []
        for value, place in zip(found.activation[latent], found.position[latent], strict=True):
            row, column = divmod(int(place), length)
            near = any(r == row and -before <= column - c <= after for r, c in covered)
            if value > 0 and not near:
                covered.append((row, column))
                expected.append((row, column))
        for rank in range(4):
            if rank >= len(expected):
                assert not read.inside[latent, rank].any()
                continue
            row, column = expected[rank]
            start, end = max(0, column - before), min(length, column + after + 1)
            inside = read.inside[latent, rank]
            assert int(inside.sum()) == end - start
            assert torch.equal(read.tokens[latent, rank][inside], tokens[row, start:end])
            torch.testing.assert_close(
                read.activation[latent, rank][inside], own[row, start:end], rtol=1e-4, atol=1e-5
            )
        fired = own[own > 0]
        assert int(read.histogram[latent].sum()) == len(fired)
        if len(fired):
            wanted = torch.histc(fired, bins, 0.0, float(found.activation[latent, 0]))
            assert int((read.histogram[latent] - wanted.long()).abs().sum()) <= 2  # bin edges
    assert TOP > 4
