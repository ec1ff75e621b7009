"""Loading routes: every class must be the model plain transformers holds, without a network.

Equality is by the three-way rule: against a float64 oracle, a route's largest error is at most
twice that of transformers in float32.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from jumprelu_plugin.models.language_models import (
    EMBEDDED_MODEL,
    embedded_model_folder,
    load_model,
    model_digest,
)
from tests.gemma_2_oracle import gemma_2_in_float64

HOOKED = ["HookedTransformer", "HookedSAETransformer"]
BRIDGES = ["TransformerBridge", "SAETransformerBridge"]
TEXT = "The president is both the chief of state and head of government of the country."


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs with sockets that refuse to connect."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"A model load tried to reach the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture(scope="module")
def plain_embedded() -> Gemma2ForCausalLM:
    """The oracle: transformers itself, given the folder directly."""
    return Gemma2ForCausalLM.from_pretrained(
        embedded_model_folder(), dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 2 whose sizes share no factor with each other where the design allows it,
    whose attention scale is not its head size, and whose softcaps bite."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "odd-gemma"
    config = Gemma2Config(
        vocab_size=4096,
        hidden_size=66,
        intermediate_size=101,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        query_pre_attn_scalar=23,
        sliding_window=7,
        max_position_embeddings=61,
        attn_logit_softcapping=1.3,
        final_logit_softcapping=2.9,
        rms_norm_eps=0.03,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = Gemma2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # zero at initialisation, where "1 + weight" could not be told from 1
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model_folder() / file, folder)
    return folder


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, 4096, shape, generator=torch.Generator().manual_seed(5))


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_as_exact_as(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """The three-way rule on the norm of the error; 1e-4 checks the oracle, of values up to 30."""
    assert ours.shape == theirs.shape == exact.shape
    assert (theirs - exact).abs().max() < 1e-4
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("class_name", [*HOOKED, *BRIDGES, "AutoModelForCausalLM"])
def test_embedded_model_has_transformers_logits(
    class_name: str, plain_embedded: Gemma2ForCausalLM
) -> None:
    model = load_model(model_class_name=class_name)
    # 211 tokens: longer than the sliding window of 128, so local and global layers differ.
    tokens = random_tokens(3, 211)
    exact, _ = gemma_2_in_float64(plain_embedded, tokens)
    assert_as_exact_as(logits_of(model, tokens), logits_of(plain_embedded, tokens), exact)
    assert type(model).__name__.startswith(class_name.removeprefix("AutoModelForCausalLM"))
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("class_name", [*HOOKED, *BRIDGES])
def test_folder_of_odd_sizes_has_transformers_logits(class_name: str, odd_folder: Path) -> None:
    plain = Gemma2ForCausalLM.from_pretrained(odd_folder, attn_implementation="eager").eval()
    model = load_model(odd_folder, class_name)
    tokens = random_tokens(2, 53)
    exact, _ = gemma_2_in_float64(plain, tokens)
    assert_as_exact_as(logits_of(model, tokens), logits_of(plain, tokens), exact)
    assert model.cfg.model_name == "odd-gemma"
    assert model.cfg.tokenizer_name == str(odd_folder)


@pytest.mark.parametrize("class_name", [*HOOKED, *BRIDGES])
def test_residual_stream_is_transformers_hidden_state(
    class_name: str, plain_embedded: Gemma2ForCausalLM
) -> None:
    model = load_model(model_class_name=class_name)
    tokens = random_tokens(2, 37)
    hook = "blocks.2.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[hook])
        hidden = plain_embedded(tokens, output_hidden_states=True).hidden_states[3]
    _, after_blocks = gemma_2_in_float64(plain_embedded, tokens)
    assert_as_exact_as(cache[hook], hidden, after_blocks[2])


@pytest.mark.parametrize("class_name", HOOKED)
def test_weights_are_unprocessed(class_name: str, odd_folder: Path) -> None:
    plain: Any = Gemma2ForCausalLM.from_pretrained(odd_folder)
    model = load_model(odd_folder, class_name)
    layer, block = plain.model.layers[1], model.blocks[1]
    assert torch.equal(block.mlp.W_in, layer.mlp.up_proj.weight.T)
    assert torch.equal(block.mlp.W_out, layer.mlp.down_proj.weight.T)
    assert torch.equal(block.ln2.w, 1 + layer.pre_feedforward_layernorm.weight)
    assert torch.equal(model.unembed.W_U, plain.lm_head.weight.T)


@pytest.mark.parametrize("class_name", HOOKED)
def test_greedy_generation_is_transformers_generation(
    class_name: str, plain_embedded: Gemma2ForCausalLM
) -> None:
    model = load_model(model_class_name=class_name)
    tokens = model.to_tokens("The president is both the chief of state and")
    ours = model.generate(
        tokens, max_new_tokens=13, do_sample=False, stop_at_eos=False, verbose=False
    )
    theirs = plain_embedded.generate(  # pyright: ignore[reportAttributeAccessIssue]
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=13,
        min_new_tokens=13,
        do_sample=False,
    )
    assert ours.shape == (1, tokens.shape[1] + 13)
    # transformers forbids EOS until min_new_tokens; up to there both take the likeliest token.
    eos = (ours[0] == 1).nonzero()
    end = int(eos[0]) if len(eos) else ours.shape[1]
    assert end > tokens.shape[1]
    assert ours[0, :end].tolist() == theirs[0, :end].tolist()


@pytest.mark.parametrize("class_name", [*HOOKED, *BRIDGES])
def test_one_bos_is_prepended(class_name: str) -> None:
    model = load_model(model_class_name=class_name)
    tokens = model.to_tokens(TEXT)[0].tolist()
    assert tokens[0] == 2
    assert tokens.count(2) == 1
    assert tokens == model.tokenizer(TEXT)["input_ids"]
    assert model.to_string(torch.tensor(tokens[1:])) == TEXT


def test_embedded_model_predicts_text_far_better_than_chance() -> None:
    model = load_model()
    loss = model(model.to_tokens(TEXT), return_type="loss").item()
    assert loss < 4.0  # chance is log 4096 = 8.3


def test_embedded_configuration_names_itself() -> None:
    model = load_model()
    assert model.cfg.model_name == EMBEDDED_MODEL
    assert model.cfg.tokenizer_name == str(embedded_model_folder())
    assert model.cfg.attn_types == ["local", "global"] * 3


def test_assets_stay_small_and_readable_by_transformers_4() -> None:
    folder = embedded_model_folder()
    assert sum(file.stat().st_size for file in folder.parent.rglob("*")) < 11.5e6
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "licen" in (folder / "README.md").read_text().lower()


@pytest.mark.parametrize(
    "text", ["Prices rose 12.5% in 1973.", "café\n\n  déjà vu", "\u4e2d\u6587"]
)
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_digest_follows_the_weights() -> None:
    first, second = load_model(), load_model()
    assert model_digest(first) == model_digest(second)
    assert len(model_digest(first)) == 16
    with torch.no_grad():
        second.blocks[1].mlp.W_in[3, 5] += 1e-3
    assert model_digest(first) != model_digest(second)


def test_folder_without_tokenizer_says_what_to_do(odd_folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(odd_folder / file, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.*tokenizer\.save_pretrained"):
        load_model(tmp_path)


def test_folder_without_config_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*save_pretrained"):
        load_model(tmp_path)


def test_absent_folder_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        load_model("./nowhere")


def test_unknown_class_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'HookedMamba'.*HookedSAETransformer"):
        load_model(model_class_name="HookedMamba")


def test_other_architectures_load_as_bridge_but_not_as_hooked(tmp_path: Path) -> None:
    torch.manual_seed(13)
    config = GPT2Config(vocab_size=4096, n_positions=31, n_embd=22, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model_folder() / file, tmp_path)
    with pytest.raises(ValueError, match=r"'gpt2'.*TransformerBridge"):
        load_model(tmp_path, "HookedSAETransformer")
    plain = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = random_tokens(2, 29)
    bridge = load_model(tmp_path, "SAETransformerBridge")
    exact = logits_of(GPT2LMHeadModel.from_pretrained(tmp_path).double().eval(), tokens)
    assert_as_exact_as(logits_of(bridge, tokens), logits_of(plain, tokens), exact)
