"""The common part of the formats of steering vectors, `lm_eval.py` and `nnsight.py`.

Both tools hook a module of the transformers model and add the vector Σ amount · W_dec[latent] at
every position, as `analysis.steering.steer` does with `Add`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from jumprelu_plugin.analysis.steering import Add, steer
from jumprelu_plugin.formats.checking import TOLERANCE, Check, Loader
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.decoder_layers import decoder_layers
from jumprelu_plugin.models.language_models import load_model, local_folder

# By TransformerLens' hook inside the block: the path from a layer of the transformers model to the
# module with this output. The second and the third exist where a norm follows the MLP and the
# attention, as in Gemma 2 and 3.
_MODULES = {
    "hook_resid_post": "",
    "hook_mlp_out": ".post_feedforward_layernorm",
    "hook_attn_out": ".post_attention_layernorm",
}
_WITH_POST_NORMS = ("gemma2", "gemma3", "gemma3_text")
_POSITIONS = 11


def module_name(dictionary: Dictionary, *, in_base_model: bool = True) -> str:
    """The path of the module whose output is the hook that the dictionary writes.

    Args:
        dictionary: an SAE or transcoder.
        in_base_model: whether the path starts at the base model; otherwise at the whole model.

    Raises:
        ValueError: no module's output is that hook, or the model or its layers are not known.
    """
    layer, hook = dictionary.site_out()
    if hook not in _MODULES:
        raise ValueError(
            f"no module of a transformers model gives {hook!r}, so lm-eval and nnsight cannot "
            f"steer there; they can at {', '.join(_MODULES)}. Steer with jumprelu_plugin.steer"
        )
    if not dictionary.model_name:
        raise ValueError("the module depends on the model, which is not known: give --model_name")
    model = decoder_layers(dictionary.model_name)
    if hook != "hook_resid_post" and model.model_type not in _WITH_POST_NORMS:
        raise ValueError(
            f"{hook!r} is a module's output only where a norm follows the MLP and the attention "
            f"({', '.join(_WITH_POST_NORMS)}), and {dictionary.model_name!r} is not known to be "
            "such a model. Use a dictionary of hook_resid_post"
        )
    path = f"{model.layers}.{layer}{_MODULES[hook]}"
    return path if in_base_model else f"{model.base}.{path}"


def require_model_folder(dictionary: Dictionary, loader: Loader) -> Path:
    """The local folder of the dictionary's model, which the comparison loads.

    Raises:
        ValueError: the model is not a local folder.
    """
    folder = local_folder(dictionary.model_name) if dictionary.model_name else None
    if folder is None:
        raise ValueError(
            f"{loader.name} loads the whole model, and {dictionary.model_name!r} is not a folder "
            "on this machine: name one with --model_name, or write without the comparison: "
            "--unchecked"
        )
    return folder


@torch.no_grad()
def compare_steered_logits(
    dictionary: Dictionary,
    amounts: Mapping[int, float],
    steered_logits: Callable[[Tensor], Tensor],
    loader: str,
) -> Check:
    """Compare a tool's steered logits with those under `steer`, on random tokens.

    Args:
        dictionary: the dictionary of the steered latents.
        amounts: the amount for each latent.
        steered_logits: the tool's function from tokens [batch, position] to logits.
        loader: name of the tool, for messages.

    Raises:
        ValueError: the logits differ by more than rounding.
    """
    name = dictionary.model_name or ""
    # Of local folders, HookedTransformer takes only those of Gemma 2; a bridge takes any.
    is_gemma_2 = decoder_layers(name).model_type == "gemma2"
    hooked = load_model(name, "HookedTransformer" if is_gemma_2 else "TransformerBridge")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, hooked.cfg.d_vocab, (3, _POSITIONS), generator=generator)
    if hooked.tokenizer.bos_token_id is not None:
        tokens[:, 0] = hooked.tokenizer.bos_token_id
    sae = dictionary.as_sae()
    with steer(hooked, sae, [Add(latent, amount) for latent, amount in amounts.items()]):
        expected = hooked(tokens)
    logits, unsteered = steered_logits(tokens), hooked(tokens)
    # Relative to the change by steering, not to the logits, so that a missing vector is an error.
    change = (expected - unsteered).norm()
    error = float(((logits - expected).norm() / change.clamp_min(1e-30)).cpu())
    # The change is a difference of logits, so rounding in the logits is larger relative to it.
    tolerance = TOLERANCE * float((expected.norm() / change.clamp_min(1e-30)).clamp_min(1))
    if not error <= tolerance:
        raise ValueError(
            f"read back with {loader}, the steered logits differ by {error:.1e} relative to the "
            f"change by steering, more than {tolerance:.0e}: nothing was written"
        )
    return Check(loader, len(tokens), len(amounts), error)
