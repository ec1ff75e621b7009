"""A steering vector for tools that hook a transformers model: lm-eval's `steered`, and nnsight.

The vector is Σ amount · W_dec[latent]; what the tools add at every position is what
`steering.steer` adds with `Add`. lm-eval loads a dictionary from `steer.pt`. nnsight has no format
of its own, so its vector is `steer.safetensors` with `steer.json` naming the module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jumprelu_plugin.analysis.steering import Add, steer, steering_vector
from jumprelu_plugin.formats.checking import TOLERANCE, Check, Loader
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.decoder_layers import decoder_layers
from jumprelu_plugin.models.language_models import load_model, local_folder

LM_EVAL_FILENAME = "steer.pt"
NNSIGHT_FILENAMES = ("steer.safetensors", "steer.json")
LM_EVAL = Loader(
    "lm-eval's SteeredModel",
    "lm_eval",
    "lm_eval",
    "pip install --no-deps lm-eval==0.4.13",
)
NNSIGHT = Loader("nnsight's LanguageModel", "nnsight", "nnsight", "pip install nnsight==0.8.1")

# TransformerLens hook inside the block: the module in a layer of the transformers model whose
# output it is. The second and third exist where a norm follows the MLP and the attention, as on
# Gemma 2 and 3.
_MODULES = {
    "hook_resid_post": "",
    "hook_mlp_out": ".post_feedforward_layernorm",
    "hook_attn_out": ".post_attention_layernorm",
}
_WITH_POST_NORMS = ("gemma2", "gemma3", "gemma3_text")
_POSITIONS = 11


def module_of(dictionary: Dictionary, *, whole: bool = False) -> str:
    """The module of the transformers model that gives what the dictionary writes.

    Args:
        whole: whether its path starts at the whole model, not at the base model.

    Raises:
        ValueError: no module's output is that hook, or the model's layers are not known.
    """
    layer, hook = dictionary.site_out()
    if hook not in _MODULES:
        raise ValueError(
            f"no module of a transformers model gives {hook!r}, so lm-eval and nnsight cannot "
            f"steer there; they take {', '.join(_MODULES)}. Steer with jumprelu_plugin.steer"
        )
    if not dictionary.model_name:
        raise ValueError("the module is the model's, and the model is not known: --model-name")
    found = decoder_layers(dictionary.model_name)
    if hook != "hook_resid_post" and found.model_type not in _WITH_POST_NORMS:
        raise ValueError(
            f"{hook!r} is a module's output only where a norm follows the MLP and the attention "
            f"({', '.join(_WITH_POST_NORMS)}), and {dictionary.model_name!r} is not known to be "
            "such a model. Use a dictionary of hook_resid_post"
        )
    module = f"{found.layers}.{layer}{_MODULES[hook]}"
    return f"{found.base}.{module}" if whole else module


def write_lm_eval(dictionary: Dictionary, folder: Path, amounts: Mapping[int, float]) -> None:
    """steer.pt, for `lm_eval --model steered --model_args steer_path=steer.pt,...`."""
    entry = {
        "steering_vector": steering_vector(dictionary.as_sae(), amounts),
        "steering_coefficient": 1.0,
        "action": "add",
        "bias": None,
        "head_index": None,
    }
    torch.save({module_of(dictionary): entry}, folder / LM_EVAL_FILENAME)


def write_nnsight(dictionary: Dictionary, folder: Path, amounts: Mapping[int, float]) -> None:
    """steer.safetensors (the vector) and steer.json (the module, from the whole model down)."""
    vector = steering_vector(dictionary.as_sae(), amounts)
    save_file({"steering_vector": vector.contiguous()}, folder / NNSIGHT_FILENAMES[0])
    described = {
        "module": module_of(dictionary, whole=True),
        "model_name": dictionary.model_name,
        "hook_name": dictionary.hook_name_out or dictionary.hook_name,
        "latents": {str(latent): amount for latent, amount in amounts.items()},
        "action": "add",
    }
    (folder / NNSIGHT_FILENAMES[1]).write_text(json.dumps(described, indent=2) + "\n")


def check_lm_eval(dictionary: Dictionary, folder: Path, amounts: Mapping[int, float]) -> Check:
    """Compare logits under lm-eval's `steered` model with logits under `steering.steer`."""
    torch.load(folder / LM_EVAL_FILENAME, weights_only=True)  # lm-eval itself would unpickle all
    model_folder = _model_folder(dictionary, LM_EVAL)
    steered = import_module("lm_eval.models.hf_steered").SteeredModel(
        pretrained=str(model_folder),
        steer_path=str(folder / LM_EVAL_FILENAME),
        device="cpu",
        dtype="float32",
        attn_implementation="eager",
    )
    return compare(dictionary, amounts, steered._model_call, str(LM_EVAL))


