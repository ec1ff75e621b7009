"""Circuits of the embedded Gemma 2: logits, row sums and interventions agree with the model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jumprelu_plugin.circuits import (
    attribute,
    change_feature,
    load_replacement_model,
    row_sums,
    spliced_logits,
)
from jumprelu_plugin.circuits.layers import is_cross_layer
from jumprelu_plugin.formats import export
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, embedded_model_folder, load_model
from jumprelu_plugin.transcoders.clt import CLTConfig, CrossLayerTranscoder, save_clt
from tests.dictionaries import needs, random_transcoder, saved

PROMPT = "The government of the country is"
HOOKS = ["ln2.hook_normalized", "hook_resid_mid"]


def random_set(folder: Path, *, hook_in: str, skip: bool, layers: int = 6) -> Path:
    """Transcoders with random parameters: they reconstruct nothing and fire on a few per cent."""
    scale = {"ln2.hook_normalized": 1 / 16, "hook_resid_mid": 1 / 48}[hook_in]
    for layer in range(layers):
        sae = random_transcoder(
            layer, hook_in=hook_in, skip=skip, d_in=256, d_out=256, d_sae=499,
            model=EMBEDDED_MODEL, seed=40 + layer,
        )  # fmt: skip
        with torch.no_grad():
            sae.W_enc.mul_(2 * scale)
            sae.threshold.add_(1.5)
            sae.W_dec.mul_(0.3)
            sae.b_dec.mul_(0.1)
            if skip:
                sae.W_skip.mul_(0.1)
        saved(sae, folder / f"layer_{layer}")
    return folder


def random_cross_layer(folder: Path, *, hook_in: str) -> Path:
    """The same, with decoders to every later layer."""
    cfg = CLTConfig(
        256, 256, 499, tuple(range(6)), f"blocks.{{layer}}.{hook_in}", model_name=EMBEDDED_MODEL
    )
    model = CrossLayerTranscoder(cfg)
    sets = random_set(folder / "sources", hook_in=hook_in, skip=False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer, source in enumerate(model.sources):
            for name, value in load_file(
                sets / f"layer_{layer}" / "sae_weights.safetensors"
            ).items():
                if name != "W_dec":
                    getattr(source, name).copy_(value)
            source.W_dec.copy_(0.05 * torch.randn(source.W_dec.shape, generator=generator))
    return save_clt(model, folder / "clt")


def made(folder: Path, hook: str, kind: str) -> Path:
    if kind == "cross-layer":
        return random_cross_layer(folder, hook_in=hook)
    return random_set(folder / "set", hook_in=hook, skip=kind == "skip")


@pytest.fixture(
    scope="module",
    params=[
        (HOOKS[0], "set"), (HOOKS[0], "skip"), (HOOKS[1], "set"),
        (HOOKS[0], "cross-layer"), (HOOKS[1], "cross-layer"),
    ],
    ids="-".join,
)  # fmt: skip
def circuit(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    needs("circuit_tracer")
    folder = tmp_path_factory.mktemp("circuit")
    export(made(folder, *request.param), "circuit-tracer", folder / "out")
    model = load_replacement_model(folder / "out")
    return model, attribute(model, PROMPT)


def test_error_nodes_make_it_the_base_model(circuit: tuple[Any, Any]) -> None:
    model, graph = circuit
    tokens = graph.input_tokens
    plain = load_model(EMBEDDED_MODEL, "AutoModelForCausalLM")(tokens[None]).logits[0]
    assert float((model(tokens[None])[0] - plain).abs().max()) < 1e-4
    assert float((spliced_logits(model, tokens) - plain).abs().max()) < 1e-4
    assert float((spliced_logits(model, tokens, errors=False) - plain).abs().max()) > 1


def test_rows_sum_to_their_nodes(circuit: tuple[Any, Any]) -> None:
    model, graph = circuit
    sums = row_sums(model, graph, batch_size=31)
    assert len(sums.value) == len(graph.active_features) + len(graph.logit_targets)
    assert len(graph.active_features) > 50
    assert sums.relative_error < 1e-3
    # Without the constants the rows do not add up: they are part of the check.
    assert float(((sums.nodes - sums.value) / sums.value).abs().max()) > 0.05
    # The features' values are what circuit-tracer itself calls their activations.
    found_in = graph.active_features.tolist()
    transcoders = model.transcoders
    biases = transcoders.b_enc if is_cross_layer(transcoders) else [t.b_enc for t in transcoders]
    b_enc = torch.stack([biases[layer][f] for layer, _, f in found_in])
    found = sums.value[: len(b_enc)] + b_enc
    torch.testing.assert_close(found, graph.activation_values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_interventions_do_what_the_graph_predicts(circuit: tuple[Any, Any], rank: int) -> None:
    model, graph = circuit
    to_first_logit = graph.adjacency_matrix[-len(graph.logit_targets)]
    features = to_first_logit[: len(graph.active_features)].abs()
    feature = int(features.argsort(descending=True)[rank])
    change = change_feature(model, graph, feature, 3.0 * float(graph.activation_values[feature]))
    assert change.n_logits == len(graph.logit_targets)
    assert float(change.measured[-change.n_logits :].abs().max()) > 0.01
    assert change.relative_error < 1e-3


def test_graph_can_be_shown(circuit: tuple[Any, Any], tmp_path: Path) -> None:
    _, graph = circuit
    from circuit_tracer.utils import create_graph_files

    create_graph_files(graph, slug="here", output_path=str(tmp_path))
    shown = json.loads((tmp_path / "here.json").read_text())
    assert shown["metadata"]["prompt_tokens"][1:3] == ["The", " government"]
    assert len(shown["nodes"]) > 10 and len(shown["links"]) > 10


def test_graph_without_all_its_features_is_refused(circuit: tuple[Any, Any]) -> None:
    model, graph = circuit
    part = attribute(model, PROMPT, max_feature_nodes=17)
    with pytest.raises(ValueError, match="17 of"):
        row_sums(model, part)


def test_wrong_sets_are_refused(tmp_path: Path) -> None:
    needs("circuit_tracer")
    sets = random_set(tmp_path / "set", hook_in=HOOKS[0], skip=False, layers=2)
    export(sets, "circuit-tracer", tmp_path / "out", n_layers=2)
    with pytest.raises(ValueError, match="2 transcoders of width 256.*6 layers"):
        load_replacement_model(tmp_path / "out")


def test_padded_layers_become_error_nodes(tmp_path: Path) -> None:
    needs("circuit_tracer")
    sets = random_set(tmp_path / "set", hook_in=HOOKS[0], skip=False, layers=4)
    export(sets, "circuit-tracer", tmp_path / "out", pad_missing=True)
    model = load_replacement_model(tmp_path / "out", embedded_model_folder())
    graph = attribute(model, PROMPT)
    assert int(graph.active_features[:, 0].max()) <= 3
    assert row_sums(model, graph).relative_error < 1e-3


@pytest.mark.skipif(
    importlib.util.find_spec("circuit_tracer") is not None, reason="circuit-tracer is installed"
)
def test_missing_circuit_tracer_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="pip install --no-deps circuit-tracer"):
        load_replacement_model(tmp_path)
