"""Add, clamp and ablate against their definitions."""

from __future__ import annotations

import warnings

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig

from jumprelu_plugin.analysis.steering import Ablate, Add, Clamp, steer, steering_vector
from tests.analysis.steering.edits import edited, frequent_latents, latents, steered
from tests.tiny import D_HEAD, D_MODEL, HEADS, MLP, RESIDUAL, WIDTH, tiny_hooked, tiny_sae

# --- one latent, by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("hook", WIDTH)
def test_add_is_exactly_a_decoder_row(models, tokens, hook):
    sae = tiny_sae(hook)
    expected = edited(models.hooked, tokens, hook, lambda x: x + 2.5 * sae.W_dec[7])
    found = steered(models.hooked, sae, Add(7, 2.5), tokens)
    assert torch.equal(found, expected)
    assert (found - models.hooked(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("hook", WIDTH)
def test_clamp_and_ablate_move_along_the_decoder_row_by_the_difference(models, tokens, hook):
    sae = tiny_sae(hook)
    clean = models.hooked(tokens)
    for latent in frequent_latents(models.hooked, sae, tokens, hook):
        for intervention, value in ((Clamp(latent, 1.75), 1.75), (Ablate(latent), 0.0)):

            def edit(x, i=latent, value=value):
                return x + (value - latents(sae, x)[..., i : i + 1]) * sae.W_dec[i]

            expected = edited(models.hooked, tokens, hook, edit)
            found = steered(models.hooked, sae, intervention, tokens)
            torch.testing.assert_close(found, expected)
            never_fires = torch.equal(expected, clean)
            assert never_fires or (expected - clean).abs().max() > 0.01


@torch.no_grad()
def test_activations_that_are_decoded_by_unit_rows(models, tokens):
    """SAELens' TopK SAEs in training multiply activations by the rows' norms."""
    torch.manual_seed(6)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=41, k=5))
    sae.W_dec *= torch.rand(41, 1) * 3 + 0.5
    sae.cfg.metadata.hook_name = RESIDUAL
    assert sae.cfg.rescale_acts_by_decoder_norm

    def edit(x):
        acts = sae.encode(x).to_dense()
        changed = acts.clone()
        changed[..., 7], changed[..., 11] = 3.0, acts[..., 11] + 1.5
        return x + sae.decode(changed) - sae.decode(acts)

    expected = edited(models.hooked, tokens, RESIDUAL, edit)
    found = steered(models.hooked, sae, [Clamp(7, 3.0), Add(11, 1.5)], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    one = torch.zeros(1, 41)
    one[0, 7] = 2.0
    vector = sae.decode(one)[0] - sae.b_dec
    torch.testing.assert_close(steering_vector(sae, {7: 2.0}), vector)


def test_ablating_a_latent_that_does_not_fire_changes_nothing_at_all(models, tokens):
    sae = tiny_sae()
    with torch.no_grad():
        sae.threshold[4] = 1e9
    assert torch.equal(steered(models.hooked, sae, Ablate(4), tokens), models.hooked(tokens))


@torch.no_grad()
@pytest.mark.parametrize("hook", WIDTH)
def test_steering_is_splicing_with_the_error_term(models, tokens, hook):
    """The same thing said SAELens' way: splice, edit the latents, add the error back."""
    sae = tiny_sae(hook)
    first, second, _ = frequent_latents(models.hooked, sae, tokens, hook)

    def set_latents(acts, hook):
        acts[..., first] = 3.0
        acts[..., second] = 0.0
        acts[:, :, 11] += 1.5
        return acts

    name = f"{hook}.hook_sae_acts_post"
    with models.hooked.saes([sae], use_error_term=True):
        expected = models.hooked.run_with_hooks(tokens, fwd_hooks=[(name, set_latents)])
    found = steered(models.hooked, sae, [Clamp(first, 3.0), Ablate(second), Add(11, 1.5)], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - models.hooked(tokens)).abs().max() > 0.1


# --- several, and where ----------------------------------------------------------------------


def test_interventions_on_one_latent_act_in_order(models, tokens):
    sae = tiny_sae()
    first, _, _ = frequent_latents(models.hooked, sae, tokens, RESIDUAL)

    def run(*interventions):
        return steered(models.hooked, sae, interventions, tokens)

    torch.testing.assert_close(run(Clamp(first, 2.0), Add(first, 0.5)), run(Clamp(first, 2.5)))
    assert torch.equal(run(Add(first, 0.5), Clamp(first, 2.0)), run(Clamp(first, 2.0)))
    assert torch.equal(run(Add(first, 9.0), Ablate(first)), run(Ablate(first)))
    torch.testing.assert_close(run(Add(3, 0.5), Add(3, 0.25)), run(Add(3, 0.75)))
    assert not torch.allclose(run(Clamp(first, 2.0), Add(first, 0.5)), run(Clamp(first, 2.0)))


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        ("last", [12]),
        (4, [4]),
        ([2, 7, 3], [2, 3, 7]),
        ((5,), [5]),
        (slice(3, 9, 2), [3, 5, 7]),
        (slice(1, None), list(range(1, 13))),
        (slice(None, 40, 6), [0, 6, 12]),
        ([11, 40], [11]),
    ],
)
@pytest.mark.parametrize(("batch", "rows"), [(None, [0, 1, 2, 3, 4]), (3, [3]), ([4, 1], [1, 4])])
def test_positions_and_rows(models, tokens, positions, columns, batch, rows):
    sae = tiny_sae()
    first, _, _ = frequent_latents(models.hooked, sae, tokens, RESIDUAL)
    where = torch.zeros(5, 13, 1)
    for row in rows:
        where[row, columns] = 1.0

    def edit(x):
        added = x + where * 1.5 * sae.W_dec[9]
        return added + where * (2.0 - latents(sae, x)[..., first : first + 1]) * sae.W_dec[first]

    expected = edited(models.hooked, tokens, RESIDUAL, edit)
    plan = [
        Add(9, 1.5, positions=positions, batch=batch),
        Clamp(first, 2.0, positions=positions, batch=batch),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = steered(models.hooked, sae, plan, tokens)
    torch.testing.assert_close(found, expected)
    untouched = [row for row in range(5) if row not in rows]
    assert torch.equal(found[untouched], models.hooked(tokens)[untouched])
    assert torch.equal(found[:, : min(columns)], models.hooked(tokens)[:, : min(columns)])


def test_nested_blocks_see_each_other_and_end_in_turn(models, tokens):
    sae, heads = tiny_sae(), tiny_sae(HEADS)
    clean = models.hooked(tokens)
    with torch.no_grad():
        outer_alone = steered(models.hooked, sae, Add(3, 2.0), tokens)
        with steer(models.hooked, sae, Add(3, 2.0)):
            with steer(models.hooked, sae, Clamp(3, 1.0)), steer(models.hooked, heads, Add(5, 1.0)):
                found = models.hooked(tokens)
            assert torch.equal(models.hooked(tokens), outer_alone)
        assert torch.equal(models.hooked(tokens), clean)

        def edit(x):
            x = x + 2.0 * sae.W_dec[3]
            return x + (1.0 - latents(sae, x)[..., 3:4]) * sae.W_dec[3]

        with steer(models.hooked, heads, Add(5, 1.0)):
            expected = edited(models.hooked, tokens, RESIDUAL, edit)
    torch.testing.assert_close(found, expected)


def test_a_transcoder_reads_one_hook_and_writes_another(models, tokens):
    read = "blocks.1.ln2.hook_normalized"
    config = JumpReLUTranscoderConfig(
        d_in=D_MODEL, d_out=D_MODEL, d_sae=29, apply_b_dec_to_input=False,
        metadata=SAEMetadata(hook_name=read, hook_name_out=MLP),
    )  # fmt: skip
    sae = JumpReLUTranscoder(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        sae.threshold.abs_()
    _, cache = models.hooked.run_with_cache(tokens, names_filter=read)
    z = cache[read] @ sae.W_enc + sae.b_enc
    acts = z * (z > sae.threshold)

    def edit(x):
        return x + (2.0 - acts[..., 6:7]) * sae.W_dec[6]

    expected = edited(models.hooked, tokens, MLP, edit)
    torch.testing.assert_close(steered(models.hooked, sae, Clamp(6, 2.0), tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hook", [RESIDUAL, HEADS])
def test_low_precision_models_are_steered_in_float32_and_cast_back(models, tokens, dtype, hook):
    model = tiny_hooked(models.hf, models.tokenizer).to(dtype)
    sae = tiny_sae(hook)
    first, _, _ = frequent_latents(models.hooked, sae, tokens, hook)

    def edit(x):
        wide = x.float()
        return (wide + (2.0 - latents(sae, wide)[..., first : first + 1]) * sae.W_dec[first]).to(x)

    expected = edited(model, tokens, hook, edit)
    found = steered(model, sae, Clamp(first, 2.0), tokens)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(tokens))


# --- the vector, and bad input ---------------------------------------------------------------


def test_steering_vector_is_what_add_adds(models, tokens):
    sae = tiny_sae()
    vector = steering_vector(sae, {3: 1.5, 29: -0.5, 40: 2.0})
    by_hand = 1.5 * sae.W_dec[3] - 0.5 * sae.W_dec[29] + 2.0 * sae.W_dec[40]
    assert vector.shape == (D_MODEL,)
    assert vector.dtype == torch.float32 and not vector.requires_grad
    torch.testing.assert_close(vector, by_hand.detach())
    plan = [Add(3, 1.5), Add(29, -0.5), Add(40, 2.0)]
    torch.testing.assert_close(
        steered(models.hooked, sae, plan, tokens),
        edited(models.hooked, tokens, RESIDUAL, lambda x: x + vector),
    )
    assert steering_vector(tiny_sae(HEADS), {3: 1.0}).shape == (3 * D_HEAD,)
    assert steering_vector(sae.to(dtype=torch.bfloat16), {3: 1.0}).dtype == torch.float32


def test_gradients_flow_through_steering(models, tokens):
    sae = tiny_sae()
    with steer(models.hooked, sae, Clamp(7, 2.0)):
        models.hooked(tokens).sum().backward()
    assert models.hooked.blocks[0].mlp.W_in.grad.abs().sum() > 0
    models.hooked.zero_grad()
