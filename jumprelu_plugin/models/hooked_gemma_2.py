"""Builds a HookedTransformer from a local folder that holds a Gemma 2 of any size.

TransformerLens reads a model's sizes from its table of official names. Here they come from the
folder's config.json; everything else is as in TransformerLens' google/gemma-2-2b.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from jumprelu_plugin.models.loading_keywords import LoadingKeywords


def build_hooked_gemma_2(
    hooked_class: Any,
    plain: Any,
    model_name: str,
    folder: Path,
    device: str,
    keywords: LoadingKeywords,
) -> Any:
    """A `hooked_class` with the weights of `plain`, in their dtype.

    Args:
        hooked_class: HookedTransformer or a subclass.
        plain: the transformers model on the CPU, with its tokenizer as `.tokenizer`.
        model_name: the value of `cfg.model_name`.
        folder: the folder it was loaded from, which becomes `cfg.tokenizer_name`.
        device: where the weights are stored.
        keywords: the processing of the weights, and fields of the config in place of the model's.
    """
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    config = _hooked_config(
        plain.config, model_name, folder, device, plain.dtype, dict(keywords.config)
    )
    hooked = hooked_class(config, tokenizer=plain.tokenizer)
    with torch.no_grad():
        weights = convert_gemma_weights(plain, config)
    hooked.load_and_process_state_dict(weights, **keywords.processing)
    return hooked.to(device, print_details=False)


def _hooked_config(
    config: Any, model_name: str, folder: Path, device: str, dtype: torch.dtype, given: dict
) -> Any:
    """TransformerLens' fields for google/gemma-2-2b, with this model's sizes or those given."""
    from transformer_lens import HookedTransformerConfig

    n_layers = given.pop("first_n_layers", config.num_hidden_layers)
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return HookedTransformerConfig(
        model_name=model_name,
        tokenizer_name=str(folder),
        original_architecture="Gemma2ForCausalLM",
        device=device,
        dtype=dtype,
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=n_layers,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_activation,
        initializer_range=config.initializer_range,
        normalization_type="RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        positional_embedding_type="rotary",
        rotary_base=_rotary_base(config),
        rotary_dim=config.head_dim,
        use_attn_scale=True,
        attn_scale=float(config.query_pre_attn_scalar) ** 0.5,
        attn_scores_soft_cap=config.attn_logit_softcapping or -1.0,
        output_logits_soft_cap=config.final_logit_softcapping or -1.0,
        use_local_attn=True,
        window_size=config.sliding_window,
        attn_types=[kinds[kind] for kind in config.layer_types[:n_layers]],
        gated_mlp=True,
        **{"n_ctx": config.max_position_embeddings, "default_prepend_bos": True, **given},
    )


def _rotary_base(config: Any) -> float:
    # transformers 5 moved rope_theta into rope_parameters.
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or config.rope_theta)
