from __future__ import annotations

import warnings

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig
from tiny import (
    D_HEAD,
    D_MODEL,
    HEADS,
    MLP,
    RESIDUAL,
    WIDTH,
    tiny_bridge,
    tiny_hf,
    tiny_hooked,
    tiny_models,
    tiny_sae,
    tiny_tokens,
)

from jumprelu_plugin.analysis.steering import Ablate, Add, Clamp, steer, steering_vector
from jumprelu_plugin.models.hooks import attached, hook_point

CANONICAL = {
    RESIDUAL: "blocks.1.hook_out",
    HEADS: "blocks.1.attn.o.hook_in",
    MLP: "blocks.1.ln2_post.hook_out",
}
BRIDGES = ["compatible", "plain", "compatible after a splice", "plain after a splice"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens():
    return tiny_tokens(sequences=5, positions=13)


@pytest.fixture(params=BRIDGES)
def bridge(request, models):
    """A bridge with and without compatibility mode, fresh and after SAEs came and went."""
    compatibility = request.param.startswith("compatible")
    model = tiny_bridge(tiny_hf(), models.tokenizer, compatibility=compatibility)
    if request.param.endswith("splice"):
        for hook in WIDTH:
            with model.saes([tiny_sae(hook)]):
                pass
    return model


def latents(sae, x):
    """a = z·H(z − θ), z = (x − b_dec) W_enc + b_enc, from the weights alone."""
    z = (x.flatten(start_dim=2) if x.ndim == 4 else x) - sae.b_dec
    z = z @ sae.W_enc + sae.b_enc
    return z * (z > sae.threshold)


@torch.no_grad()
def edited(model, tokens, hook, edit):
    """Logits with `edit(x [batch, position, d], a [batch, position, d_sae])` in place of x."""

    def replace(x, hook):
        return edit(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    return model.run_with_hooks(tokens, fwd_hooks=[(hook, replace)])


@torch.no_grad()
def steered(model, sae, interventions, tokens):
    with steer(model, sae, interventions):
        return model(tokens)


def frequent_latents(model, sae, tokens, hook):
    """The two latents that fire most, though not everywhere, and one that never fires here."""
    _, cache = model.run_with_cache(tokens, names_filter=hook)
    rates = (latents(sae, cache[hook]) > 0).float().mean(dim=(0, 1))
    first, second = torch.where(rates < 1, rates, 0).argsort(descending=True)[:2].tolist()
    assert rates[second] > 0.2
    return first, second, rates.argsort()[0].item()


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


# --- bridges ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("hook", WIDTH)
def test_a_bridge_is_steered_exactly_once(models, tokens, bridge, hook):
    """Not zero times (an alias without compatibility mode), not twice (a name left by a splice)."""
    sae = tiny_sae(hook)
    first, _, _ = frequent_latents(models.hooked, sae, tokens, hook)
    clean = bridge(tokens)
    for intervention in (Add(7, 2.0), Clamp(first, 1.5), Ablate(first)):
        expected = steered(models.hooked, sae, intervention, tokens)
        calls = []
        with (
            attached(bridge, hook, lambda x, calls=calls: calls.append(x.shape)),
            steer(bridge, sae, intervention),
        ):
            found = bridge(tokens)
        assert len(calls) == 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - clean).abs().max() > 0.02
    assert torch.equal(bridge(tokens), clean)


@torch.no_grad()
@pytest.mark.parametrize("hook", WIDTH)
def test_a_bridge_may_be_named_by_its_own_hooks(models, tokens, bridge, hook):
    alias, canonical = tiny_sae(hook), tiny_sae(hook)
    canonical.cfg.metadata.hook_name = CANONICAL[hook]
    assert hook_point(bridge, hook) is hook_point(bridge, CANONICAL[hook])
    with_alias = steered(bridge, alias, Clamp(7, 2.0), tokens)
    assert torch.equal(steered(bridge, canonical, Clamp(7, 2.0), tokens), with_alias)


@torch.no_grad()
def test_steering_a_bridge_is_splicing_with_the_error_term(models, tokens, bridge):
    """Latent hooks exist on a bridge under the canonical name only."""
    sae = tiny_sae()
    first, second, _ = frequent_latents(models.hooked, sae, tokens, RESIDUAL)

    def set_latents(acts, hook):
        acts[..., first] = 3.0
        acts[..., second] = 0.0
        return acts

    with bridge.saes([sae], use_error_term=True):
        name = bridge.get_sae_hook_name(sae)
        expected = bridge.run_with_hooks(tokens, fwd_hooks=[(name, set_latents)])
    found = steered(bridge, sae, [Clamp(first, 3.0), Ablate(second)], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - bridge(tokens)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("hook", WIDTH)
def test_after_steering_the_bridge_own_hooks_fire_once(tokens, bridge, hook):
    """A splice and reset leaves wrong names; the first look-up puts them right for everyone."""
    steered(bridge, tiny_sae(hook), Add(7, 2.0), tokens)
    names = [CANONICAL[hook]]
    if bridge.compatibility_mode:  # without it a bridge takes no aliases here, by its own rules
        names.append(hook)
    for name in names:
        calls = []

        def count(x, hook, calls=calls):
            calls.append(x.shape)

        with bridge.hooks(fwd_hooks=[(name, count)]):
            bridge(tokens)
        assert len(calls) == 1, name
        bridge.add_hook(name, count)
        bridge(tokens)
        bridge.reset_hooks()
        assert len(calls) == 2, name
        _, cache = bridge.run_with_cache(tokens, names_filter=[name])
        assert name in cache.cache_dict, name


@torch.no_grad()
@pytest.mark.parametrize("compatibility", [True, False])
def test_a_healthy_bridge_keeps_its_names_and_its_cache_keys(models, tokens, compatibility):
    bridge = tiny_bridge(tiny_hf(), models.tokenizer, compatibility=compatibility)
    names = {name: point.name for name, point in bridge.hook_dict.items()}
    keys = bridge.run_with_cache(tokens)[1].cache_dict.keys()
    for hook in WIDTH:
        steered(bridge, tiny_sae(hook), Add(7, 2.0), tokens)
    assert {name: point.name for name, point in bridge.hook_dict.items()} == names
    assert bridge.run_with_cache(tokens)[1].cache_dict.keys() == keys


# --- generation ------------------------------------------------------------------------------


def continued_by_hand(model, prompt, steps, hook, edit):
    """Greedy decoding, one full pass per token, no cache; `edit` sees absolute positions."""
    tokens = prompt
    for _ in range(steps):
        logits = edited(model, tokens, hook, edit)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("positions", [None, slice(2, None, 3), [1, 6, 9], slice(7, 8)])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("dress", ["hooked", "bridge"])
def test_generation_with_and_without_a_cache_is_the_loop_by_hand(models, positions, cache, dress):
    sae, model, prompt = tiny_sae(), getattr(models, dress), tiny_tokens(3, 6, seed=8)
    first, _, _ = frequent_latents(models.hooked, sae, prompt, RESIDUAL)
    plan = [Add(9, 6.0, positions=positions), Clamp(first, 7.0, positions=positions)]

    def edit(x):
        where = torch.zeros(x.shape[1], 1)
        chosen = slice(None) if positions is None else positions
        where[chosen if isinstance(chosen, slice) else [i for i in chosen if i < len(where)]] = 1
        x_new = x + where * 6.0 * sae.W_dec[9]
        return x_new + where * (7.0 - latents(sae, x)[..., first : first + 1]) * sae.W_dec[first]

    options = {"max_new_tokens": 9, "do_sample": False, "stop_at_eos": False, "verbose": False,
               "use_past_kv_cache": cache, "return_type": "tokens"}  # fmt: skip
    with torch.no_grad():
        clean = model.generate(prompt, **options)
        expected = continued_by_hand(models.hooked, prompt, 9, RESIDUAL, edit)
        with steer(model, sae, plan):
            found = model.generate(prompt, **options)
        assert torch.equal(model.generate(prompt, **options), clean)
    assert found.shape == (3, 15)
    assert torch.equal(found, expected)
    assert not torch.equal(found, clean)


@torch.no_grad()
def test_last_touches_each_generated_position_once_with_a_cache(models):
    sae, prompt = tiny_sae(), tiny_tokens(3, 6, seed=8)
    options = {"max_new_tokens": 7, "do_sample": False, "stop_at_eos": False, "verbose": False}
    from_the_end_of_the_prompt = slice(5, None)
    for model in (models.hooked, models.bridge):
        with steer(model, sae, Add(9, 12.0, positions="last")):
            found = model.generate(prompt, **options)
        with steer(model, sae, Add(9, 12.0, positions=from_the_end_of_the_prompt)):
            assert torch.equal(model.generate(prompt, **options), found)


@torch.no_grad()
def test_generate_in_transformers_through_a_bridge(models):
    """A bridge's components stay in the transformers model, and so does the steering."""
    sae, prompt = tiny_sae(), tiny_tokens(3, 6, seed=8)
    with steer(models.bridge, sae, Add(9, 12.0, positions=slice(3, None, 2))):
        expected = models.bridge.generate(
            prompt, max_new_tokens=7, do_sample=False, stop_at_eos=False, verbose=False
        )
        found = models.bridge.original_model.generate(
            prompt, max_new_tokens=7, do_sample=False, eos_token_id=-1,
            attention_mask=torch.ones_like(prompt),
        )  # fmt: skip
    assert torch.equal(found, expected)


# --- leaving no trace ------------------------------------------------------------------------


def trace(model):
    """Every function attached anywhere in the model."""
    modules = dict(model.named_modules())
    return {
        name: (
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            [id(handle) for handle in getattr(module, "fwd_hooks", [])],
            getattr(module, "name", None),
        )
        for name, module in modules.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("dress", ["hooked", "bridge"])
@pytest.mark.parametrize("hook", WIDTH)
def test_the_model_is_left_as_it_was(models, tokens, dress, hook):
    model, sae = getattr(models, dress), tiny_sae(hook)
    plan = [Clamp(3, 2.0, positions=[1, 2]), Add(4, 1.0)]
    other = []
    hook_point(model, hook).add_hook(lambda x, hook: other.append(x.shape))
    try:
        clean, before = model(tokens), trace(model)  # a bridge adds hooks at its first forward
        state = {name: sae.__dict__.get(name) for name in ("d_head", "reshape_fn_in")}
        with steer(model, sae, plan):
            assert trace(model) != before
            assert not torch.allclose(model(tokens), clean)
        assert trace(model) == before
        with pytest.raises(KeyError, match="mine"), steer(model, sae, plan):
            model(tokens)
            raise KeyError("mine")
        assert trace(model) == before
        with pytest.raises(ValueError, match="row 5, but the batch has 5"), steer(
            model, sae, Clamp(3, 1.0, batch=5)
        ):  # fmt: skip
            model(tokens)
        assert trace(model) == before
        assert torch.equal(model(tokens), clean)
        assert state == {name: sae.__dict__.get(name) for name in state}
    finally:
        model.reset_hooks()
    assert len(other) == 5


@torch.no_grad()
@pytest.mark.parametrize("dress", ["hooked", "bridge"])
def test_steering_stays_on_through_other_tools(models, tokens, dress):
    """Caching, user hooks, an SAE spliced elsewhere and a reset inside the block."""
    model, sae = getattr(models, dress), tiny_sae()
    expected = steered(model, sae, Add(7, 2.0), tokens)
    with steer(model, sae, Add(7, 2.0)):
        logits, _ = model.run_with_cache(tokens)
        assert torch.equal(logits, expected)
        quiet = [("blocks.0.hook_in" if dress == "bridge" else "hook_embed", lambda x, hook: None)]
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=quiet), expected)
        spliced = model.run_with_saes(tokens, saes=[tiny_sae(MLP)], use_error_term=True)
        torch.testing.assert_close(spliced, expected, rtol=1e-4, atol=1e-4)
        model.reset_hooks()
        assert torch.equal(model(tokens), expected)


def test_steering_that_was_taken_off_is_not_silent(models, tokens):
    sae = tiny_sae()
    hooked = tiny_hooked(models.hf, models.tokenizer)
    with pytest.raises(RuntimeError, match="removed inside the block"), steer(
        hooked, sae, Add(7, 2.0)
    ):  # fmt: skip
        hooked.reset_hooks(including_permanent=True)
    with pytest.raises(RuntimeError, match="an SAE was spliced in there"), steer(
        hooked, sae, Add(7, 2.0)
    ), hooked.saes([sae]):  # fmt: skip
        hooked(tokens)


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


def test_bad_input_is_named(models, tokens):
    sae = tiny_sae()

    def enter(model, sae, plan):
        with steer(model, sae, plan):
            model(tokens)

    before = trace(models.hooked)
    with pytest.raises(ValueError, match=r"Clamp\(latent=41.*d_sae 41.*0 to 40"):
        enter(models.hooked, sae, Clamp(41, 1.0))
    with pytest.raises(ValueError, match="d_sae 41"):
        enter(models.hooked, sae, [Add(2, 1.0), Ablate(-1)])
    with pytest.raises(ValueError, match="No interventions"):
        enter(models.hooked, sae, [])
    with pytest.raises(TypeError, match="Add, Clamp or Ablate; got 3"):
        enter(models.hooked, sae, [3])
    with pytest.raises(ValueError, match="No interventions"):
        steering_vector(sae, {})
    with pytest.raises(ValueError, match="d_sae 41"):
        steering_vector(sae, {41: 1.0})
    unnamed = tiny_sae()
    unnamed.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="no hook name"):
        enter(models.hooked, unnamed, Add(2, 1.0))
    for model in (models.hooked, models.bridge):
        lost = tiny_sae()
        lost.cfg.metadata.hook_name = "blocks.1.hook_resid_pots"
        with pytest.raises(ValueError, match="Close names: .*blocks.1.hook_resid_post"):
            enter(model, lost, Add(2, 1.0))
        for plan in (Add(2, 1.0), Clamp(2, 1.0)):
            with pytest.raises(ValueError, match="'blocks.1.hook_resid_post' has width 33, .* 7"):
                enter(model, tiny_sae(d_in=7), plan)
    with pytest.raises(TypeError, match="no hook points"):
        enter(models.hf, sae, Add(2, 1.0))
    with models.hooked.saes([sae]), pytest.raises(ValueError, match="reset_saes"):
        enter(models.hooked, sae, Add(2, 1.0))
    outside = tiny_sae()
    outside.cfg.metadata.hook_name = "hook_embed"
    with pytest.raises(ValueError, match="inside the model's blocks"):
        enter(models.hooked, outside, Add(2, 1.0, positions=[1]))
    for normalization, message in (("expected_average_only_in", "Fold the scale"),
                                   ("layer_norm", "no fixed steering vector")):  # fmt: skip
        scaled = tiny_sae()
        scaled.cfg.normalize_activations = normalization
        with pytest.raises(ValueError, match=message):
            enter(models.hooked, scaled, Add(2, 1.0))
    models.hooked.setup()  # the splice above put a new hook point in place
    assert trace(models.hooked) == before


