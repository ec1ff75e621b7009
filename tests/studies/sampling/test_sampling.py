"""Which latents a study draws, and how their windows read."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.analysis.windows import WindowKind, Windows
from jumprelu_plugin.studies.sampling.latents import stratified_latents
from jumprelu_plugin.studies.sampling.texts import text_windows


def test_strata_are_sampled_equally() -> None:
    density = torch.rand(211, generator=torch.Generator().manual_seed(5)) ** 4
    density[::7] = 0.0
    drawn = stratified_latents(density, 22, strata=4, seed=3)
    assert [sum(each.stratum == s for each in drawn) for s in range(4)] == [6, 6, 5, 5]
    assert len({each.latent for each in drawn}) == 22
    assert all(each.density == float(density[each.latent]) > 0 for each in drawn)
    ranges = [[e.density for e in drawn if e.stratum == s] for s in range(4)]
    assert all(max(low) <= min(high) for low, high in zip(ranges, ranges[1:], strict=False))
    assert stratified_latents(density, 22, strata=4, seed=3) == drawn
    assert stratified_latents(density, 22, strata=4, seed=4) != drawn
    assert len(stratified_latents(density, 1000)) == int((density > 0).sum())


def test_latents_of_equal_density_are_drawn_at_random() -> None:
    """A dictionary's first latents are not special, such as those of a first Matryoshka prefix."""
    drawn = stratified_latents(torch.full((1009,), 0.01), 97, strata=3, seed=1)
    assert 350 < sum(each.latent for each in drawn) / 97 < 660


def test_draws_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no latent of the SAE fires"):
        stratified_latents(torch.zeros(5), 3)
    with pytest.raises(ValueError, match="0 latents in 4 strata"):
        stratified_latents(torch.ones(5), 0)


class Bytes:
    """A tokenizer whose token n is the byte n; 0 is special."""

    all_special_ids = (0,)

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<0x{token:02X}>"

    def decode(self, tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_characters_of_several_tokens_are_one_piece() -> None:
    ids = torch.tensor([[[0, *"aé日".encode(), 0xE6, 0x41, 0xE6]]])
    values = torch.arange(10.0).reshape(1, 1, 10)
    inside = torch.ones(1, 1, 10, dtype=torch.bool)
    kind, position = torch.tensor([[1]]), torch.tensor([[3]])
    windows = Windows(torch.tensor([4]), ids, values, inside, kind, position)
    ((window,),) = text_windows(windows, Bytes())
    assert window.kind == WindowKind.TOP
    assert window.pieces == ("a", "é", "日", "\\xe6A", "\\xe6")
    assert window.activations == (1.0, 3.0, 6.0, 8.0, 9.0)
    assert window.text == "aé日\\xe6A\\xe6"
