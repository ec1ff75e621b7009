"""Windows of text for chosen latents: top activations, a sample of all firings, and silence.

`contexts.py` shows every latent where it fires most. A study also needs windows where a latent
fires weakly and where it does not fire, for a few latents of a dictionary that may be large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.analysis.activations import latent_activations, left_out
from jumprelu_plugin.analysis.contexts import distinct_positions
from jumprelu_plugin.analysis.top_activations import TopActivations

# Firings drawn for each latent before those in windows of others are left out.
_DRAWN = 32
# Positions at which silence is looked for, for each silent window wanted.
_CANDIDATES = 8


class WindowKind(IntEnum):
    """Why a window was chosen."""

    NONE = 0  # there is no such window
    TOP = 1  # one of the highest activations
    SAMPLED = 2  # a firing at a quantile of the activations
    SILENT = 3  # the latent is silent in the whole window


@dataclass(frozen=True)
class WindowCounts:
    """How many windows of each kind, and their size.

    Attributes:
        top: windows at the highest activations.
        sampled: windows at even quantiles of a uniform sample of all firings.
        silent: windows in which the latent never fires.
        before, after: tokens in a window before and after its position.
    """

    top: int = 5
    sampled: int = 5
    silent: int = 0
    before: int = 16
    after: int = 8


@dataclass(frozen=True)
class Windows:
    """Windows of text for some latents, with the latent's activation at every token.

    Attributes:
        latents: the latents' indices, [latent].
        tokens: token ids, [latent, window, token]; undefined where `inside` is False.
        activation: the latent's activations, [latent, window, token]; 0 where `inside` is False.
        inside: mask of the tokens in the sequence, [latent, window, token].
        kind: a `WindowKind` for each window, [latent, window]; top, sampled, silent in this order.
        position: flat position of each window's focus in the text, [latent, window]; -1 for none.
    """

    latents: Int[Tensor, " latent"]
    tokens: Int[Tensor, "latent window token"]
    activation: Float[Tensor, "latent window token"]
    inside: Bool[Tensor, "latent window token"]
    kind: Int[Tensor, "latent window"]
    position: Int[Tensor, "latent window"]


@torch.no_grad()
def collect_windows(
    model: Any,
    sae: Any,
    top: TopActivations,
    latents: Sequence[int],
    counts: WindowCounts,
    *,
    batch_size: int = 16,
    special_token_ids: list[int] | None = None,
    seed: int = 0,
) -> Windows:
    """Collect the windows of `latents` in two passes over the text of `top`.

    Memory grows with the number of latents and windows, not with the length of the text: firings
    are drawn with random keys, of which the largest are kept.

    Args:
        model: a hooked model.
        sae: the dictionary; its metadata names the hook.
        top: the latents' top activations over the text.
        latents: the latents.
        counts: the windows wanted.
        batch_size: sequences in a batch.
        special_token_ids: tokens whose activations are not counted, beside those that the SAE was
            not trained on (`activations.left_out`).
        seed: of the sample.

    Raises:
        ValueError: the SAE has no hook name.
    """
    chosen = torch.tensor(list(latents), dtype=torch.long)
    text, length = top.tokens.flatten(), top.tokens.shape[1]
    ignored = left_out(sae, top.tokens, special_token_ids or ())
    draw = _Draw(chosen, text.numel(), length, counts, seed)
    for start, acts in latent_activations(model, sae, top.tokens, batch_size):
        acts = acts[:, chosen]
        acts[ignored[start : start + len(acts)]] = 0.0
        draw.add(start, acts)
    reach = counts.before + counts.after  # closer windows would overlap
    highest = distinct_positions(
        top.position[chosen], top.activation[chosen] > 0, length, reach, reach, counts.top,
    )  # fmt: skip
    parts = [highest, draw.sampled(highest), draw.silent()]
    kinds = [WindowKind.TOP, WindowKind.SAMPLED, WindowKind.SILENT]
    position = torch.cat(parts, dim=1)
    kind = torch.cat([torch.full_like(p, k) for p, k in zip(parts, kinds, strict=True)], dim=1)
    kind = torch.where(position >= 0, kind, WindowKind.NONE)

    offsets = torch.arange(-counts.before, counts.after + 1)
    columns = (position % length).unsqueeze(-1) + offsets
    inside = (columns >= 0) & (columns < length) & (position >= 0).unsqueeze(-1)
    flat = torch.where(inside, position.unsqueeze(-1) + offsets, 0)
    activation = torch.zeros(flat.shape)
    rows = torch.arange(len(chosen))[:, None, None].expand_as(flat)
    for start, acts in latent_activations(model, sae, top.tokens, batch_size):
        acts = acts[:, chosen]
        acts[ignored[start : start + len(acts)]] = 0.0
        here = inside & (flat >= start) & (flat < start + len(acts))
        activation[here] = acts[flat[here] - start, rows[here]]
    return Windows(chosen, text[flat], activation, inside, kind, position)


class _Draw:
    """A uniform sample of each latent's firings, and positions where it is silent."""

    def __init__(
        self, latents: Tensor, positions: int, length: int, counts: WindowCounts, seed: int
    ) -> None:
        self.counts, self.length = counts, length
        self._generator = torch.Generator().manual_seed(seed)
        self._key = torch.full((len(latents), _DRAWN), -1.0)
        self._position = torch.zeros(len(latents), _DRAWN, dtype=torch.long)
        self._value = torch.zeros(len(latents), _DRAWN)
        wanted = min(positions, _CANDIDATES * counts.silent)
        order = torch.randperm(positions, generator=self._generator)[:wanted]
        self._candidate = order.sort().values
        self._silent = torch.ones(len(latents), wanted, dtype=torch.bool)

    def add(self, start: int, acts: Float[Tensor, "batch_positions latent"]) -> None:
        """Take in a batch of whole sequences, of which the first begins at `start`."""
        key = torch.rand(acts.shape, generator=self._generator).masked_fill_(acts <= 0, -1.0)
        best = key.topk(min(_DRAWN, len(acts)), dim=0)
        keys = torch.cat([self._key, best.values.T], dim=1)
        positions = torch.cat([self._position, best.indices.T + start], dim=1)
        values = torch.cat([self._value, acts.gather(0, best.indices).T], dim=1)
        self._key, order = keys.topk(_DRAWN, dim=1)
        self._position, self._value = positions.gather(1, order), values.gather(1, order)
        inside = (self._candidate >= start) & (self._candidate < start + len(acts))
        for index in inside.nonzero().flatten().tolist():
            position = int(self._candidate[index])
            row = position // self.length * self.length
            first = max(row, position - self.counts.before) - start
            last = min(row + self.length - 1, position + self.counts.after) - start
            self._silent[:, index] = (acts[first : last + 1] == 0).all(0)

    def sampled(self, taken: Int[Tensor, "latent top"]) -> Int[Tensor, "latent sampled"]:
        """Firings at even quantiles of the sample, outside each other's and the taken windows."""
        counts = self.counts
        candidates = torch.cat([taken, self._position], dim=1)
        allowed = torch.cat([taken >= 0, self._key >= 0], dim=1)
        reach = counts.before + counts.after
        kept = distinct_positions(
            candidates, allowed, self.length, reach, reach, candidates.shape[1]
        )
        result = torch.full((len(taken), counts.sampled), -1)
        for row in range(len(taken)):
            own = (kept[row] >= 0) & ~torch.isin(kept[row], taken[row])
            value_of = dict(
                zip(self._position[row].tolist(), self._value[row].tolist(), strict=True)
            )
            ordered = sorted(kept[row][own].tolist(), key=lambda p: -value_of[p])
            if len(ordered) > counts.sampled:
                step = len(ordered) / counts.sampled
                ordered = [ordered[int((i + 0.5) * step)] for i in range(counts.sampled)]
            result[row, : len(ordered)] = torch.tensor(ordered, dtype=torch.long)
        return result

    def silent(self) -> Int[Tensor, "latent silent"]:
        """Positions in whose windows the latent is silent, drawn for each latent."""
        result = torch.full((len(self._silent), self.counts.silent), -1)
        for row, mask in enumerate(self._silent):
            found = self._candidate[mask]
            order = torch.randperm(len(found), generator=self._generator)[: self.counts.silent]
            result[row, : len(order)] = found[order]
        return result
