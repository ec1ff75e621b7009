"""A steering vector's module is the one that the family of the model really has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from jumprelu_plugin.formats import export, load_dictionary
from jumprelu_plugin.formats.nnsight import add_vector
from jumprelu_plugin.formats.steering_vectors import compare_steered_logits
from jumprelu_plugin.models.decoder_layers import decoder_layers
from tests.dictionaries import random_sae, saved
from tests.tiny import tiny_tokenizer

WIDTH, LAYER, VOCABULARY = 24, 1, 53
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 1}
FAMILIES: dict[str, tuple[Any, str, str]] = {
    "gpt2": (
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=31),
        "transformer",
        "h.1",
    ),
    "gpt_neox": (GPTNeoXConfig(**SIZES), "gpt_neox", "layers.1"),
    "llama": (LlamaConfig(**GROUPED), "model", "layers.1"),
    "mistral": (MistralConfig(**GROUPED), "model", "layers.1"),
    "qwen2": (Qwen2Config(**GROUPED), "model", "layers.1"),
    "gemma2": (Gemma2Config(**GROUPED, head_dim=10), "model", "layers.1"),
}


def random_model(family: str, folder: Path) -> Path:
    config = FAMILIES[family][0]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_vector_at_the_named_module_is_what_steering_does(family: str, tmp_path: Path) -> None:
    """A hook on the exported module changes the logits as `steer` does on a bridge."""
    folder = random_model(family, tmp_path / family)
    _, base, layers = FAMILIES[family]
    sae = random_sae(f"blocks.{LAYER}.hook_resid_post", d_in=WIDTH, model=str(folder))
    source, amounts = saved(sae, tmp_path / "sae"), {7: 3.0, 11: -1.5}
    for target in ("lm-eval", "nnsight"):
        export(source, target, tmp_path / target, amounts=amounts, unchecked=True)
    (name,) = torch.load(tmp_path / "lm-eval" / "steer.pt", weights_only=True)
    described = json.loads((tmp_path / "nnsight" / "steer.json").read_text())["module"]
    assert (name, described) == (layers, f"{base}.{layers}")

    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    module = plain.get_submodule(described)
    assert plain.base_model.get_submodule(name) is module
    vector = 3.0 * sae.W_dec[7] - 1.5 * sae.W_dec[11]
    module.register_forward_hook(lambda _m, _i, out: add_vector(out, vector))
    check = compare_steered_logits(
        load_dictionary(source), amounts, lambda tokens: plain(tokens).logits, "a plain hook"
    )
    assert check.error < 1e-4


@pytest.mark.parametrize(
    ("name", "base", "layers"),
    [
        ("gpt2", "transformer", "h"),
        ("EleutherAI/pythia-70m", "gpt_neox", "layers"),
        ("google/gemma-2-2b", "model", "layers"),
        ("meta-llama/Llama-3.2-1B", "model", "layers"),
        ("Qwen/Qwen2.5-0.5B", "model", "layers"),
    ],
)
def test_hub_names_say_their_family_without_a_network(name: str, base: str, layers: str) -> None:
    found = decoder_layers(name)
    assert (found.base, found.layers) == (base, layers)


@pytest.mark.parametrize("name", ["somebody/else", "google/gemma-3-4b-it", "Qwen/Qwen2-VL-2B"])
def test_unknown_layers_are_refused_not_guessed(name: str, tmp_path: Path) -> None:
    source = saved(random_sae(model=name), tmp_path / "sae")
    with pytest.raises(ValueError, match="folder of the model"):
        export(source, "nnsight", tmp_path / "out", amounts={7: 1.0}, unchecked=True)
    assert not (tmp_path / "out").exists()
