"""Every way to find candidates selects the same pairs, with bit-identical values.

The edges are equal to pre-activations, so that rounding alone decides those pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step import product
from jumprelu_plugin.step.select import select
from jumprelu_plugin.step.sparse import encode_sparse

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(37, 23, 101), (301, 257, 1009), (521, 769, 4099)]
BACKENDS = tuple(product.BACKENDS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each library in turn computes the full-precision product."""
    choice = product.Choice(request.param, 1e-9, 1)
    monkeypatch.setattr(product, "choice_for", lambda *_: choice)
    return request.param


def weights(batch: int, d_in: int, d_sae: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(batch, d_in, generator=g)
    x[batch // 2] *= 160.0  # an attention sink
    W_enc = (torch.randn(d_sae, d_in, generator=g) / d_in**0.5).t()
    return x, W_enc, 0.1 * torch.randn(d_sae, generator=g)


def own_pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, seed: int) -> Tensor:
    """For each latent, the z of one of the tokens, as `select` itself computes it."""
    pattern, z = select(x, W_enc, b_enc, b_enc.new_full((W_enc.shape[1],), -torch.inf))
    z = z.view(len(x), -1)
    assert pattern.cols.numel() == z.numel()
    token = torch.randint(len(x), (z.shape[1],), generator=torch.Generator().manual_seed(seed))
    return z[token, torch.arange(z.shape[1])]


def same(found: tuple, expected: tuple) -> bool:
    (a, z_a), (b, z_b) = found, expected
    return torch.equal(a.rows, b.rows) and torch.equal(a.cols, b.cols) and torch.equal(z_a, z_b)


@pytest.mark.parametrize("seed", [3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_screened_and_full_precision_search_select_the_same_pairs(
    shape: tuple[int, int, int], seed: int, backend: str
) -> None:
    x, W_enc, b_enc = weights(*shape, seed)
    edge = own_pre_activations(x, W_enc, b_enc, seed)
    everything, z = select(x, W_enc, b_enc, torch.full_like(edge, -torch.inf))
    above = z > edge[everything.cols]
    kept, places = everything.where(above)
    expected = kept, z[places]
    assert 0.1 < above.float().mean() < 0.9
    for screen in (False, True):
        for tile_bytes in (None, 4 * 7 * shape[2] + 12):
            assert same(
                select(x, W_enc, b_enc, edge, screen=screen, tile_bytes=tile_bytes), expected
            )


@pytest.mark.parametrize("at", [-0.5, 0.0, 0.5], ids=["lower edge", "threshold", "upper edge"])
@pytest.mark.parametrize("nudge", [-1, 0, 1], ids=["just below", "on it", "just above"])
def test_active_and_window_are_the_same_pairs_when_rounding_decides(
    at: float, nudge: int, backend: str
) -> None:
    """z within one float of θ - ε/2, θ and θ + ε/2, at a θ and an ε that are not round numbers."""
    x, W_enc, b_enc = weights(*SHAPES[1], seed=7)
    bandwidth = 0.37
    threshold = own_pre_activations(x, W_enc, b_enc, 11).abs() - at * bandwidth
    toward = torch.full_like(threshold, nudge * torch.inf)
    threshold = threshold.nextafter(toward) if nudge else threshold
    x_hat = {}
    for screen in (False, True):
        e = encode_sparse(x, W_enc, b_enc, None, threshold, bandwidth, screen=screen)
        x_hat[screen] = e.pattern.rows, e.pattern.cols, e.z
    assert all(map(torch.equal, x_hat[False], x_hat[True]))
    # The selection drops nothing that the estimators let through.
    z = torch.addmm(b_enc.double(), x.double(), W_enc.double())
    kept = torch.zeros(z.shape, dtype=torch.bool)
    kept[x_hat[False][0], x_hat[False][1]] = True
    norms = x.norm(dim=1, keepdim=True) * W_enc.norm(dim=0)
    clearly = z > (threshold - bandwidth / 2).double() + 3e-5 * norms
    assert kept[clearly].all() and not kept[z < threshold - bandwidth / 2 - 3e-5 * norms].any()


def test_few_candidates_besides_the_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are tight, also with an attention sink in the batch."""
    from jumprelu_plugin.step import select as module

    counts: list[int] = []
    find_candidates: Callable = module.find_candidates

    def counting(*arguments: object) -> object:
        candidates = find_candidates(*arguments)
        counts.append(candidates.cols.numel())
        return candidates

    monkeypatch.setattr(module, "find_candidates", counting)
    x, W_enc, b_enc = weights(*SHAPES[2], seed=13)
    z = torch.addmm(b_enc, x, W_enc)
    edge = z.quantile(0.98, dim=0)
    selected = int((z > edge).sum())
    for screen in (False, True):
        select(x, W_enc, b_enc, edge, screen=screen)
    full_precision, screened = counts
    assert selected <= full_precision < 1.05 * selected
    assert selected <= screened < 1.6 * selected


def test_a_product_in_fewer_bits_selects_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose float32 products are allowed to run in TF32."""

    def tf32(x: Tensor) -> Tensor:
        bits = x.view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    def product_in_tf32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, tf32(x), tf32(weight).t())

    x, W_enc, b_enc = weights(*SHAPES[1], seed=17)
    edge = own_pre_activations(x, W_enc, b_enc, 19)
    expected = select(x, W_enc, b_enc, edge)
    monkeypatch.setattr(product, "linear", product_in_tf32)
    monkeypatch.setattr(product, "_precision", lambda device: "tf32")
    assert same(select(x, W_enc, b_enc, edge), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_the_same_pairs_on_a_gpu(tf32: bool) -> None:
    """Screened and in full precision, with and without TF32."""
    x, W_enc, b_enc = (tensor.cuda() for tensor in weights(*SHAPES[2], seed=37))
    z = torch.addmm(b_enc.double(), x.double(), W_enc.double())
    edge = z.quantile(0.98, dim=0).float()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        found = [select(x, W_enc, b_enc, edge, screen=screen) for screen in (False, True)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert same(*found)
    kept = torch.zeros_like(z, dtype=torch.bool)
    kept[found[0][0].rows, found[0][0].cols] = True
    margin = 3e-5 * x.norm(dim=1, keepdim=True) * W_enc.norm(dim=0)
    assert kept[z > edge + margin].all() and not kept[z < edge - margin].any()


# ---------------------------------------------------------------- the product


def test_each_library_is_within_the_bound_of_float64(backend: str) -> None:
    x, W_enc, b_enc = weights(*SHAPES[2], seed=23)
    weight = W_enc.t()
    found = product.linear(x, weight, b_enc, x.new_empty(len(x), len(weight)))
    truth = torch.addmm(b_enc.double(), x.double(), W_enc.double())
    allowed = x.norm(dim=1, keepdim=True) * weight.norm(dim=1) + b_enc.abs()
    assert ((found - truth).abs() <= product.rounding(x) * allowed).all()
    # Full float32: TF32 or bfloat16 would miss this by far.
    assert ((found - truth).abs() <= 1e-6 * allowed).all()


def test_the_fastest_library_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc = weights(41, 29, 67, seed=29)
    took = {"_blas": 0.003, "_onednn": 0.002, "_onednn_layout": 0.0025}
    monkeypatch.setattr(product, "_choices", {})
    monkeypatch.setattr(product, "_seconds", lambda multiply, *_: took[multiply.__name__])
    weight, out = W_enc.t().contiguous(), x.new_empty(41, 67)
    assert product.backend(29) is None and product.seconds(82, 29, 67) is None
    product.linear(x, weight, b_enc, out)
    assert product.backend(29) == "oneDNN"
    assert product.seconds(82, 29, 67) == pytest.approx(0.004)
    took["_blas"] = 0.001
    assert product.backend(29) == "oneDNN"  # timed once
    monkeypatch.setattr(product, "_choices", {})
    product.linear(x, weight, b_enc, out)
    assert product.backend(29) == "BLAS"


def test_a_library_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, W_enc, b_enc = weights(41, 29, 67, seed=31)
    monkeypatch.setattr(product, "_choices", {})
    wrong = {"wrong": lambda x, w, b, out: (x @ w.t() + b) * 1.001, "absent": _missing}
    monkeypatch.setattr(product, "BACKENDS", {**product.BACKENDS, **wrong})
    blas = product.BACKENDS["BLAS"]
    monkeypatch.setattr(product, "_seconds", lambda multiply, *_: 1.0 if multiply is blas else 0)
    product.linear(x, W_enc.t().contiguous(), b_enc, x.new_empty(41, 67))
    assert product.backend(29) in ("oneDNN", "oneDNN with a copy")


def _missing(*_: Tensor) -> Tensor:
    return torch.ops.mkldnn.no_such_operator()
