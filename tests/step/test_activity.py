"""Active pairs and firings of a batch, counted alike in dense and sparse activations."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.evaluation.metrics import StreamingMetrics, batch_fvu
from jumprelu_plugin.step.activity import active_count, firings_by_latent, mean_l0


def _activations(batch: int = 7, d_sae: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, d_sae, generator=generator) - 0.5).clamp_min(0)


@pytest.mark.parametrize("sparse", [False, True])
def test_counts_are_those_of_the_activations(sparse: bool) -> None:
    dense = _activations()
    acts = dense.to_sparse_coo() if sparse else dense
    active = int((dense > 0).sum())
    assert 0 < active < dense.numel()
    assert int(active_count(acts)) == active
    assert mean_l0(acts) == active / 7
    assert firings_by_latent(acts).tolist() == (dense > 0).sum(0).tolist()


def test_an_explicit_zero_is_not_a_firing() -> None:
    places, values = torch.tensor([[0, 1, 1], [2, 2, 0]]), torch.tensor([1.0, 0.0, 3.0])
    acts = torch.sparse_coo_tensor(places, values, (2, 3))
    assert firings_by_latent(acts).tolist() == [1, 0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counting_does_not_wait_for_the_device() -> None:
    acts = _activations().cuda()
    for form in (acts, acts.to_sparse_coo()):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            active_count(form)
            firings_by_latent(form)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_fvu_of_a_batch_is_the_streaming_one() -> None:
    generator = torch.Generator().manual_seed(1)
    target, noise = torch.randn(2, 13, 3, 5, generator=generator).unbind()
    output = target + 0.1 * noise
    found = batch_fvu(target, output)
    assert found.shape == (3,)
    for layer in range(3):
        streaming = StreamingMetrics()
        streaming.update(target[:, layer], output[:, layer], _activations(13))
        assert found[layer].item() == pytest.approx(streaming.compute().fvu, rel=1e-5)
        alone = batch_fvu(target[:, layer], output[:, layer])
        assert alone.item() == pytest.approx(found[layer].item(), rel=1e-6)
