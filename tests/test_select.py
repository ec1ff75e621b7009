"""Both ways to select agree on every pair, with edges put on the pre-activations themselves."""

import pytest
import torch

from jumprelu_plugin.step.select import select_by_screening, select_directly


@pytest.mark.parametrize("seed", [3, 5, 7])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(37, 23, 101), (301, 257, 1009)])
def test_screening_selects_the_same_pairs(seed: int, batch: int, d_in: int, d_sae: int) -> None:
    torch.manual_seed(seed)
    x = 3 * torch.randn(batch, d_in)
    W_enc = (torch.randn(d_sae, d_in) / d_in**0.5).t()
    b_enc = 0.1 * torch.randn(d_sae)
    z = torch.addmm(b_enc, x, W_enc)
    # Each latent's threshold is one of its own pre-activations: rounding alone decides that pair.
    own = z[torch.randint(batch, (d_sae,)), torch.arange(d_sae)]
    edges = torch.stack([own - 0.7, own, own + 0.3])
    (direct, z_direct), (screened, z_screened) = (
        select(x, W_enc, b_enc, edges) for select in (select_directly, select_by_screening)
    )
    assert torch.equal(direct.rows, screened.rows)
    assert torch.equal(direct.cols, screened.cols)
    for edge in edges:
        above = edge[direct.cols]
        assert torch.equal(z_direct > above, z_screened > above)
    torch.testing.assert_close(z_direct, z_screened, rtol=1e-5, atol=1e-5)
