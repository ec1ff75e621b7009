"""What sae-dashboard, and through it Neuronpedia, takes: a SAELens folder and its run settings.

sae-dashboard multiplies decoder norms into the encoder of the object it is given, in place. With
unit rows already folded that changes nothing, so the activations on its pages are the folder's own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from jumprelu_plugin.formats import saelens
from jumprelu_plugin.formats.checking import Check, Loader, compare
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.hooks import flat_input

SETTINGS = "neuronpedia_runner.json"
LOADER = Loader(
    "sae-dashboard's FeatureMaskingContext",
    "sae_dashboard",
    "sae-dashboard",
    "pip install dataclasses-json eindex-callum matplotlib"
    " && pip install --no-deps sae-dashboard==0.8.0",
)


def write(dictionary: Dictionary, folder: Path) -> None:
    """cfg.json and sae_weights.safetensors with unit decoder rows, and neuronpedia_runner.json.

    Raises:
        ValueError: for a skip transcoder, whose architecture sae-dashboard refuses.
    """
    if dictionary.has_skip:
        raise ValueError(
            "sae-dashboard takes the architectures jumprelu and jumprelu_transcoder, and refuses "
            "jumprelu_skip_transcoder. `jumprelu dashboard` shows its latents"
        )
    layer, hook = dictionary.site()
    source = f"{layer}-{hook.replace('.', '_')}-{_thousands(dictionary.parameters.d_sae)}"
    model = (dictionary.model_name or "unknown").split("/")[-1]
    sae = _folded(dictionary).as_sae()
    sae.cfg.metadata.neuronpedia_id = f"{model}/{source}"
    sae.save_model(folder)
    # The fields of NeuronpediaRunnerConfig that the folder decides.
    settings = {
        "sae_set": source.split("-", 1)[1],
        "np_set_name": source.split("-", 1)[1],
        "sae_path": ".",
        "from_local_sae": True,
        "model_id": dictionary.model_name,
        "layer": layer,
        "sae_dtype": "float32",
        "n_tokens_in_prompt": dictionary.metadata.get("context_size") or 128,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def check(dictionary: Dictionary, folder: Path) -> Check:
    """Compare with the folder loaded, and its latents read in parts, as sae-dashboard does.

    sae-dashboard reports a latent's activation times its decoder norm; so does the comparison.
    """
    from sae_lens import SAE

    masked = import_module("sae_dashboard.feature_data_generator").FeatureMaskingContext
    sae = SAE.load_from_disk(folder).eval()
    sae.fold_W_dec_norm()
    parts = torch.arange(dictionary.parameters.d_sae).split(128)

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = []
        for part in parts:
            with masked(sae, part.tolist()):
                found.append(sae.encode(x))
        return torch.cat(found, dim=-1)

    with flat_input(sae):
        return compare(_folded(dictionary).parameters, encode, sae.forward, str(LOADER))


def is_here(folder: Path) -> bool:
    return saelens.is_here(folder)


def _folded(dictionary: Dictionary) -> Dictionary:
    return replace(dictionary, parameters=dictionary.parameters.fold_decoder_norms())


def _thousands(width: int) -> str:
    return f"{width // 1024}k" if width % 1024 == 0 else str(width)
