"""Checks of circuit-tracer's attribution graphs.

A graph gives the effect of each node (active feature, error, token) on each feature and logit.
Three properties can be checked:

- The spliced transcoders with their error nodes give the base model's logits (`spliced_logits`).
- Each row of the graph, plus the effects of constants, sums to its node's value (`row_sums`).
- Changing one feature has the effects in its column (`change_feature`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.circuits.layers import LayerOutputs, encoder, output_bias
from jumprelu_plugin.circuits.replacement_model import without_hook_warnings


@torch.no_grad()
def spliced_logits(
    model: Any, tokens: Int[Tensor, " pos"], *, errors: bool = True
) -> Float[Tensor, "pos d_vocab"]:
    """Logits with every MLP's output replaced by the transcoders' output plus the error nodes.

    With errors, these are the base model's logits up to rounding. At the first position, which
    circuit-tracer leaves out of its graphs, the MLPs are not replaced.

    Args:
        model: the replacement model.
        tokens: the prompt's token ids.
        errors: False leaves the error nodes out, so that only the transcoders contribute.
    """
    outputs = LayerOutputs(model.transcoders)
    skipped_positions = model.zero_positions
    error_vectors = model.setup_attribution(tokens).error_vectors
    inputs: dict[int, Tensor] = {}

    def read(x: Tensor, hook: Any, layer: int) -> None:
        inputs[layer] = x[0]

    def write(mlp_output: Tensor, hook: Any, layer: int) -> Tensor:
        output = outputs.next(layer, inputs.pop(layer))
        if errors:
            output = output + error_vectors[layer]
        output[skipped_positions] = mlp_output[0, skipped_positions]
        return output[None]

    hooks = []
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}."
        hooks.append((block + model.feature_input_hook, _for_layer(read, layer)))
        hooks.append((block + model.original_feature_output_hook, _for_layer(write, layer)))
    return model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]


@dataclass(frozen=True)
class RowSums:
    """The sum of each row of a graph, and the value of its node.

    Rows are the active features in the graph's order, then the logits.

    Attributes:
        value: pre-activation minus b_enc of a feature; logit minus the mean logit of a logit node,
            before softcapping. [rows]
        nodes: sum of the effects of features, errors and tokens. [rows]
        constants: sum of the effects of the constants that are no nodes: decoder biases, and the
            MLPs' outputs at the first position. [rows]
    """

    value: Float[Tensor, " row"]
    nodes: Float[Tensor, " row"]
    constants: Float[Tensor, " row"]

    @property
    def relative_error(self) -> float:
        """The largest |nodes + constants - value| / |value|."""
        error = (self.nodes + self.constants - self.value).abs()
        return float((error / self.value.abs().clamp_min(1e-30)).max())


def row_sums(model: Any, graph: Any, batch_size: int = 64) -> RowSums:
    """Sum every row of a graph, and compute its node's value in a plain forward pass.

    Args:
        model: the replacement model.
        graph: its attribution graph of a prompt.
        batch_size: rows in one backward pass.

    Raises:
        ValueError: the graph leaves features out (`max_feature_nodes`), so that its rows are
            incomplete; or the model has attention or norm biases, whose effects are not computed.
    """
    if len(graph.selected_features) < len(graph.active_features):
        raise ValueError(
            f"the graph holds {len(graph.selected_features)} of {len(graph.active_features)} "
            "active features, so its rows are incomplete: call attribute without max_feature_nodes"
        )
    _refuse_biases(model)
    inputs, outputs, unembedded = _plain_pass(model, graph.input_tokens)
    layers, positions, features = graph.active_features.T
    vectors = torch.stack(
        [encoder(model.transcoders, layer)[f] for layer, _, f in graph.active_features.tolist()]
    ).detach()
    feature_inputs = torch.stack(
        [inputs[layer][pos] for layer, pos, _ in graph.active_features.tolist()]
    )
    W_U = model.unembed.W_U.detach()
    logit_vectors = (W_U - W_U.mean(1, keepdim=True)).T[graph.logit_token_ids]
    targets = graph.logit_token_ids
    pre_activations = (vectors * feature_inputs).sum(1)
    value = torch.cat([pre_activations, unembedded[targets] - unembedded.mean()])
    constants = _constant_effects(
        model,
        graph,
        inputs,
        outputs,
        rows=torch.cat([vectors, logit_vectors]),
        layers=torch.cat([layers, torch.full_like(targets, model.cfg.n_layers)]),
        positions=torch.cat([positions, torch.full_like(targets, graph.n_pos - 1)]),
        batch_size=batch_size,
    )
    count = len(features)
    adjacency = graph.adjacency_matrix
    nodes = torch.cat([adjacency[:count].sum(1), adjacency[-len(targets) :].sum(1)])
    return RowSums(value, nodes, constants)


@dataclass(frozen=True)
class FeatureChange:
    """The effects of setting one feature to a value: the graph's prediction and the measurement.

    Attributes:
        predicted, measured: changes of the active features' pre-activations, in the graph's order,
            then of the logits minus their mean, before softcapping. [rows]
        n_logits: how many of the last rows are logits.
    """

    predicted: Float[Tensor, " row"]
    measured: Float[Tensor, " row"]
    n_logits: int

    @property
    def relative_error(self) -> float:
        """The largest error, relative to the largest change."""
        error = (self.predicted - self.measured).abs().max()
        return float(error / self.measured.abs().max().clamp_min(1e-30))


def change_feature(model: Any, graph: Any, feature: int, value: float) -> FeatureChange:
    """Set one active feature to `value`, and measure and predict the effects.

    A node's column holds the effects of its activation a on every other node. With attention
    patterns, norms and the other MLPs frozen, effects are linear, so the prediction is the column
    times (value - a)/a.

    Args:
        model: the replacement model.
        graph: its attribution graph of a prompt.
        feature: index into `graph.active_features`.
        value: the feature's new activation.
    """
    layer, position, latent = graph.active_features[feature].tolist()
    activation = float(graph.activation_values[feature])
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

    changed, unchanged = (run([(layer, position, latent, at)]) for at in (value, activation))
    predicted = (value - activation) / activation * column
    return FeatureChange(predicted, changed - unchanged, len(targets))


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
    """The effect on each row of decoder biases and of the MLPs at skipped positions.

    This is circuit-tracer's backward pass with these constants in place of the error vectors, and
    zeros in place of the features' and tokens' vectors.
    """
    context = model.setup_attribution(graph.input_tokens)
    constants = torch.zeros_like(context.error_vectors)
    skipped_positions = model.zero_positions
    for layer in range(model.cfg.n_layers):
        constants[layer] = output_bias(model.transcoders, layer).detach()
        constants[layer, skipped_positions] = outputs[layer][skipped_positions]
        if model.skip_transcoder:  # this part reaches the output through the skip connection
            skip = model.transcoders.compute_skip(layer, inputs[layer][skipped_positions])
            constants[layer, skipped_positions] -= skip.detach()
    context.error_vectors = constants
    context.token_vectors = torch.zeros_like(context.token_vectors)
    context.decoder_vecs = torch.zeros_like(context.decoder_vecs)
    model.run_forward_pass(graph.input_tokens, batch_size, context)
    with without_hook_warnings():
        effects = [
            context.compute_batch(layers=layers[i], positions=positions[i], inject_values=rows[i])
            for i in torch.arange(len(rows)).split(batch_size)
        ]
    return torch.cat(effects).sum(1)


@torch.no_grad()
def _plain_pass(
    model: Any, tokens: Int[Tensor, " pos"]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Each layer's transcoder input and MLP output, and the last position's uncapped logits."""
    names = (model.feature_input_hook, model.original_feature_output_hook)
    with model.zero_softcap():
        logits, cache = model.run_with_cache(
            tokens[None], names_filter=lambda name: any(part in name for part in names)
        )
    blocks = [f"blocks.{layer}." for layer in range(model.cfg.n_layers)]
    inputs = [cache[block + names[0]][0] for block in blocks]
    outputs = [cache[block + names[1]][0] for block in blocks]
    return inputs, outputs, logits[0, -1]


def _refuse_biases(model: Any) -> None:
    biases = sorted(
        {
            name.split(".", 2)[-1]
            for name, value in model.state_dict().items()
            if name.rsplit(".", 1)[-1] in ("b_V", "_b_V", "b_O", "b", "b_U", "W_pos")
            and value.abs().sum() > 0
        }
    )
    if biases:
        raise ValueError(
            f"the model has biases ({', '.join(biases)}), whose effects on the rows are not "
            "computed: row sums are checked for models without biases, such as Gemma and Llama"
        )


def _for_layer(function: Any, layer: int) -> Any:
    return lambda tensor, hook: function(tensor, hook, layer)
