"""circuit-tracer on a model of this machine, and whether what it says of a prompt is true.

A replacement model computes with the base model's numbers while gradients flow through
transcoders, and an attribution graph says how much each node (active feature, error, token) adds to
each feature and logit. Three checks are here: the spliced transcoders with their error nodes give
the base model's logits; every row of the graph, with the constants that have no node of their own,
sums to its node's value; and a change to one feature does what its column predicts.

It trains no transcoders and draws nothing: `jumprelu export --to circuit-tracer` writes the folder
this reads, and circuit-tracer's `create_graph_files` shows a graph.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.circuits.layers import Outputs, encoder, output_bias, shape
from jumprelu_plugin.formats import circuit_tracer
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, build_hooked


def replacement_model(
    transcoders: str | Path, model: str | Path = EMBEDDED_MODEL, device: str = "cpu"
) -> Any:
    """circuit-tracer's `TransformerLensReplacementModel` of `model` with a folder's transcoders.

    Args:
        transcoders: a folder in circuit-tracer's format.
        model: as for `models.load_model`; a folder works where circuit-tracer knows only names.

    Raises:
        ImportError: circuit-tracer is not installed.
        ValueError: the folder's transcoders are not one for each layer of the model.
    """
    if not circuit_tracer.LOADER.installed:
        raise ImportError(
            f"circuit-tracer is not installed. Install it with: {circuit_tracer.LOADER.install}"
        )
    loaded = circuit_tracer.load(Path(transcoders))
    replacement = build_hooked(_backend(), model, device)
    expected = replacement.cfg.n_layers, replacement.cfg.d_model
    found = shape(loaded)
    if found != expected:
        raise ValueError(
            f"{transcoders} holds {found[0]} transcoders of width {found[1]}, and the "
            f"model has {expected[0]} layers of width {expected[1]}"
        )
    replacement._configure_replacement_model(loaded)
    return replacement


def attribute(model: Any, prompt: str | Tensor, **options: Any) -> Any:
    """circuit-tracer's attribution graph of a prompt; `options` are those of its `attribute`."""
    options = {"max_n_logits": 5, "batch_size": 64, **options}
    with _quiet_hooks():
        return import_module("circuit_tracer").attribute(prompt, model, **options)


@torch.no_grad()
def spliced_logits(
    model: Any, tokens: Int[Tensor, " pos"], *, errors: bool = True
) -> Float[Tensor, "pos d_vocab"]:
    """Logits with every MLP's output replaced by the transcoders', plus the error nodes.

    With the errors these are the base model's logits, up to rounding; without them, what the
    transcoders alone compute. At the first position, which circuit-tracer leaves out of its graphs,
    MLPs stay as they are.
    """
    outputs = Outputs(model.transcoders)
    skipped = model.zero_positions
    error = model.setup_attribution(tokens).error_vectors
    inputs: dict[int, Tensor] = {}

    def read(x: Tensor, hook: Any, layer: int) -> None:
        inputs[layer] = x[0]

    def write(y: Tensor, hook: Any, layer: int) -> Tensor:
        x = inputs.pop(layer)
        replaced = outputs.next(layer, x)
        if errors:
            replaced = replaced + error[layer]
        replaced[skipped] = y[0, skipped]
        return replaced[None]

    hooks = []
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}."
        hooks.append((block + model.feature_input_hook, _for_layer(read, layer)))
        hooks.append((block + model.original_feature_output_hook, _for_layer(write, layer)))
    return model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]


@dataclass(frozen=True)
class RowSums:
    """Each row of a graph, summed, beside the value of its node.

    Rows are the active features in the graph's order, then the logits.

    Attributes:
        value: a feature's pre-activation less its b_enc, or a logit less the mean logit, before
            softcapping.
        nodes: what features, errors and tokens add.
        constants: what has no node of its own adds: decoder biases, and the MLPs at the first
            position.
    """

    value: Float[Tensor, " row"]
    nodes: Float[Tensor, " row"]
    constants: Float[Tensor, " row"]

    @property
    def relative_error(self) -> float:
        """The largest |nodes + constants − value| / |value|."""
        gap = (self.nodes + self.constants - self.value).abs()
        return float((gap / self.value.abs().clamp_min(1e-30)).max())


def row_sums(model: Any, graph: Any, batch_size: int = 64) -> RowSums:
    """Sum every row of a graph and compute what it should sum to, from a plain forward pass.

    Raises:
        ValueError: the graph leaves features out (`max_feature_nodes`), so its rows are not whole;
            or the model has attention or norm biases, which are constants not accounted for here.
    """
    if len(graph.selected_features) < len(graph.active_features):
        raise ValueError(
            f"the graph holds {len(graph.selected_features)} of {len(graph.active_features)} "
            "active features, so its rows leave some out: attribute without max_feature_nodes"
        )
    _refuse_biases(model)
    inputs, outputs, unembedded = _plain_pass(model, graph.input_tokens)
    layers, positions, features = graph.active_features.T
    vectors = torch.stack(
        [encoder(model.transcoders, layer)[f] for layer, _, f in graph.active_features.tolist()]
    ).detach()
    read = torch.stack([inputs[layer][pos] for layer, pos, _ in graph.active_features.tolist()])
    W_U = model.unembed.W_U.detach()
    logit_vectors = (W_U - W_U.mean(1, keepdim=True)).T[graph.logit_token_ids]
    targets = graph.logit_token_ids
    value = torch.cat([(vectors * read).sum(1), unembedded[targets] - unembedded.mean()])
    rows = torch.cat([vectors, logit_vectors])
    at_layer = torch.cat([layers, torch.full_like(targets, model.cfg.n_layers)])
    at_position = torch.cat([positions, torch.full_like(targets, graph.n_pos - 1)])
    constants = _constant_effects(model, graph, inputs, outputs, rows, at_layer, at_position,
                                  batch_size)  # fmt: skip
    count = len(features)
    adjacency = graph.adjacency_matrix
    nodes = torch.cat([adjacency[:count].sum(1), adjacency[-len(targets) :].sum(1)])
    return RowSums(value, nodes, constants)


