"""SAEs attached to a model: HookedSAETransformer and SAETransformerBridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from tests.contract.conftest import Outcome
from tests.contract.stock import config
from tests.tiny import (
    D_MODEL,
    HEADS,
    MLP,
    RESIDUAL,
    tiny_bridge,
    tiny_hf,
    tiny_hooked,
    tiny_sae,
    tiny_tokenizer,
    tiny_tokens,
)  # fmt: skip

ACTS = "hook_sae_acts_post"


@pytest.fixture(params=["hooked", "bridge"])
def clean(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A new model each: a bridge's hook points keep another name after an SAE is removed."""
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    return {"hooked": tiny_hooked, "bridge": tiny_bridge}[request.param](tiny_hf(), tokenizer)


def cached(model: Any, sae: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the activations of the SAE's latents."""
    logits, cache = model.run_with_cache_with_saes(tiny_tokens(), saes=[sae], **options)
    (name,) = [key for key in cache if key.endswith(ACTS)]
    return logits, cache[name]


@pytest.mark.parametrize("hook", [RESIDUAL, MLP, HEADS])
def test_for_one_pass(clean: Any, hook: str, outcome: Outcome) -> None:
    before, cache = clean.run_with_cache(tiny_tokens())
    sae = tiny_sae(hook)
    expected = sae.encode(cache[hook])
    logits = clean.run_with_saes(tiny_tokens(), saes=[sae])
    assert not torch.allclose(logits, before, atol=1e-3)
    assert torch.equal(clean(tiny_tokens()), before)  # removed after the pass
    assert clean.acts_to_saes == {}
    outcome.same("logits", logits)
    with_cache, acts = cached(clean, sae)
    assert torch.equal(with_cache, logits)
    outcome.same("acts", acts)
    torch.testing.assert_close(acts, expected)


def test_until_it_is_removed(clean: Any, outcome: Outcome) -> None:
    before = clean(tiny_tokens())
    clean.add_sae(tiny_sae(RESIDUAL))
    with_one = clean(tiny_tokens())
    clean.add_sae(tiny_sae(MLP))
    with_two = clean(tiny_tokens())
    assert not torch.equal(with_one, before) and not torch.equal(with_two, with_one)
    outcome.same("logits", with_two)
    clean.reset_saes(act_names=[MLP] if MLP in clean.acts_to_saes else list(clean.acts_to_saes)[1])
    assert torch.equal(clean(tiny_tokens()), with_one)
    clean.reset_saes()
    assert torch.equal(clean(tiny_tokens()), before)


def test_the_error_term_keeps_the_model_s_logits(clean: Any, outcome: Outcome) -> None:
    before = clean(tiny_tokens())
    sae = tiny_sae(RESIDUAL)
    kept = clean.run_with_saes(tiny_tokens(), saes=[sae], use_error_term=True)
    torch.testing.assert_close(kept, before)
    sae.use_error_term = True
    clean.add_sae(sae)
    torch.testing.assert_close(clean(tiny_tokens()), before)
    outcome.same("logits", kept)


def test_latents_are_intervened_on(clean: Any, outcome: Outcome) -> None:
    sae = tiny_sae(RESIDUAL)
    logits, acts = cached(clean, sae)
    _, cache = clean.run_with_cache_with_saes(tiny_tokens(), saes=[sae])
    (name,) = [key for key in cache if key.endswith(ACTS)]
    latent = int((acts > 0).sum((0, 1)).argmax())

    def ablate(values: Tensor, hook: Any) -> Tensor:
        values[..., latent] = 0.0
        return values

    ablated = clean.run_with_hooks_with_saes(tiny_tokens(), saes=[sae], fwd_hooks=[(name, ablate)])
    assert not torch.allclose(ablated, logits)
    with torch.no_grad():
        sae.W_dec[latent] = 0.0  # the same by other means
    by_hand = clean.run_with_saes(tiny_tokens(), saes=[sae])
    torch.testing.assert_close(ablated, by_hand)
    outcome.same("logits", ablated)


def test_the_context_manager_restores_what_was_attached(clean: Any, outcome: Outcome) -> None:
    clean.add_sae(tiny_sae(RESIDUAL, seed=1))
    first = clean(tiny_tokens())
    with clean.saes(saes=[tiny_sae(RESIDUAL, seed=5)]):
        other = clean(tiny_tokens())
    assert not torch.equal(other, first)
    assert torch.equal(clean(tiny_tokens()), first)
    outcome.same("logits", other)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_an_sae_that_is_being_trained(clean: Any, architecture: str, outcome: Outcome) -> None:
    torch.manual_seed(43)
    sae = TrainingSAE.from_dict(config(architecture).to_dict()).eval()
    sae.cfg.metadata.hook_name = RESIDUAL
    logits, acts = cached(clean, sae)
    assert acts.shape[-1] == sae.cfg.d_sae
    outcome.close("logits", logits, 1e-5)
    outcome.close("acts", acts.to_dense(), 1e-5)


def test_text_is_generated_with_an_sae(clean: Any, outcome: Outcome) -> None:
    with clean.saes(saes=[tiny_sae(RESIDUAL)]):
        written = clean.generate(
            tiny_tokens(2, 5), max_new_tokens=7, do_sample=False, verbose=False,
            stop_at_eos=False,
        )  # fmt: skip
    assert written.shape == (2, 12)
    outcome.same("tokens", written)


def test_parts_of_an_sae(outcome: Outcome, tmp_path: Path) -> None:
    sae = tiny_sae(RESIDUAL)
    x = torch.randn(7, D_MODEL)
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))
    reconstruction = sae(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae))
    torch.testing.assert_close(sae(x), reconstruction)
    sae.save_model(tmp_path)
    outcome.same("files", sorted(path.name for path in tmp_path.iterdir()))
    read = type(sae).load_from_disk(tmp_path)
    assert type(read) is type(sae)
    assert torch.equal(read(x), sae(x))
    outcome.same("reconstruction", read(x))
