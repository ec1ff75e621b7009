"""Keyword arguments of a model's loader: what they ask for is what the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from jumprelu_plugin.analysis.generation import generate
from jumprelu_plugin.models.hooked_auto_model import load_hooked_model
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.loading_keywords import LoadingKeywords
from tests.families import model_folder
from tests.tiny import BOS, RESIDUAL, tiny_hf, tiny_tokenizer, tiny_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("HookedTransformer", "HookedSAETransformer", "TransformerBridge", "AutoModelForCausalLM")
TOKENS = tiny_tokens(3, 11)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    tiny_tokenizer(folder)
    tiny_hf().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with layer norms and biases, whose writing weights can be centered."""
    return model_folder("gpt2", tmp_path_factory.mktemp("gpt2"))


def log_probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, return_type="logits").float().log_softmax(-1)


def residual(model: Any) -> torch.Tensor:
    return model.run_with_cache(TOKENS, names_filter=[RESIDUAL])[1][RESIDUAL]


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_is_honored_for_a_folder(class_name: str, key: str, gemma: Path) -> None:
    model = load_model(gemma, class_name, **{key: "bfloat16"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_writing_weights_are_centered_where_asked(gpt2: Path) -> None:
    plain = load_model(gpt2, "TransformerBridge")
    centered = load_model(gpt2, "TransformerBridge", center_writing_weights=True)
    assert residual(plain).mean(-1).abs().max() > 0.01
    assert residual(centered).mean(-1).abs().max() < 1e-5
    difference = log_probabilities(plain) - log_probabilities(centered)
    assert difference.abs().max() < 1e-4


def test_norms_are_folded_where_asked(gemma: Path) -> None:
    plain = load_model(gemma, "HookedTransformer")
    folded = load_model(gemma, "HookedTransformer", fold_ln=True, default_prepend_bos=False)
    assert (plain.cfg.normalization_type, folded.cfg.normalization_type) == ("RMS", "RMSPre")
    assert folded.cfg.default_prepend_bos is False and plain.cfg.default_prepend_bos
    difference = log_probabilities(plain) - log_probabilities(folded)
    assert difference.abs().max() < 1e-4


def test_the_first_layers_alone(gemma: Path) -> None:
    whole = load_model(gemma, "HookedTransformer")
    part = load_model(gemma, "HookedTransformer", first_n_layers=2, n_ctx=19)
    assert (part.cfg.n_layers, part.cfg.n_ctx) == (2, 19)
    torch.testing.assert_close(residual(part), residual(whole), rtol=1e-5, atol=1e-5)


def test_a_field_of_the_config(gemma: Path) -> None:
    plain = load_model(gemma, "AutoModelForCausalLM")
    loose = load_model(gemma, "AutoModelForCausalLM", final_logit_softcapping=None)
    with torch.no_grad():
        logits, raw = plain(TOKENS).logits, loose(TOKENS).logits
    cap = plain.config.final_logit_softcapping
    torch.testing.assert_close(logits, cap * torch.tanh(raw / cap), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_name", CLASSES)
def test_what_a_class_does_not_take_is_refused_by_name(class_name: str, gemma: Path) -> None:
    unknown: tuple[dict[str, Any], ...] = ({"nonsense": 3}, {"revision": "step1000"})
    for given in unknown:
        with pytest.raises(
            ValueError, match=rf"holds '{next(iter(given))}'.*{class_name}"
        ) as error:
            load_model(gemma, class_name, **given)
        assert "It takes" in str(error.value)
    # What asks for the default is taken by all: SAELens records it for every HookedTransformer.
    load_model(gemma, class_name, center_writing_weights=False, n_devices=1)


def test_plain_transformers_refuses_processing_and_two_dtypes_contradict(gemma: Path) -> None:
    with pytest.raises(ValueError, match="holds 'fold_ln', which AutoModelForCausalLM"):
        load_model(gemma, "AutoModelForCausalLM", fold_ln=True)
    with pytest.raises(ValueError, match="two dtypes, bfloat16 and float32"):
        LoadingKeywords.sorted(
            {"dtype": "float32", "torch_dtype": torch.bfloat16}, "HookedTransformer", "m", gemma
        )


def test_a_hub_name_has_what_its_loader_takes() -> None:
    given = {"revision": "step1000", "checkpoint_index": 3, "fold_ln": True, "dtype": "float16"}
    found = LoadingKeywords.sorted(given, "HookedTransformer", "pythia-70m", None)
    assert found.loader == {"revision": "step1000", "checkpoint_index": 3}
    assert found.processing["fold_ln"] and found.dtype == "float16"
    with pytest.raises(ValueError, match="'nonsense'.*HookedTransformer with a hub name"):
        LoadingKeywords.sorted({"nonsense": 3}, "HookedTransformer", "pythia-70m", None)


def test_a_plain_model_with_hooks(gpt2: Path) -> None:
    model = load_hooked_model(gpt2, "AutoModelForCausalLM")
    hidden = load_model(gpt2, "AutoModelForCausalLM")(TOKENS, output_hidden_states=True)
    cache = model.run_with_cache(TOKENS, names_filter=["transformer.h.1"])[1]
    torch.testing.assert_close(cache["transformer.h.1"], hidden.hidden_states[2])
    torch.testing.assert_close(model(TOKENS, return_type="logits"), hidden.logits)
    assert model(TOKENS, return_type=None) is None
    assert (model.cfg.d_vocab, model.cfg.n_ctx, model.cfg.n_layers) == (53, 40, 3)
    torch.manual_seed(1)
    text = model.generate("w5 w6", max_new_tokens=4, temperature=0.7, top_k=3)
    torch.manual_seed(1)
    assert text == model.generate("w5 w6", max_new_tokens=4, temperature=0.7, top_k=3)
    assert text.startswith("w5 w6 ") and len(text.split()) <= 6


@pytest.mark.parametrize("class_name", CLASSES[1:])
def test_a_prompt_begins_with_bos_where_asked(class_name: str, gemma: Path) -> None:
    model = load_hooked_model(gemma, class_name)
    seen: list[int] = []

    def first_token(module: Any, inputs: tuple[Any, ...]) -> None:
        tokens = inputs[0] if inputs else None
        if isinstance(tokens, torch.Tensor) and not tokens.is_floating_point() and tokens.ndim == 2:
            seen.append(int(tokens[0, 0]))

    for prepend_bos in (None, True, False):
        seen.clear()
        with register_module_forward_pre_hook(first_token):
            generate(model, "w5 w6", seed=3, new_tokens=2, prepend_bos=prepend_bos)
        assert (seen[0] == BOS) == (prepend_bos is not False)
