"""A plain transformers model with a hook at the output of every module.

SAELens trains on `AutoModelForCausalLM` through its `HookedProxyLM`, whose hooks have the names of
modules, such as `model.layers.1`. This is that class with what evaluation, steering and the
dashboard need besides: sizes, passes without logits, and text generation.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.load_model import HookedProxyLM
from torch import Tensor

from jumprelu_plugin.models.language_models import load_model

AUTO_MODEL = "AutoModelForCausalLM"


class HookedAutoModel(HookedProxyLM):
    """SAELens' `HookedProxyLM` of a plain model.

    Args:
        plain: a transformers model with its tokenizer as `.tokenizer`.
        name: the model's name.

    Attributes:
        cfg: `model_name`, `device`, `d_vocab`, `d_model`, `n_layers` and `n_ctx` (None if the
            model has no longest sequence), as TransformerLens' config has them.
    """

    def __init__(self, plain: Any, name: str):
        super().__init__(plain, plain.tokenizer)
        sizes = plain.config.get_text_config()
        self.cfg = SimpleNamespace(
            model_name=name,
            device=plain.device,
            dtype=plain.dtype,
            d_vocab=sizes.vocab_size,
            d_model=sizes.hidden_size,
            n_layers=sizes.num_hidden_layers,
            n_ctx=getattr(sizes, "max_position_embeddings", None),
        )

    def forward(
        self,
        tokens: Tensor,
        return_type: Any = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        _names_filter: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As SAELens' class; `return_type=None` runs the model and returns None."""
        if return_type is None:
            self.model(tokens)
            return None
        return super().forward(
            tokens, return_type, loss_per_token, stop_at_layer, _names_filter, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 10,
        temperature: float = 1.0,
        top_k: int | None = None,
        prepend_bos: bool | None = None,
        verbose: bool = False,
    ) -> str:
        """The prompt and a sampled continuation, as HookedTransformer's method gives them."""
        tokens = self._prompt_tokens(prompt, prepend_bos is not False)
        model: Any = self.model
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=top_k or 0,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        return str(self.tokenizer.decode(made[0], skip_special_tokens=True))

    def _prompt_tokens(self, prompt: str, prepend_bos: bool) -> Int[Tensor, "1 position"]:
        ids: Any = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        first = [bos] if prepend_bos and bos is not None else []
        return torch.tensor([[*first, *ids]], device=self.cfg.device)


def load_hooked_model(
    model: str | Path,
    model_class_name: str = "HookedSAETransformer",
    device: str = "cpu",
    dtype: str | None = None,
    **from_pretrained_kwargs: Any,
) -> Any:
    """A model with hooks, of any class that `load_model` takes.

    The arguments and errors are `load_model`'s.
    """
    loaded = load_model(model, model_class_name, device, dtype, **from_pretrained_kwargs)
    return HookedAutoModel(loaded, str(model)) if model_class_name == AUTO_MODEL else loaded