@pytest.mark.parametrize("positions", [[-1], slice(-3, None), "first", [], slice(5, 1, -1), -2])
def test_positions_count_from_the_start(positions):
    with pytest.raises(ValueError, match="positions must be"):
        Add(1, 1.0, positions=positions)


def test_interventions_check_their_own_numbers():
    with pytest.raises(ValueError, match="amount must be a finite number; got nan"):
        Add(1, float("nan"))
    with pytest.raises(ValueError, match="value must be a finite number; got inf"):
        Clamp(1, float("inf"))
    for rows in (-1, [], [2, -3]):
        with pytest.raises(ValueError, match="batch must name rows"):
            Ablate(1, batch=rows)
    assert Add(1, 2.0, positions=[3, 4]) == Add(1, 2.0, positions=(3, 4))
    with pytest.raises(AttributeError):
        Add(1, 2.0).amount = 3.0  # pyright: ignore[reportAttributeAccessIssue]


def test_an_intervention_that_touched_nothing_is_said(models, tokens):
    with pytest.warns(UserWarning, match=r"applied to no position .*latent=8"):
        steered(models.hooked, tiny_sae(), [Add(7, 1.0), Add(8, 1.0, positions=40)], tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(models.hooked, tiny_sae(), Add(8, 1.0, positions=40)):
            pass
