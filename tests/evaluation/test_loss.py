"""Losses of a model with a dictionary spliced in, against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
)

from jumprelu_plugin.evaluation import delta_lm_loss, evaluate, evaluated_positions
from jumprelu_plugin.models.hooks import hook_point
from tests.evaluation.two_passes import two_pass
from tests.tiny import (
    BOS,
    D_MODEL,
    EOS,
    HEADS,
    MLP,
    PAD,
    RESIDUAL,
    VOCABULARY,
    WIDTH,
    tiny_bridge,
    tiny_hf,
    tiny_sae,
)

SPECIAL = [PAD, EOS, BOS]
MLP_IN = "blocks.1.ln2.hook_normalized"


def by_hand(model, sae, tokens, hook_in, hook_out=None, special=SPECIAL):
    """The definition, one sequence and one position at a time, in TransformerLens' own words."""
    hook_out = hook_out or hook_in
    special = set(special)
    targets = []
    for row in tokens:
        _, cache = model.run_with_cache(row[None], names_filter=[hook_in, hook_out])
        targets += [
            cache[hook_out][0, t] for t, token in enumerate(row) if token.item() not in special
        ]
    mean = torch.stack(targets).mean(dim=0)
    sums = {"clean": 0.0, "spliced": 0.0, "mean_ablated": 0.0, "zero_ablated": 0.0}
    n_predictions = 0
    for row in tokens:
        _, cache = model.run_with_cache(row[None], names_filter=[hook_in])
        z = (cache[hook_in][0].flatten(start_dim=1) - sae.b_dec * (hook_in == hook_out)) @ sae.W_enc
        z = z + sae.b_enc
        reconstruction = (z * (z > sae.threshold)) @ sae.W_dec + sae.b_dec
        for name in sums:

            def replace(activation, hook, name=name, row=row, made=reconstruction):
                for t, token in enumerate(row):
                    if token.item() in special or name == "clean":
                        continue
                    if name == "spliced":
                        activation[0, t] = made[t].reshape(activation[0, t].shape)
                    else:
                        activation[0, t] = mean if name == "mean_ablated" else 0.0
                return activation

            logits = model.run_with_hooks(row[None], fwd_hooks=[(hook_out, replace)])[0]
            for t in range(len(row) - 1):
                if row[t].item() not in special and row[t + 1].item() not in special:
                    sums[name] -= logits[t].log_softmax(-1)[row[t + 1]].item()
                    n_predictions += name == "clean"
    return {name: total / n_predictions for name, total in sums.items()}, n_predictions


def found_losses(losses):
    return {name: getattr(losses, name) for name in
            ("clean", "spliced", "mean_ablated", "zero_ablated")}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("hook", WIDTH)
def test_losses_equal_the_definition(models, tokens, hook):
    sae = tiny_sae(hook)
    expected, n_predictions = by_hand(models.hooked, sae, tokens, hook)
    # Each loss must be its own: otherwise one could stand for another unseen.
    assert np.diff(sorted(expected.values())).min() > 2e-4
    losses = delta_lm_loss(models.hooked, sae, tokens, hook_in=hook, special_token_ids=SPECIAL)
    assert found_losses(losses) == pytest.approx(expected, abs=2e-5)
    assert losses.n_predictions == n_predictions == 7 * 11 - 3 - 4
    assert losses.delta == losses.spliced - losses.clean
    damage = losses.mean_ablated - losses.clean
    if damage > 0:
        recovered = (losses.mean_ablated - losses.spliced) / damage
        assert losses.fraction_recovered == pytest.approx(recovered)
    else:
        assert losses.fraction_recovered is None


def assert_same(found, reference, rel):
    found, reference = found.to_dict(), reference.to_dict()
    for name, value in reference.items():
        near = isinstance(value, float)
        assert found[name] == (pytest.approx(value, rel=rel, abs=rel) if near else value), name


@pytest.mark.parametrize("hook", WIDTH)
def test_every_model_class_gives_the_same_evaluation(models, tokens, hook):
    sae = tiny_sae(hook)
    reference = evaluate(models.hooked, sae, tokens)
    plain = tiny_bridge(tiny_hf(), models.tokenizer, compatibility=False)
    for model in (models.bridge, plain):
        for spliced_before in (False, True):
            if spliced_before:
                with model.saes([sae]):
                    pass
            assert_same(evaluate(model, sae, tokens), reference, rel=2e-5)


def test_batch_size_changes_nothing(models, tokens):
    sae = tiny_sae()
    reference = evaluate(models.hooked, sae, tokens, batch_size=8)
    for batch_size in (1, 3):
        found = evaluate(models.hooked, sae, tokens, batch_size=batch_size)
        assert_same(found, reference, rel=2e-6)