def check_nnsight(dictionary: Dictionary, folder: Path, amounts: Mapping[int, float]) -> Check:
    """Compare logits under an nnsight trace with logits under `steering.steer`."""
    model_folder = _model_folder(dictionary, NNSIGHT)
    logits = nnsight_logits(folder, model_folder)
    return compare(dictionary, amounts, logits, str(NNSIGHT))


def nnsight_logits(folder: Path, model_folder: Path) -> Any:
    """A function from tokens to the logits of an nnsight model steered by what is in `folder`."""
    plain = load_model(model_folder, "AutoModelForCausalLM")
    model = import_module("nnsight").LanguageModel(plain, tokenizer=plain.tokenizer)
    described = json.loads((folder / NNSIGHT_FILENAMES[1]).read_text())
    vector = load_file(folder / NNSIGHT_FILENAMES[0])["steering_vector"]
    module: Any = model
    for part in described["module"].split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)

    def logits(tokens: Tensor) -> Tensor:
        with torch.no_grad(), model.trace(tokens):
            module.output = steered(module.output, vector)
            found = model.output.logits.save()
        return found

    return logits


def steered(output: Any, vector: Tensor) -> Any:
    """A layer's output with `vector` added to its hidden states, which some families wrap."""
    if isinstance(output, tuple):
        return (output[0] + vector, *output[1:])
    return output + vector


def _local(dictionary: Dictionary) -> Path | None:
    return local_folder(dictionary.model_name) if dictionary.model_name else None


def _model_folder(dictionary: Dictionary, loader: Loader) -> Path:
    folder = _local(dictionary)
    if folder is None:
        raise ValueError(
            f"{loader.what} takes a whole model, and {dictionary.model_name!r} is not a folder on "
            "this machine: give one with --model_name to compare, or write without the "
            "comparison: --unchecked"
        )
    return folder


@torch.no_grad()
def compare(
    dictionary: Dictionary, amounts: Mapping[int, float], logits: Any, loader: str
) -> Check:
    name = dictionary.model_name or ""
    # HookedTransformer has code of its own for Gemma 2; every other family runs on a bridge.
    gemma_2 = decoder_layers(name).model_type == "gemma2"
    hooked = load_model(name, "HookedTransformer" if gemma_2 else "TransformerBridge")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, hooked.cfg.d_vocab, (3, _POSITIONS), generator=generator)
    if hooked.tokenizer.bos_token_id is not None:
        tokens[:, 0] = hooked.tokenizer.bos_token_id
    sae = dictionary.as_sae()
    with steer(hooked, sae, [Add(latent, amount) for latent, amount in amounts.items()]):
        want = hooked(tokens)
    got, unsteered = logits(tokens), hooked(tokens)
    # Against what steering changes, not against the logits: a vector that is not added must fail.
    change = (want - unsteered).norm()
    error = float(((got - want).norm() / change.clamp_min(1e-30)).cpu())
    # The change is a difference of logits, so rounding in the logits counts more than in outputs.
    allowed = TOLERANCE * float((want.norm() / change.clamp_min(1e-30)).clamp_min(1))
    if not error <= allowed:
        raise ValueError(
            f"read back with {loader}, the steered logits differ by {error:.1e} of what steering "
            f"changes, more than {allowed:.0e}: nothing was written"
        )
    return Check(loader, len(tokens), len(amounts), error)
