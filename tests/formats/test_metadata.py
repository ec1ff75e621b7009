"""What a dictionary's metadata records of its training holds wherever it is judged or used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sae_lens import SAE
from safetensors.torch import save_file

from jumprelu_plugin.analysis.steering import Add, steer
from jumprelu_plugin.analysis.top_activations import collect_top_activations
from jumprelu_plugin.evaluation import evaluate
from jumprelu_plugin.finetune.runner import pretrained_flags
from jumprelu_plugin.formats import export, load_dictionary
from jumprelu_plugin.formats.saved import load_saved
from jumprelu_plugin.models.options import ModelOptions
from tests.dictionaries import random_sae
from tests.families import model_folder
from tests.tiny import (
    BOS,
    D_HEAD,
    HEADS,
    RESIDUAL,
    tiny_hf,
    tiny_models,
    tiny_sae,
    tiny_tokenizer,
    tiny_tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD = 1
TOKENS = tiny_tokens(5, 13)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_models(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder("gpt2", tmp_path_factory.mktemp("gpt2"))


def head_sae() -> Any:
    """A random SAE of one head of hook_z."""
    sae = tiny_sae(RESIDUAL, d_in=D_HEAD)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index = HEADS, HEAD
    return sae


def saved(folder: Path, sae: Any, **metadata: Any) -> Path:
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    sae.save_model(folder)
    return folder


def text_loss(model: Any, hook: str, function: Any) -> float:
    """The mean loss where neither token is BOS, with a plain TransformerLens hook."""
    with torch.no_grad():
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, function)])
    losses = F.cross_entropy(logits[:, 1:-1].flatten(0, 1), TOKENS[:, 2:].flatten())
    return float(losses)


# ---------------------------------------------------------------- hook_head_index


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_one_head_is_judged_alone(kind: str, models: Any) -> None:
    model, sae = getattr(models, kind), head_sae()
    found = evaluate(model, sae, TOKENS)

    def replace(z: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = z.clone()
        changed[:, 1:, HEAD] = sae.decode(sae.encode(z[:, 1:, HEAD]))
        return changed

    assert found.loss_spliced == pytest.approx(text_loss(model, HEADS, replace), rel=1e-5)
    z = model.run_with_cache(TOKENS, names_filter=[HEADS])[1][HEADS][:, 1:, HEAD].flatten(0, 1)
    acts = sae.encode(z)
    error = (z - sae.decode(acts)).square().sum() / (z - z.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(error), rel=1e-5)
    assert found.l0 == pytest.approx(float((acts > 0).sum(-1).float().mean()), rel=1e-6)


def test_one_head_is_steered_and_searched_alone(models: Any) -> None:
    model, sae = models.hooked, head_sae()
    seen: list[torch.Tensor] = []

    def note(z: torch.Tensor, hook: Any) -> None:
        seen.append(z.clone())

    text_loss(model, HEADS, note)
    with steer(model, sae, Add(7, 3.0)):
        text_loss(model, HEADS, note)
    difference = seen[1] - seen[0]
    torch.testing.assert_close(
        difference[:, :, HEAD], (3 * sae.W_dec[7]).expand_as(difference[:, :, HEAD])
    )
    difference[:, :, HEAD] = 0
    assert not difference.any()
    top = collect_top_activations(model, sae, TOKENS, special_token_ids=[BOS])
    acts = sae.encode(seen[0][:, 1:, HEAD])
    torch.testing.assert_close(top.activation[:, 0], acts.flatten(0, 1).amax(0).clamp_min(0))


def test_one_head_stays_one_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "sae", head_sae())
    export(folder, "saelens", tmp_path / "again")
    again = SAE.load_from_disk(tmp_path / "again")
    assert again.cfg.metadata.hook_head_index == HEAD and again.cfg.reshape_activations == "none"
    for target in ("gemma-scope", "dictionary-learning"):
        with pytest.raises(ValueError, match=f"reads head {HEAD} of {HEADS} alone"):
            export(folder, target, tmp_path / target, unchecked=True)
    head = f"--hook_head_index={HEAD}"
    assert head in pretrained_flags(folder, [])
    assert head not in pretrained_flags(folder, ["--hook_name", RESIDUAL])


# ---------------------------------------------------------------- which tokens


def test_only_positions_and_tokens_that_it_was_trained_on_count(models: Any) -> None:
    model, sae = models.hooked, tiny_sae()
    word = int(TOKENS[0, 4])
    sae.cfg.metadata.seqpos_slice = [3, -2]
    sae.cfg.metadata.exclude_special_tokens = [word]
    counted = torch.zeros(TOKENS.shape, dtype=torch.bool)
    counted[:, 3:-2] = True
    counted &= word != TOKENS
    found = evaluate(model, sae, TOKENS)
    assert found.n_tokens == int(counted.sum()) < 5 * 8
    x = model.run_with_cache(TOKENS, names_filter=[RESIDUAL])[1][RESIDUAL][counted]
    acts = sae.encode(x)
    assert found.l0 == pytest.approx(float((acts > 0).sum(-1).float().mean()), rel=1e-6)
    top = collect_top_activations(model, sae, TOKENS)
    torch.testing.assert_close(top.latent_density, (acts > 0).float().mean(0))
    sae.cfg.metadata.seqpos_slice = ["first"]
    with pytest.raises(ValueError, match="seqpos_slice.*whole number"):
        evaluate(model, sae, TOKENS)


# ---------------------------------------------------------------- the model


def test_the_model_is_loaded_with_the_recorded_arguments(
    gpt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(
        tmp_path / "sae",
        tiny_sae(RESIDUAL, d_in=24),
        model_name=str(gpt2),
        model_class_name="TransformerBridge",
        model_from_pretrained_kwargs={"center_writing_weights": True, "trust_remote_code": True},
    )

    def centered(options: ModelOptions) -> bool:
        model = load_saved(folder, options).model
        x = model.run_with_cache(TOKENS, names_filter=[RESIDUAL])[1][RESIDUAL]
        return bool(x.mean(-1).abs().max() < 1e-5)

    with caplog.at_level(logging.WARNING, logger="sae_lens"):
        assert centered(ModelOptions())
        assert "in place of" not in caplog.text
        # A copy of the model under another name is processed as the recorded one was.
        copy = model_folder("gpt2", tmp_path / "copy")
        assert centered(ModelOptions(model_name=str(copy)))
        assert f"model_name {copy} in place of the recorded {gpt2}" in caplog.text
        assert not centered(ModelOptions(model_from_pretrained_kwargs={}))
        assert "center_writing_weights" in caplog.text
    choice = ModelOptions().resolve({"model_name": "m", "model_from_pretrained_kwargs": {}}, "f")
    assert "trust_remote_code" not in choice.from_pretrained_kwargs


def test_a_context_longer_than_the_models_is_refused(gpt2: Path, tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "sae",
        tiny_sae(RESIDUAL, d_in=24),
        model_name=str(gpt2),
        model_class_name="TransformerBridge",
    )
    assert load_saved(folder).choice.context_size == 40  # not 128: the model takes no more
    with pytest.raises(ValueError, match="context_size is 41.*at most 40"):
        load_saved(folder, context_size=41)
    with pytest.raises(ValueError, match="use_hook_mlp_in"):
        load_saved(folder, ModelOptions(hook_name="blocks.1.hook_mlp_in"))


def test_an_sae_of_a_plain_model_is_judged_on_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_tokenizer(folder)
    tiny_hf().save_pretrained(folder)
    sae = tiny_sae()
    bridge = evaluate(tiny_models(tmp_path / "tokenizer").hooked, sae, TOKENS)
    path = saved(
        tmp_path / "sae",
        sae,
        hook_name="model.layers.1",
        model_name=str(folder),
        model_class_name="AutoModelForCausalLM",
    )
    loaded = load_saved(path)
    found = evaluate(loaded.model, loaded.dictionary, TOKENS)
    for name in ("fvu", "l0", "loss_clean", "loss_spliced"):
        assert getattr(found, name) == pytest.approx(getattr(bridge, name), rel=1e-4), name


# ---------------------------------------------------------------- files of other formats


def test_a_file_of_another_format_is_judged(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_tokenizer(folder)
    tiny_hf().save_pretrained(folder)
    sae = tiny_sae()
    sae.cfg.apply_b_dec_to_input = False  # as Gemma Scope's format has it
    arrays = {name: value.detach().numpy() for name, value in sae.state_dict().items()}
    path = tmp_path / "params.npz"
    np.savez(path, **arrays)
    options = ModelOptions(model_name=str(folder), hook_name=RESIDUAL)
    loaded = load_saved(path, options)
    found = evaluate(loaded.model, loaded.dictionary, TOKENS)
    assert found.l0 == pytest.approx(evaluate(loaded.model, sae, TOKENS).l0)
    with pytest.raises(ValueError, match="--hook_name"):
        load_saved(path, ModelOptions(model_name=str(folder)))
    assert torch.equal(load_dictionary(path).parameters.W_enc, sae.W_enc)
    export(path, "saelens", tmp_path / "out", hook_name=RESIDUAL)
    other = path.rename(tmp_path / "mine.npz")
    with pytest.raises(ValueError, match="not a dictionary's file.*params.npz"):
        load_dictionary(other)


@pytest.mark.parametrize(
    ("folder", "hooks"),
    [
        ("resid_post/layer_7_width_16k_l0_small", ("blocks.7.hook_resid_post",) * 2),
        ("attn_out_all/layer_3_width_16k_l0_small", ("blocks.3.attn.hook_z",) * 2),
        ("mlp_out/layer_11_width_16k_l0_big", ("blocks.11.hook_mlp_out",) * 2),
        ("transcoder/layer_5_width_16k", ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")),
    ],
)
def test_gemma_scope_2_without_config_is_known_by_its_folder(
    folder: str, hooks: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "gemma-scope-2-270m-pt" / folder
    path.mkdir(parents=True)
    tensors = random_sae().state_dict().items()
    save_file(
        {key.replace("W_", "w_"): value for key, value in tensors}, path / "params.safetensors"
    )
    found = load_dictionary(path)
    assert (found.hook_name, found.hook_name_out) == hooks
    assert found.model_name == "google/gemma-3-270m"  # as SAELens' loader has it
    config = '{"architecture": "jump_relu", "hf_hook_point_in": "model.layers.2.output", %s}'
    (path / "config.json").write_text(config % '"hf_hook_point_out": "model.layers.2.odd.output"')
    with pytest.raises(ValueError, match="'model.layers.2.odd.output' as hf_hook_point_out"):
        load_dictionary(path)
    assert load_dictionary(path, hook_name_out=RESIDUAL).hook_name_out == RESIDUAL


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("context_size", "128", "a whole number from 1 on"),
        ("context_size", 64.0, "a whole number from 1 on"),
        ("context_size", -5, "a whole number from 1 on"),
        ("context_size", True, "a whole number from 1 on"),
        ("prepend_bos", "false", "true or false"),
        ("disable_concat_sequences", 1, "true or false"),
        ("hook_head_index", "1", "a whole number from 0 on"),
        ("exclude_special_tokens", "[1, 2]", "true, false or a list of token ids"),
        ("exclude_special_tokens", ["a"], "true, false or a list of token ids"),
    ],
)
def test_an_entry_of_another_type_is_refused(
    tmp_path: Path, name: str, value: Any, expected: str
) -> None:
    folder = saved(tmp_path / "sae", random_sae(), **{name: value})
    with pytest.raises(ValueError, match=rf"cfg\.json has {name} .*; expected {expected}"):
        load_saved(folder)
