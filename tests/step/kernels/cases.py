"""Small patterns and matrices for the kernels, on the device where kernels run here."""

from __future__ import annotations

import torch
from torch import Tensor

from jumprelu_plugin.step.kernels.pattern import BufferedPattern
from jumprelu_plugin.step.pattern import Pattern

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, D_SAE, SPARE = 37, 61, 23
ALWAYS, NEVER, EMPTY_TOKEN, FULL_TOKEN = 17, 5, 7, 11


def pattern(density: float = 0.13, seed: int = 3) -> Pattern:
    """A latent that fires on every token but one, one that never does; a token without latents
    and one with all but one."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(BATCH, D_SAE, generator=g) < density
    kept[:, ALWAYS], kept[FULL_TOKEN] = True, True
    kept[:, NEVER], kept[EMPTY_TOKEN] = False, False
    return Pattern(kept.nonzero().t().contiguous().to(DEVICE), BATCH, D_SAE)


def buffered(plain: Pattern, spare: int = SPARE) -> BufferedPattern:
    """The same pairs with unused entries after them."""
    used = plain.cols.numel()
    unused = torch.arange(spare, device=DEVICE)
    order = torch.cat((plain.by_latent[0], used + unused))
    more = torch.stack((unused % plain.batch, unused % plain.d_sae))
    return BufferedPattern(
        pairs=torch.cat((plain.pairs, more), 1),
        batch=plain.batch,
        d_sae=plain.d_sae,
        latent_order=(order, plain.by_latent[2]),
        token_ends=plain.row_ends,
    )


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def padded(values: Tensor, spare: int = SPARE) -> Tensor:
    """Values at the used entries, zeros at the others."""
    return torch.cat((values, values.new_zeros(spare)))


def assert_three_way(fast: Tensor, plain: Tensor, truth: Tensor) -> None:
    """`fast` errs at most twice as much as `plain`, plus one rounding of the largest value."""
    fast, plain, truth = fast.cpu(), plain.cpu(), truth.cpu()
    allowed = 2 * (plain.double() - truth).abs().max()
    floor = torch.finfo(plain.dtype).eps * truth.abs().max()
    assert fast.shape == plain.shape
    assert ((fast.double() - truth).abs().max() <= allowed + floor).item()