def perfect_sae(hook):
    """x = relu(x) − relu(−x): two latents per dimension, exact."""
    width = WIDTH[hook]
    sae = tiny_sae(hook, d_sae=2 * width)
    eye = torch.eye(width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        for parameter in (sae.b_enc, sae.b_dec, sae.threshold):
            parameter.zero_()
    return sae


@pytest.mark.parametrize("hook", WIDTH)
def test_a_perfect_dictionary_loses_nothing(models, tokens, hook):
    found = evaluate(models.hooked, perfect_sae(hook), tokens)
    assert (found.delta_loss, found.fvu, found.mse) == (0.0, 0.0, 0.0)
    assert found.l0 == pytest.approx(WIDTH[hook])
    assert found.fraction_recovered in (None, 1.0)


@pytest.mark.parametrize("hook", WIDTH)
def test_a_dead_dictionary_is_zero_or_mean_ablation(models, tokens, hook):
    sae = tiny_sae(hook)
    with torch.no_grad():
        sae.threshold.fill_(1e9)
        sae.b_dec.zero_()
    found = evaluate(models.hooked, sae, tokens)
    assert found.loss_spliced == found.loss_zero_ablated != found.loss_clean
    assert (found.l0, found.dead_share) == (0.0, 1.0)
    _, cache = models.hooked.run_with_cache(tokens, names_filter=hook)
    mean = cache[hook].flatten(start_dim=2)[evaluated_positions(tokens, SPECIAL)].double().mean(0)
    with torch.no_grad():
        sae.b_dec.copy_(mean)
    found = evaluate(models.hooked, sae, tokens)
    assert found.loss_spliced == pytest.approx(found.loss_mean_ablated, abs=1e-6)
    assert found.fvu == pytest.approx(1.0, abs=1e-6)
    if found.loss_mean_ablated > found.loss_clean:
        assert found.fraction_recovered == pytest.approx(0.0, abs=1e-4)


def test_special_tokens_are_kept_and_uncounted(models, tokens):
    sae = tiny_sae()
    text = evaluate(models.hooked, sae, tokens)
    assert text.n_tokens == 7 * 12 - 2 - 4
    everything = evaluate(models.hooked, sae, tokens, special_token_ids=())
    assert everything.n_tokens == tokens.numel()
    assert everything.n_predictions == 7 * 12
    expected, _ = by_hand(models.hooked, sae, tokens, RESIDUAL, special=())
    assert everything.loss_spliced == pytest.approx(expected["spliced"], abs=2e-5)
    # What fills the padding must not matter, on the right of the text.
    refilled = tokens.clone()
    refilled[4, 11] = BOS
    assert evaluate(models.hooked, sae, refilled).to_dict() == text.to_dict()


def test_metrics_are_of_the_activation_at_the_hook(models, tokens):
    sae = tiny_sae(HEADS)
    _, cache = models.hooked.run_with_cache(tokens, names_filter=HEADS)
    kept = ~torch.isin(tokens, torch.tensor(SPECIAL))
    x = cache[HEADS].flatten(start_dim=2)[kept]
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = z * (z > sae.threshold)
    expected = two_pass(x, (acts @ sae.W_dec + sae.b_dec).detach(), acts.detach())
    found = evaluate(models.hooked, sae, tokens)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-5)


def transcoder(kind, seed=5):
    metadata = SAEMetadata(hook_name=MLP_IN, hook_name_out=MLP)
    shape = {"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": 31, "apply_b_dec_to_input": False}
    if kind == "jumprelu":
        made = JumpReLUTranscoder(JumpReLUTranscoderConfig(**shape, metadata=metadata))
    else:
        made = SkipTranscoder(SkipTranscoderConfig(**shape, metadata=metadata))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if kind == "jumprelu":
            made.threshold.abs_()
    return made


@torch.no_grad()
def test_a_transcoder_reads_one_hook_and_replaces_another(models, tokens):
    sae = transcoder("jumprelu")
    expected, _ = by_hand(models.hooked, sae, tokens, MLP_IN, MLP)
    found = evaluate(models.hooked, sae, tokens)
    assert (found.hook, found.hook_out) == (MLP_IN, MLP)
    assert found.loss_spliced == pytest.approx(expected["spliced"], abs=2e-5)
    assert found.loss_mean_ablated == pytest.approx(expected["mean_ablated"], abs=2e-5)


@torch.no_grad()
def test_a_skip_transcoder_keeps_its_skip(models, tokens):
    sae = transcoder("skip")
    clean_cache = models.hooked.run_with_cache(tokens, names_filter=[MLP_IN, MLP])[1]
    kept = evaluated_positions(tokens, SPECIAL)
    made = sae(clean_cache[MLP_IN][kept])
    target = clean_cache[MLP][kept]
    expected = (made - target).square().sum() / (target - target.mean(0)).square().sum()
    found = evaluate(models.hooked, sae, tokens)
    assert found.fvu == pytest.approx(expected.item(), rel=1e-5)
    without = target - (made - clean_cache[MLP_IN][kept] @ sae.W_skip.T)
    assert without.square().mean().item() != pytest.approx(found.mse, rel=0.05)


