"""Absolute positions mean the same with a KV cache, without one and by hand, in every family."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.analysis.steering import Add, steer
from jumprelu_plugin.models.language_models import load_model
from tests.families import FAMILIES, D, model_folder
from tests.tiny import VOCABULARY, tiny_sae

HOOK = "blocks.1.hook_resid_post"
KEY_VALUE_FAMILIES = [family for family in FAMILIES if family != "mamba"]
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "return_type": "tokens",
           "stop_at_eos": False}  # fmt: skip


@pytest.fixture(scope="module", params=KEY_VALUE_FAMILIES)
def family(request, tmp_path_factory):
    folder = model_folder(request.param, tmp_path_factory.mktemp(request.param))
    return load_model(folder, "TransformerBridge")


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(4, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))


def by_hand(model, prompt, steps, where, vector):
    """Greedy decoding, one pass over the whole sequence per token, the vector added at `where`."""

    def add(x, hook):
        mask = torch.zeros(x.shape[1], 1)
        mask[where if isinstance(where, slice) else [i for i in where if i < len(mask)]] = 1
        return x + mask * vector

    tokens = prompt
    for _ in range(steps):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, add)])
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@torch.no_grad()
@pytest.mark.parametrize(
    ("positions", "with_a_cache_unread"),
    [(0, [0, *range(5, 11)]), ([7, 8], []), (slice(4, None), [4])],
)
def test_positions_with_and_without_a_cache_are_the_loop_by_hand(
    family, prompt, positions, with_a_cache_unread
):
    sae = tiny_sae(HOOK, d_in=D)
    where = [positions] if isinstance(positions, int) else positions
    expected = by_hand(family, prompt, 6, where, 5.0 * sae.W_dec[7])
    with steer(family, sae, Add(7, 5.0, positions=positions)):
        # TransformerLens' own cached generation of an MPT differs from transformers' unsteered too.
        for cache in (False,) if family.cfg.model_name.startswith("mpt") else (True, False):
            found = family.generate(prompt, use_past_kv_cache=cache, **OPTIONS)
            assert torch.equal(found, expected)
        in_transformers = family.original_model.generate(
            prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1,
            attention_mask=torch.ones_like(prompt),
        )  # fmt: skip
        assert torch.equal(in_transformers, expected)
    wrong = by_hand(family, prompt, 6, with_a_cache_unread, 5.0 * sae.W_dec[7])
    assert not torch.equal(expected, wrong)


@torch.no_grad()
def test_a_cache_that_does_not_tell_its_length_is_refused(prompt, tmp_path):
    sae = tiny_sae("blocks.1.hook_out", d_in=D)
    mamba = load_model(model_folder("mamba", tmp_path), "TransformerBridge")
    with (
        steer(mamba, sae, Add(7, 5.0, positions=[7, 8])),
        pytest.raises(ValueError, match="length cannot be read.*positions=None or 'last'"),
    ):
        mamba.generate(prompt, **OPTIONS)
    with steer(mamba, sae, Add(7, 40.0)):
        assert mamba.generate(prompt, **OPTIONS).shape == (2, 11)