@dataclass(frozen=True)
class Change:
    """What setting one feature to a value should do by the graph, and what it did.

    Attributes:
        predicted, seen: changes of the features' pre-activations, in the graph's order, then of
            the logits less their mean, before softcapping.
        logits: how many of them, at the end, are logits.
    """

    predicted: Float[Tensor, " row"]
    seen: Float[Tensor, " row"]
    logits: int

    @property
    def relative_error(self) -> float:
        """The largest difference, as a share of the largest change."""
        gap = (self.predicted - self.seen).abs().max()
        return float(gap / self.seen.abs().max().clamp_min(1e-30))


def change_feature(model: Any, graph: Any, feature: int, value: float) -> Change:
    """Set one active feature to `value` with everything else frozen, beside the prediction.

    A node's column holds what its present activation adds to every other, and with attention
    patterns, norms and the other MLPs frozen the effect is linear: (value − a)/a times the column.

    Args:
        feature: index into `graph.active_features`.
    """
    layer, position, latent = graph.active_features[feature].tolist()
    active = float(graph.activation_values[feature])
    count, targets = len(graph.active_features), graph.logit_token_ids
    adjacency = graph.adjacency_matrix
    column = torch.cat([adjacency[:count, feature], adjacency[-len(targets) :, feature]])
    frozen = range(model.cfg.n_layers)

    def run(interventions: list[tuple[int, int, int, float]]) -> Tensor:
        with model.zero_softcap():
            logits, pre = model.feature_intervention(
                graph.input_tokens,
                interventions,
                constrained_layers=frozen,
                apply_activation_function=False,
            )
        last = logits[0, -1]
        return torch.cat([pre[tuple(graph.active_features.T)], last[targets] - last.mean()])

    seen = run([(layer, position, latent, value)]) - run([(layer, position, latent, active)])
    return Change((value - active) / active * column, seen, len(targets))


def _constant_effects(
    model: Any,
    graph: Any,
    inputs: list[Tensor],
    outputs: list[Tensor],
    rows: Float[Tensor, "row d_model"],
    layers: Int[Tensor, " row"],
    positions: Int[Tensor, " row"],
    batch_size: int,
) -> Float[Tensor, " row"]:
    """What decoder biases, and MLPs at the positions left out, add to each row.

    circuit-tracer's own backward pass, with these constants in the place of the error nodes and
    nothing in the place of features and tokens.
    """
    context = model.setup_attribution(graph.input_tokens)
    constants = torch.zeros_like(context.error_vectors)
    skipped = model.zero_positions
    for layer in range(model.cfg.n_layers):
        constants[layer] = output_bias(model.transcoders, layer).detach()
        constants[layer, skipped] = outputs[layer][skipped]
        if model.skip_transcoder:  # flows through the skip connection, not the constant
            skip = model.transcoders.compute_skip(layer, inputs[layer][skipped])
            constants[layer, skipped] -= skip.detach()
    context.error_vectors = constants
    context.token_vectors = torch.zeros_like(context.token_vectors)
    context.decoder_vecs = torch.zeros_like(context.decoder_vecs)
    model.run_forward_pass(graph.input_tokens, batch_size, context)
    with _quiet_hooks():
        effects = [
            context.compute_batch(layers=layers[i], positions=positions[i], inject_values=rows[i])
            for i in torch.arange(len(rows)).split(batch_size)
        ]
    return torch.cat(effects).sum(1)


@torch.no_grad()
def _plain_pass(
    model: Any, tokens: Int[Tensor, " pos"]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Each layer's transcoder input and MLP output, and the last logits before softcapping."""
    names = (model.feature_input_hook, model.original_feature_output_hook)
    with model.zero_softcap():
        logits, cache = model.run_with_cache(
            tokens[None], names_filter=lambda name: any(part in name for part in names)
        )
    blocks = [f"blocks.{layer}." for layer in range(model.cfg.n_layers)]
    inputs = [cache[block + names[0]][0] for block in blocks]
    outputs = [cache[block + names[1]][0] for block in blocks]
    return inputs, outputs, logits[0, -1]


def _backend() -> Any:
    """circuit-tracer's TransformerLens model, without the noise it makes when Python exits."""
    circuit_tracer.allow_import()
    module = import_module("circuit_tracer.replacement_model.replacement_model_transformerlens")
    plain = module.TransformerLensReplacementModel
    finalizing = sys.is_finalizing  # modules' own names are gone by the time it is asked

    def delete(self: Any) -> None:
        if not finalizing():  # by then PyTorch is half gone, and resetting hooks fails
            plain.__del__(self)

    return type(plain.__name__, (plain,), {"__del__": delete})


@contextmanager
def _quiet_hooks() -> Iterator[None]:
    """Without PyTorch's warning of backward hooks whose inputs need no gradient: none is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


def _refuse_biases(model: Any) -> None:
    held = sorted(
        {
            name.split(".", 2)[-1]
            for name, value in model.state_dict().items()
            if name.rsplit(".", 1)[-1] in ("b_V", "_b_V", "b_O", "b", "b_U", "W_pos")
            and value.abs().sum() > 0
        }
    )
    if held:
        raise ValueError(
            f"the model has biases ({', '.join(held)}) that are constants in its circuits and are "
            "not accounted for here: sums are checked for models without, such as Gemma and Llama"
        )


def _for_layer(function: Any, layer: int) -> Any:
    return lambda tensor, hook: function(tensor, hook, layer)
