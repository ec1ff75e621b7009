"""Half precision and autocast leave the estimators alone: θ gets the float32 gradient at every ε.

The oracle is SAELens' own step in float64, on the same (rounded) weights and activations.
"""

from __future__ import annotations

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from torch import Tensor

from tests.saes.twins import D_IN, relative_error, step, stock_config, twins

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE, MANY = 211, 1009
BANDWIDTHS = (0.001, 0.013, 0.17, 1.3)


def clear_of_the_edges(exact: StockSAE, x: Tensor, bandwidth: float) -> Tensor:
    """The tokens none of whose pre-activations are so near an edge that rounding decides."""
    with torch.no_grad():
        z = (x.double() - exact.b_dec) @ exact.W_enc + exact.b_enc - exact.threshold
        near = torch.stack([(z - at * bandwidth).abs() for at in (-0.5, 0.0, 0.5)]).amin((0, 2))
    kept = x[near > 2e-6]
    assert len(kept) > 0.9 * len(x)
    return kept


@pytest.mark.parametrize("path", ["dense", "sparse", "screened"])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_threshold_gradient_is_the_float64_one(bandwidth: float, how: str, path: str) -> None:
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    fields = {
        "d_sae": WIDE,
        "jumprelu_bandwidth": bandwidth,
        "jumprelu_init_threshold": 0.83,
        "jumprelu_ste_to_input": True,
        "apply_b_dec_to_input": True,
    }
    _, ours = twins(stock_config(**fields, dtype=str(dtype).split(".")[1]), path)
    exact = StockSAE(stock_config(**fields, dtype="float64"))
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    # The oracle holds θ in float64, which SAELens' own class would round.
    x = clear_of_the_edges(exact, 1.7 * torch.randn(MANY, D_IN).to(dtype), bandwidth)

    step(exact, x.double())
    output = step(ours, x, autocast=how == "autocast")
    truth = exact.threshold.grad
    assert truth is not None and ours.threshold.grad is not None
    assert (truth != 0).sum() > 30
    assert ours.threshold.grad.dtype == torch.float32
    assert relative_error(ours.threshold.grad, truth) < 1e-5
    # And the activations themselves, pair by pair.
    with torch.no_grad():
        acts = exact.encode(x.double())
    found = output.feature_acts.to_dense()
    assert torch.equal(found != 0, acts != 0)
    assert relative_error(found, acts) < 1e-6


def test_stock_autocast_is_what_is_avoided() -> None:
    cfg = stock_config(d_sae=WIDE, jumprelu_bandwidth=BANDWIDTHS[0], jumprelu_init_threshold=0.83)
    stock, _ = twins(cfg, "sparse")
    x = 1.7 * torch.randn(MANY, D_IN)
    step(stock, x)
    truth = stock.threshold.grad.clone()
    step(stock, x, autocast=True)
    assert relative_error(stock.threshold.grad, truth) > 0.5
