"""Small random models of many architectures, each in its own folder with a tokenizer.

Every family's blocks receive the KV cache in their own way, name their modules in their own way,
and load as a TransformerBridge. Nothing touches a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import BOS, EOS, PAD, VOCABULARY, tiny_tokenizer

D, LAYERS, HEADS, MLP, CONTEXT = 24, 3, 2, 29, 40

_GPT = {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
_LLAMA = {
    "hidden_size": D,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
}
_NEOX = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}

# Family: the name of its config, and the sizes in its own words.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {**_GPT, "n_inner": MLP}),
    "gptj": ("GPTJConfig", {**_GPT, "n_inner": MLP, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", {**_GPT, "n_head": 4, "n_inner": MLP, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", {**_NEOX, "rotary_pct": 0.5}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": D,
            "num_layers": 2,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "intermediate_size": MLP,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": D, "n_layer": LAYERS, "n_head": HEADS}),
    "falcon": (
        "FalconConfig",
        {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
    ),
    "mpt": (
        "MptConfig",
        {"d_model": D, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": CONTEXT},
    ),
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "phi": ("PhiConfig", {**_LLAMA, "num_key_value_heads": HEADS}),
    "gemma3": (
        "Gemma3TextConfig",
        {**_LLAMA, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 12},
    ),
    "opt": (
        "OPTConfig",
        {**_NEOX, "ffn_dim": MLP, "word_embed_proj_dim": D, "intermediate_size": None},
    ),
    "mamba": (
        "MambaConfig",
        {"hidden_size": D, "num_hidden_layers": LAYERS, "state_size": 4},
    ),
}


def plain_model(family: str, seed: int = 0) -> Any:
    """The family's causal language model with random weights, large enough for layers to matter."""
    config_name, sizes = FAMILIES[family]
    config = getattr(transformers, config_name)(
        vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS, **sizes
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                scale = parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def model_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a model of the family, with a word-level tokenizer, to `folder`."""
    tiny_tokenizer(folder)
    plain_model(family, seed).save_pretrained(folder)
    return folder
