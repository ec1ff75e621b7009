"""The sparse SAE gives what the stock SAE gives, alone and inside a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE
from torch import Tensor

from jumprelu_plugin.saes.inference import SparseJumpReLUSAE, sparse_inference
from tests.tiny import D_HEAD, HEADS, N_HEADS, RESIDUAL, WIDTH, tiny_models, tiny_sae, tiny_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
D_IN = WIDTH[RESIDUAL]
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def stock(**fields: object) -> JumpReLUSAE:
    sae = tiny_sae(d_sae=211, seed=3)
    with torch.no_grad():
        sae.threshold += 2.0
        sae.threshold[::5] -= 3.5  # a negative threshold: the ReLU decides
    for name, value in fields.items():
        setattr(sae.cfg, name, value)
    return sae


def activations(*leading: int) -> Tensor:
    return 1.3 * torch.randn(*leading, D_IN, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("leading", [(307,), (7, 11), (1,)], ids=str)
@pytest.mark.parametrize("error_term", [False, True])
def test_outputs_are_the_stock_ones(
    leading: tuple[int, ...], error_term: bool, screen: bool
) -> None:
    sae = stock()
    sae.use_error_term = error_term
    fast, x = sparse_inference(sae, screen=screen), activations(*leading)
    acts = sae.encode(x)
    assert torch.equal(fast.encode(x) != 0, acts != 0)
    assert 0.01 < (acts != 0).float().mean() < 0.4
    torch.testing.assert_close(fast.encode(x), acts, **TIGHT)
    torch.testing.assert_close(fast.decode(acts), sae.decode(acts), **TIGHT)
    torch.testing.assert_close(fast(x), sae(x), **TIGHT)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("apply_b_dec", [False, True])
def test_normalised_inputs(normalisation: str, apply_b_dec: bool) -> None:
    weights = stock()
    cfg = type(weights.cfg).from_dict(
        {
            **weights.cfg.to_dict(),
            "normalize_activations": normalisation,
            "apply_b_dec_to_input": apply_b_dec,
        }
    )
    sae = JumpReLUSAE(cfg)
    sae.load_state_dict(weights.state_dict())
    fast, x = sparse_inference(sae), activations(5, 13)
    torch.testing.assert_close(fast.encode(x), sae.encode(x), **TIGHT)
    torch.testing.assert_close(fast(x), sae(x), **TIGHT)


def test_heads_of_an_sae_that_was_not_used_before() -> None:
    sae = tiny_sae(HEADS, d_sae=211, seed=3)
    assert sae.hook_z_reshaping_mode
    fast = sparse_inference(sae)
    z = torch.randn(5, 7, N_HEADS, D_HEAD)
    wanted = tiny_sae(HEADS, d_sae=211, seed=3)
    torch.testing.assert_close(fast.encode(z), wanted.encode(z), **TIGHT)
    torch.testing.assert_close(
        fast.decode(fast.encode(z)), wanted.decode(wanted.encode(z)), **TIGHT
    )
    torch.testing.assert_close(sparse_inference(sae)(z), wanted(z), **TIGHT)


def test_what_is_not_finite_is_handed_on() -> None:
    sae, x = stock(), activations(307)
    x[11, 3] = float("nan")
    x[13, 5] = float("inf")
    fast = sparse_inference(sae)
    for name in ("encode", "forward"):
        found, wanted = getattr(fast, name)(x), getattr(sae, name)(x)
        assert torch.isnan(wanted[11]).any()
        torch.testing.assert_close(found, wanted, equal_nan=True, **TIGHT)


def test_nothing_and_everything_active() -> None:
    for threshold in (1e9, -1.0):
        sae = stock()
        sae.threshold.data.fill_(threshold)
        fast, x = sparse_inference(sae), activations(19)
        torch.testing.assert_close(fast.encode(x), sae.encode(x), **TIGHT)
        torch.testing.assert_close(fast(x), sae(x), rtol=1e-5, atol=1e-4)


def test_it_is_a_copy_and_can_be_changed_as_any_sae() -> None:
    sae = stock()
    before, x = sae.encode(activations(23)), activations(23)
    fast = sparse_inference(sae)
    assert type(sae) is JumpReLUSAE and sae.W_enc.is_contiguous()
    fast.fold_W_dec_norm()
    assert torch.equal(sae.encode(x), before)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(fast.encode(x), sae.encode(x), **TIGHT)
    sae.W_enc.data = fast.W_enc.data = 1.7 * sae.W_enc.data
    torch.testing.assert_close(fast.encode(x), sae.encode(x), **TIGHT)
    again = sparse_inference(fast)
    torch.testing.assert_close(again.encode(x), sae.encode(x), **TIGHT)
    again.to(torch.bfloat16)
    assert (sae.cfg.dtype, again.cfg.dtype) == ("float32", "bfloat16")


def test_saved_it_is_a_stock_folder(tmp_path: Path) -> None:
    sae = stock()
    sparse_inference(sae).save_model(tmp_path)
    loaded = SAE.load_from_disk(str(tmp_path))
    assert type(loaded) is JumpReLUSAE
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_no_tensor_as_wide_as_the_dictionary_in_a_plain_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sae, x = stock(), activations(29)
    monkeypatch.setattr(JumpReLUSAE, "encode", None)
    monkeypatch.setattr(JumpReLUSAE, "decode", None)
    seen: list[tuple[int, ...]] = []
    fast = sparse_inference(sae)
    fast.hook_sae_output.register_forward_hook(lambda *_: seen.append(tuple(_[2].shape)))
    monkeypatch.setattr(SparseJumpReLUSAE, "encode", None)
    fast(x)
    assert seen == [(29, D_IN)]


@pytest.mark.parametrize("point", ["hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"])
def test_hooks_see_and_change_what_they_do_in_the_stock_sae(point: str) -> None:
    sae, x = stock(), activations(31)
    fast = sparse_inference(sae)
    seen: list[Tensor] = []

    def double(value: Tensor, hook: object) -> Tensor:
        seen.append(value)
        return 2 * value

    sae.add_hook(point, double)
    expected, found = sae(x), fast(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(seen[1], seen[0], **TIGHT)


def test_gradients_are_the_stock_ones() -> None:
    sae = stock()
    fast = sparse_inference(sae)
    found = []
    for each in (sae, fast):
        x = activations(17).requires_grad_()
        with torch.enable_grad():
            each(x).pow(2).sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("hook", [RESIDUAL, HEADS])
def test_spliced_into_a_model(hook: str, tmp_path: Path) -> None:
    tiny = tiny_models(tmp_path)
    sae, tokens = tiny_sae(hook, d_sae=211), tiny_tokens()
    for model in (tiny.hooked, tiny.bridge):
        expected = model.run_with_saes(tokens, saes=[sae])
        found = model.run_with_saes(tokens, saes=[sparse_inference(sae)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        plain = model(tokens)
        assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)
        cached, cache = model.run_with_cache_with_saes(tokens, saes=[sparse_inference(sae)])
        torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-4)
        assert any(name.endswith("hook_sae_acts_post") for name in cache)


def test_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="JumpReLUSAE; got Linear"):
        sparse_inference(torch.nn.Linear(2, 3))  # type: ignore[arg-type]
