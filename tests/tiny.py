"""A small random Gemma 2, in the three dresses the downstream tools use.

Not a fixture file and not the embedded model: weights are random, drawn once per call from a seed,
and nothing touches a network. Every dimension is a different number, so a transposition cannot
pass unseen; the sliding window is shorter than the test sequences, so local layers differ from
global ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from sae_lens import HookedSAETransformer, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

D_MODEL, N_HEADS, N_KV_HEADS, D_HEAD, D_MLP, N_LAYERS = 33, 3, 1, 10, 37, 3
VOCABULARY, WINDOW, CONTEXT = 53, 5, 64
PAD, EOS, BOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
RESIDUAL, HEADS, MLP = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"
WIDTH = {RESIDUAL: D_MODEL, HEADS: N_HEADS * D_HEAD, MLP: D_MODEL}


class Tiny(NamedTuple):
    hf: Gemma2ForCausalLM
    hooked: HookedSAETransformer
    bridge: SAETransformerBridge
    tokenizer: PreTrainedTokenizerFast


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, saved to `folder` and read back (the bridge needs a name or path)."""
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    pad, eos, bos, unk = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=eos, bos_token=bos, unk_token=unk
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tiny_hf(seed: int = 0) -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=D_HEAD,
        query_pre_attn_scalar=D_HEAD,
        sliding_window=WINDOW,
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that every layer changes the logits; norms are gains of 1 + weight.
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_hooked(hf: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> HookedSAETransformer:
    config = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_ctx=CONTEXT,
        d_head=D_HEAD,
        n_heads=N_HEADS,
        n_key_value_heads=N_KV_HEADS,
        d_mlp=D_MLP,
        d_vocab=VOCABULARY,
        eps=1e-6,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_base=10000,
        rotary_dim=D_HEAD,
        use_attn_scale=True,
        window_size=WINDOW,
        use_local_attn=True,
        attn_types=["local" if i % 2 == 0 else "global" for i in range(N_LAYERS)],
        attn_scores_soft_cap=50.0,
        output_logits_soft_cap=30.0,
        gated_mlp=True,
        final_rms=True,
        use_normalization_before_and_after=True,
        model_name="tiny-gemma-2-test",
        original_architecture="Gemma2ForCausalLM",
        device="cpu",
        dtype=torch.float32,
    )
    model = HookedSAETransformer(config, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_gemma_weights(hf, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return model.eval()  # pyright: ignore[reportReturnType]


def tiny_bridge(
    hf: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, compatibility: bool = True
) -> SAETransformerBridge:
    bridge = SAETransformerBridge.boot_transformers(
        "tiny-gemma-2-test", hf_model=hf, tokenizer=tokenizer, device="cpu"
    )
    if compatibility:
        bridge.enable_compatibility_mode(no_processing=True)
    return bridge


def tiny_models(folder: Path, seed: int = 0) -> Tiny:
    """The same random weights as transformers, TransformerLens and bridge models.

    The bridge wraps its own copy of the weights: it rewires the model it is given.
    """
    tokenizer = tiny_tokenizer(folder)
    hf = tiny_hf(seed)
    return Tiny(hf, tiny_hooked(hf, tokenizer), tiny_bridge(tiny_hf(seed), tokenizer), tokenizer)


def tiny_sae(
    hook: str = RESIDUAL, d_in: int | None = None, d_sae: int = 41, seed: int = 1
) -> JumpReLUSAE:
    """A stock JumpReLU SAE with random weights, positive thresholds and free decoder norms."""
    config = JumpReLUSAEConfig(
        d_in=WIDTH[hook] if d_in is None else d_in,
        d_sae=d_sae,
        reshape_activations="hook_z" if hook.endswith("hook_z") else "none",
        metadata=SAEMetadata(hook_name=hook, model_name="tiny-gemma-2-test"),
    )
    sae = JumpReLUSAE(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, scale in ((sae.W_enc, 0.5), (sae.W_dec, 0.4), (sae.b_enc, 0.3),
                                 (sae.b_dec, 0.2)):  # fmt: skip
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        sae.threshold.copy_(0.2 + torch.rand(sae.threshold.shape, generator=generator))
    return sae.eval()


def tiny_tokens(sequences: int = 5, positions: int = 13, seed: int = 2) -> torch.Tensor:
    """Random text tokens [sequences, positions], each row beginning with BOS."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(SPECIAL_TOKENS), VOCABULARY, (sequences, positions),
                           generator=generator)  # fmt: skip
    tokens[:, 0] = BOS
    return tokens
