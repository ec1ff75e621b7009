"""The selection by kernels: every pair above the edge and no other, whatever rounding decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.kernels.buffers import GROWTH, PairBuffers
from jumprelu_plugin.step.kernels.pattern import BufferedPattern
from jumprelu_plugin.step.kernels.selection import UNUSED_Z, select_into
from jumprelu_plugin.step.select import select
from tests.step.kernels.cases import DEVICE
from tests.step.test_select import weights

SHAPE = (37, 23, 101)
SHAPES = [SHAPE, (67, 131, 257)]


def inputs(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, ...]:
    x, W_enc, b_enc = weights(*shape, seed)
    center = torch.randn(shape[1], generator=torch.Generator().manual_seed(seed + 1))
    return x.to(DEVICE), W_enc.to(DEVICE), b_enc.to(DEVICE), center.to(DEVICE)


def every_z(x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor) -> Tensor:
    """The kernels' own z of every pair, [batch, d_sae]."""
    no_edge = torch.full_like(b_enc, -torch.inf)
    room = len(x) * len(b_enc)
    found, z, candidates = select_into(room, x, W_enc, b_enc, no_edge, center=center)
    assert int(candidates) == int(found.count) == room
    return z.view(len(x), -1)


def assert_selected(
    found: tuple[BufferedPattern, Tensor, Tensor], z: Tensor, above: Tensor
) -> None:
    """The used entries are those of `above` in order, with the same bits; the rest is unused."""
    pattern, values, candidates = found
    used = int(pattern.count)
    assert used == int(above.sum()) <= int(candidates)
    assert torch.equal(pattern.pairs[:, :used], above.nonzero().t())
    assert torch.equal(values[:used], z[above])
    assert (values[used:] == UNUSED_Z).all()
    order, tokens, ends = pattern.by_latent
    by_latent = above.t().nonzero()
    assert torch.equal(tokens[:used], by_latent[:, 1])
    assert torch.equal(pattern.cols[order[:used]], by_latent[:, 0])
    assert torch.equal(ends, torch.nn.functional.pad(above.sum(0).cumsum(0), (1, 0)))
    assert torch.equal(pattern.row_ends, torch.nn.functional.pad(above.sum(1).cumsum(0), (1, 0)))


@pytest.mark.kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges_that_are_pre_activations(shape: tuple[int, int, int]) -> None:
    """Each latent's edge is the z of one of the tokens, and one float to either side of it."""
    arguments = inputs(shape, seed=3)
    z = every_z(*arguments)
    x, W_enc, b_enc, center = arguments
    token = torch.arange(shape[2], device=DEVICE) % shape[0]
    edge = z.gather(0, token[None])[0]
    never, always = 2, 5
    edge[never], edge[always] = torch.inf, -torch.inf
    for toward in (-torch.inf, None, torch.inf):
        at = edge if toward is None else edge.nextafter(torch.full_like(edge, toward))
        room = len(x) * shape[2]
        assert_selected(select_into(room, x, W_enc, b_enc, at, center=center), z, z > at)


def test_the_pairs_are_those_of_the_plain_step() -> None:
    x, W_enc, b_enc, center = inputs(SHAPE, seed=7)
    x[3] = center  # a token with z = b
    exact = (x - center).double() @ W_enc.double() + b_enc.double()
    edge = exact.quantile(0.95, dim=0).float()
    found, z, candidates = select_into(1024, x, W_enc, b_enc, edge, center=center)
    expected, plain = select(x, W_enc, b_enc, edge, center=center, screen=True)
    # No pair lies so near its edge that the two sums' rounding decides.
    near = (exact - edge).abs() < 1e-6 * (x - center).norm(dim=1, keepdim=True)
    assert not near.any()
    used = int(found.count)
    assert torch.equal(found.pairs[:, :used], expected.pairs)
    torch.testing.assert_close(z[:used], plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    assert used <= int(candidates) < 1.6 * used


@pytest.mark.kernels
def test_no_pair_at_all() -> None:
    x, W_enc, b_enc, center = inputs(SHAPE, seed=11)
    edge = torch.full_like(b_enc, 1e9)
    found, z, candidates = select_into(64, x, W_enc, b_enc, edge, center=center)
    assert int(candidates) == int(found.count) == 0 and (z == UNUSED_Z).all()


def test_too_little_room_is_counted_and_writes_nothing_elsewhere() -> None:
    x, W_enc, b_enc, center = inputs(SHAPE, seed=13)
    edge = torch.zeros_like(b_enc)
    room = 129
    found, z, candidates = select_into(room, x, W_enc, b_enc, edge, center=center)
    assert int(candidates) > room >= int(found.count)
    assert found.pairs.shape == (2, room) and z.shape == (room,)
    assert int(found.rows.max()) < len(x) and int(found.cols.max()) < len(b_enc)


def test_buffers_follow_what_steps_find() -> None:
    buffers = PairBuffers()
    first = buffers.room(128, 4099)
    buffers.adapt(first // 2)
    assert buffers.room(128, 4099) == first
    buffers.adapt(3 * first)
    grown = buffers.room(128, 4099)
    assert 3 * first < grown <= 3 * first * GROWTH + 4096
    buffers.adapt(int(0.95 * grown))  # nearly full: more room before it is too late
    assert buffers.capacity > grown
    buffers.adapt(first // 10)
    assert buffers.capacity < grown / 4
