"""The format of sae-dashboard and Neuronpedia: a SAELens folder and the settings of a run.

sae-dashboard multiplies the decoder norms into the encoder. Here the decoder rows are written with
unit norm, so that this changes nothing and its pages show the folder's own activations. The folder
is read as SAELens' format (`saelens.py`).

Explanations of latents are written as Neuronpedia exports them: a line of JSON each, without what
its database adds (id, author, embedding).
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from jumprelu_plugin.formats.checking import Check, Loader, compare_dictionary
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.explanations import Explanations
from jumprelu_plugin.formats.saelens import load_inference_sae
from jumprelu_plugin.models.hooks import flat_input
from jumprelu_plugin.records import append_jsonl

SETTINGS = "neuronpedia_runner.json"
EXPLANATIONS = "explanations/batch-0.jsonl"
METHOD = "jumprelu_study-explain"
# sae-dashboard 0.8.0 looks for the loading keywords at a place where SAELens' configs have none. So
# it loads every model with TransformerLens' default processing, and sets this flag where needed.
OWN_KEYWORDS = ("fold_ln", "center_writing_weights", "fold_value_biases", "use_hook_mlp_in")
LOADER = Loader(
    "sae-dashboard's FeatureMaskingContext",
    "sae_dashboard",
    "sae-dashboard",
    "pip install dataclasses-json eindex-callum matplotlib"
    " && pip install --no-deps sae-dashboard==0.8.0",
)


def write(
    dictionary: Dictionary, folder: Path, *, explanations: Explanations | None = None
) -> None:
    """Write a SAELens folder with unit decoder rows, and neuronpedia_runner.json.

    Args:
        dictionary: the dictionary.
        folder: an empty folder.
        explanations: of its latents, written to explanations/batch-0.jsonl.

    Raises:
        ValueError: the dictionary is a skip transcoder, which sae-dashboard refuses, or lacks a
            latent that is explained.
    """
    if dictionary.has_skip:
        raise ValueError(
            "sae-dashboard takes the architectures jumprelu and jumprelu_transcoder, and refuses "
            "jumprelu_skip_transcoder. Use `jumprelu dashboard`"
        )
    layer, hook = dictionary.site()
    source = f"{layer}-{hook.replace('.', '_')}-{_width_name(dictionary.parameters.d_sae)}"
    model = (dictionary.model_name or "unknown").split("/")[-1]
    sae = _with_unit_rows(dictionary).as_sae()
    sae.cfg.metadata.neuronpedia_id = f"{model}/{source}"
    sae.save_model(folder)
    # The fields of NeuronpediaRunnerConfig that follow from the folder.
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
    if explanations is not None:
        width = dictionary.parameters.d_sae
        _write_explanations(folder / EXPLANATIONS, explanations, model, source, width)


def check(dictionary: Dictionary, folder: Path) -> Check:
    """Compare with the activations that sae-dashboard computes, for parts of the latents at a time.

    They are activations times decoder norms.
    """
    masked = import_module("sae_dashboard.feature_data_generator").FeatureMaskingContext
    sae = load_inference_sae(folder).eval()
    sae.fold_W_dec_norm()
    parts = torch.arange(dictionary.parameters.d_sae).split(128)

    def encode(x: torch.Tensor) -> torch.Tensor:
        activations = []
        for part in parts:
            with masked(sae, part.tolist()):
                activations.append(sae.encode(x))
        return torch.cat(activations, dim=-1)

    with flat_input(sae):
        return compare_dictionary(
            _with_unit_rows(dictionary).parameters, encode, sae.forward, str(LOADER)
        )


def _write_explanations(
    path: Path, explanations: Explanations, model: str, source: str, width: int
) -> None:
    outside = [latent for latent in explanations.texts if not 0 <= latent < width]
    if outside:
        raise ValueError(
            f"latents {outside} are explained; the dictionary has latents 0 to {width - 1}: give "
            "the explanations of this dictionary"
        )
    for latent, text in sorted(explanations.texts.items()):
        line = {
            "modelId": model,
            "layer": source,  # in Neuronpedia's exports
            "source": source,  # in its Python package
            "index": str(latent),
            "description": text,
            "typeName": METHOD,
            "explanationModelName": explanations.model,
        }
        append_jsonl(path, line)


def _with_unit_rows(dictionary: Dictionary) -> Dictionary:
    return replace(dictionary, parameters=dictionary.parameters.fold_decoder_norms())


def _width_name(width: int) -> str:
    return f"{width // 1024}k" if width % 1024 == 0 else str(width)
