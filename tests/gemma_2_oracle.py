"""Gemma 2's forward pass in float64, written from the report (arXiv 2408.00118), as an oracle.

It shares no code with transformers or TransformerLens, and being in double precision it tells a
route's rounding from a route's mistake. No cache, no batching tricks: for tests only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM


def gemma_2_in_float64(plain: Gemma2ForCausalLM, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (batch, length, vocabulary) and the residual stream after every block."""
    config: Any = plain.config
    weights = {name: weight.detach().double() for name, weight in plain.state_dict().items()}
    length = tokens.shape[1]
    theta = config.rope_parameters["rope_theta"]
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float64), theta**-exponents)
    cos, sin = angles.cos(), angles.sin()
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * (1 + weights[f"{name}.weight"])

    def heads(x: Tensor, name: str, count: int) -> Tensor:
        projected = x @ weights[f"{name}.weight"].T
        return projected.unflatten(-1, (count, config.head_dim)).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def soft_cap(x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    stream = weights["model.embed_tokens.weight"][tokens] * math.sqrt(config.hidden_size)
    after_blocks = []
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        x = norm(stream, f"{layer}.input_layernorm")
        query = rotate(heads(x, f"{layer}.self_attn.q_proj", config.num_attention_heads))
        key = rotate(heads(x, f"{layer}.self_attn.k_proj", config.num_key_value_heads))
        value = heads(x, f"{layer}.self_attn.v_proj", config.num_key_value_heads)
        group = config.num_attention_heads // config.num_key_value_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(config.query_pre_attn_scalar)
        scores = soft_cap(scores, config.attn_logit_softcapping)
        seen = distance >= 0
        if index % 2 == 0:  # even layers look back over the sliding window only
            seen = seen & (distance < config.sliding_window)
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        mixed = mixed.transpose(1, 2).flatten(2) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        stream = stream + norm(mixed, f"{layer}.post_attention_layernorm")
        x = norm(stream, f"{layer}.pre_feedforward_layernorm")
        gate = x @ weights[f"{layer}.mlp.gate_proj.weight"].T
        gate = torch.nn.functional.gelu(gate, approximate="tanh")
        x = (gate * (x @ weights[f"{layer}.mlp.up_proj.weight"].T)) @ weights[
            f"{layer}.mlp.down_proj.weight"
        ].T
        stream = stream + norm(x, f"{layer}.post_feedforward_layernorm")
        after_blocks.append(stream)
    logits = norm(stream, "model.norm") @ weights["model.embed_tokens.weight"].T
    return soft_cap(logits, config.final_logit_softcapping), after_blocks