def test_the_model_and_the_sae_are_left_as_found(models, tokens):
    sae = tiny_sae(HEADS)
    for model in (models.hooked, models.bridge):
        seen = []
        hook_point(model, RESIDUAL).add_hook(lambda x, hook, seen=seen: seen.append(x.shape))
        try:
            before = model(tokens)
            hooks = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
            model.blocks[0].train()
            sae_state = {k: v for k, v in vars(sae).items() if not k.startswith("_")}
            evaluate(model, sae, tokens)
            assert model.blocks[0].training and not model.blocks[1].training
            assert sae_state == {k: v for k, v in vars(sae).items() if not k.startswith("_")}
            with pytest.raises(ValueError, match="d_in"):
                evaluate(model, tiny_sae(RESIDUAL, d_in=7), tokens)
            after = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
            assert after == hooks
            assert torch.equal(model(tokens), before)
        finally:
            model.blocks[0].eval()
            model.reset_hooks()
        assert len(seen) > 2
    # A hook_z SAE must still find its heads afterwards.
    _, cache = models.hooked.run_with_cache(tokens, names_filter=HEADS)
    assert sae(cache[HEADS]).shape == cache[HEADS].shape


def test_bad_input_is_named(models, tokens):
    sae = tiny_sae()
    with pytest.raises(ValueError, match="d_in 7 .*blocks.1.hook_resid_post.* width 33"):
        evaluate(models.hooked, tiny_sae(d_in=7), tokens)
    for model in (models.hooked, models.bridge):
        with pytest.raises(ValueError, match=r"no hook 'blocks.1.hook_resid_pots'.*resid_post"):
            evaluate(model, sae, tokens, hook_in="blocks.1.hook_resid_pots")
    with pytest.raises(ValueError, match="has no hook 'blocks.9.hook_resid_post'"):
        evaluate(models.hooked, sae, tokens, hook_out="blocks.9.hook_resid_post")
    with pytest.raises(TypeError, match="Gemma2ForCausalLM has no hook points"):
        evaluate(models.hf, sae, tokens)
    with pytest.raises(ValueError, match="0 are evaluated and 0 predictions"):
        evaluate(models.hooked, sae, torch.full((2, 5), PAD))
    with pytest.raises(ValueError, match="No prediction can be scored"):
        evaluate(models.hooked, sae, tokens[:, :1])
    with pytest.raises(ValueError, match=rf"0 to {VOCABULARY - 1}"):
        evaluate(models.hooked, sae, tokens + VOCABULARY)
    with pytest.raises(ValueError, match="must be integers"):
        evaluate(models.hooked, sae, tokens.float())
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        evaluate(models.hooked, sae, tokens, batch_size=0)
    with models.hooked.saes([sae]), pytest.raises(ValueError, match="spliced into the model"):
        evaluate(models.hooked, sae, tokens)
    unnamed = tiny_sae()
    unnamed.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="no hook name"):
        evaluate(models.hooked, unnamed, tokens)
    assert evaluate(models.hooked, unnamed, tokens, hook_in=RESIDUAL).hook == RESIDUAL
    scaled = tiny_sae()
    scaled.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(ValueError, match="Fold the scale"):
        evaluate(models.hooked, scaled, tokens)


def test_values_that_are_not_finite_name_the_hook(models, tokens):
    weight = models.hooked.blocks[1].mlp.W_out
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("inf")
    try:
        with pytest.raises(ValueError, match="'blocks.1.hook_resid_post' holds NaN or an infinity"):
            evaluate(models.hooked, tiny_sae(), tokens)
        # This hook is below the fault, so only the loss can show it.
        with pytest.raises(ValueError, match="'blocks.1.attn.hook_z' are finite and the model's"):
            evaluate(models.hooked, tiny_sae(HEADS), tokens)
    finally:
        with torch.no_grad():
            weight[0, 0] = kept
    broken = tiny_sae()
    with torch.no_grad():
        broken.b_dec[3] = float("nan")
    with pytest.raises(ValueError, match="The SAE's reconstruction of 'blocks.1.hook_resid_post'"):
        evaluate(models.hooked, broken, tokens)


def test_a_model_without_a_tokenizer_needs_the_special_tokens(models, tokens):
    sae = tiny_sae()
    expected = evaluate(models.hooked, sae, tokens).to_dict()
    tokenizer, models.hooked.tokenizer = models.hooked.tokenizer, None
    try:
        with pytest.raises(ValueError, match="no tokenizer"):
            evaluate(models.hooked, sae, tokens)
        found = evaluate(models.hooked, sae, tokens, special_token_ids=SPECIAL)
    finally:
        models.hooked.tokenizer = tokenizer
    assert found.to_dict() == expected
