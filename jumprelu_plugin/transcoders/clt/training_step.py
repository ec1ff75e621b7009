"""A cross-layer transcoder in training: one step's loss, and what follows the optimizer's step.

The reconstruction is joint, ‖y - ŷ‖² over all outputs. Sparsity is each layer's own: each has a
`control.DictionaryControl`, as an SAE has, which holds its L0 and measures its coefficient.

Where several processes hold the latents of every layer and split the batch, each makes this step
with its own, and the sums over them are `step.processes`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.control.calibration import output_directions
from jumprelu_plugin.control.decoder_norm import keep_gradient_tangential, normalize_rows_
from jumprelu_plugin.control.dictionary_control import DictionaryControl
from jumprelu_plugin.control.finite import FiniteCheck, LastCheck
from jumprelu_plugin.control.optimizer_hooks import OptimizerHooks
from jumprelu_plugin.control.resampling import unusual_inputs
from jumprelu_plugin.control.saved_state import (
    require_same_form,
    require_same_shapes,
    with_earlier_defaults,
)
from jumprelu_plugin.step.choose import DENSE_PRODUCTS, PathChoice
from jumprelu_plugin.step.counting import PairCount
from jumprelu_plugin.step.entries import BufferOverflow
from jumprelu_plugin.step.kernels.buffers import PairBuffers
from jumprelu_plugin.step.losses import (
    outlier_token_weights,
    reconstruction,
    sparsity_term,
)
from jumprelu_plugin.step.processes import ONE_PROCESS, OneProcess
from jumprelu_plugin.transcoders.clt.config import CLTTrainingConfig
from jumprelu_plugin.transcoders.clt.forward import forward
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder
from jumprelu_plugin.transcoders.settings import refuse_target_above


@dataclass(frozen=True)
class StepOutput:
    """What one step gave.

    Attributes:
        loss: to call backward on.
        target, output: y and ŷ, [batch, layers · d_out], in the units of training.
        active: active pairs of each layer.
        l0: of each layer, on the whole batch.
        coefficients: λ of each layer.
        processes: that made the step together. `loss` and what has a row a token is of this one's
            tokens, `active` of its latents too.
    """

    loss: Float[Tensor, ""]
    target: Float[Tensor, "batch layers*d_out"]
    output: Float[Tensor, "batch layers*d_out"]
    active: list[Int[Tensor, ""]]
    l0: list[float]
    coefficients: list[float | Tensor]
    processes: OneProcess = ONE_PROCESS

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return len(self.target) * self.processes.replicas

    @torch.no_grad()
    def batch_loss(self) -> float:
        """The loss on the whole batch."""
        return float(self.processes.mean_over_replicas(self.loss.detach()))

    @torch.no_grad()
    def fvu(self, n_layers: int) -> list[float]:
        """Fraction of variance unexplained of each layer's output on the whole batch."""
        mean = self.processes.mean_over_replicas(self.target.mean(0))
        residual = (self.output - self.target).square().sum(0)
        deviation = (self.target - mean).square().sum(0)
        sums = self.processes.mean_over_replicas(torch.stack([residual, deviation]))
        residual, deviation = sums.unflatten(1, (n_layers, -1)).sum(2)
        return (residual / deviation).tolist()

    @torch.no_grad()
    def errors(self, n_layers: int) -> Float[Tensor, " layers"]:
        """Mean over the whole batch's tokens of each layer's ‖ŷ - y‖²."""
        squares = (self.output - self.target).square().sum(0).view(n_layers, -1)
        return self.processes.mean_over_replicas(squares.sum(1) / len(self.target))


class CLTTrainingStep:
    """The step of a cross-layer transcoder, as a training SAE is the step of an SAE.

    `loss` begins a step and calibrates on the first; the rest happens around the step of the
    optimizer that holds the parameters (`control.optimizer_hooks`).

    Args:
        processes: that hold the latents and split the batch; `model` has this one's.

    Attributes:
        controls: one `DictionaryControl` a layer.
        steps: made so far.

    Raises:
        ValueError: the target L0 is above the number of latents.
    """

    def __init__(
        self,
        model: CrossLayerTranscoder,
        cfg: CLTTrainingConfig,
        processes: OneProcess = ONE_PROCESS,
    ):
        shape, self.processes = model.cfg, processes
        refuse_target_above(shape.d_sae, cfg.target_l0)
        self.model, self.cfg, self.steps = model, cfg, 0
        settings = cfg.resolve(shape.d_sae)
        self.sparsity = sparsity_term(
            cfg.jumprelu_sparsity_loss_mode,
            target_l0=cfg.target_l0,
            tanh_scale=cfg.jumprelu_tanh_scale,
            max_latent_density=settings.max_latent_density,
        )
        n_layers = shape.n_layers
        self.controls = [
            DictionaryControl(
                settings, keep_firing_record=True, index=index, of=n_layers, processes=processes
            )
            for index in range(n_layers)
        ]
        self._calibrated = False
        self._path_choice = PathChoice(cfg.step_kernel)
        self._buffers = [PairBuffers() for _ in range(n_layers)]
        self._finite_check = LastCheck()
        self._optimizer_hooks = OptimizerHooks(
            model.sources[0].W_dec, before=self._before_update, after=self._after_update
        )
        if settings.unit_norm_decoder:
            for source in model.sources:
                normalize_rows_(source.W_dec.data)
                keep_gradient_tangential(source.W_dec, self._by_kernels)

    # ---------------------------------------------------------------- one step

    def loss(
        self,
        inputs: Sequence[Float[Tensor, "batch d_in"]],
        targets: Sequence[Float[Tensor, "batch d_out"]],
    ) -> StepOutput:
        """The loss on a batch, scaled as training scales it; of its tokens, this process's.

        Raises:
            ValueError: activations or parameters that are not finite.
        """
        self._finite_check.finish()  # of a step that was followed by no update
        self._optimizer_hooks.restore_layout()
        if not self._calibrated:
            self._calibrate(inputs, targets)
        try:
            return self._step(inputs, targets)
        except BufferOverflow:  # nothing was kept of the step, and the buffers have grown
            return self._step(inputs, targets)

    def _step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> StepOutput:
        shape = self.model.cfg
        target = torch.cat(list(targets), dim=1)
        weights = self._token_weights(targets, self.processes)
        path = self._path_choice.start(target.device, self._dense_sizes(len(target)))
        steps, output = forward(
            self.model,
            inputs,
            [control.bandwidth or 0.0 for control in self.controls],
            path=path,
            buffers=self._buffers,
            to_input=self.controls[0].ste_input_share,
            multipliers=[control.density_multipliers(target.device) for control in self.controls],
            processes=self.processes,
        )
        active = [step.activations.detach() > 0 for step in steps]
        count = PairCount([step.entries for step in steps], active, self.processes)
        # A CLT's penalties are sums over latents, so all layers' travel in one piece.
        own = torch.stack([self.sparsity(step) for step in steps])
        penalties = self.processes.sum_over_shards(own).unbind()
        coefficients = self._coefficients()
        loss = self._reconstruction(output, target, weights)
        for coefficient, penalty in zip(coefficients, penalties, strict=True):
            loss = loss + coefficient * penalty
        pairs = count.finish()
        self._require_finite(loss, inputs, targets)
        tokens = len(target) * self.processes.replicas
        for control, of_layer in zip(self.controls, pairs, strict=True):
            control.take_active(of_layer, tokens)
        if loss.requires_grad:
            residual = (target - output).detach().unflatten(1, (shape.n_layers, shape.d_out))
            for index, step in enumerate(steps):
                acts = step.entries.as_matrix(step.activations, where=active[index])
                control = self.controls[index]
                control.observe(step, self.sparsity, penalties[index], coefficients[index], acts)
                if control.resampling_is_due():
                    later = residual[:, index:]
                    if weights is not None:
                        later = later * weights[:, index:, None].sqrt()
                    control.keep_for_resampling(inputs[index], later.flatten(1))
            self.steps += 1
        counted = [mask.sum() for mask in active]
        l0 = [control.batch_l0 for control in self.controls]
        return StepOutput(loss, target, output, counted, l0, coefficients, self.processes)

    def _token_weights(
        self, targets: Sequence[Float[Tensor, "batch d_out"]], processes: OneProcess
    ) -> Float[Tensor, "batch layers"] | None:
        """The weight of a token's squared error at each output; None: 1 for all."""
        ratio = self.cfg.outlier_norm_ratio
        if ratio is None:
            return None
        weights = [outlier_token_weights(y, ratio, processes=processes) for y in targets]
        return torch.stack(weights, dim=1)

    def _reconstruction(
        self,
        output: Float[Tensor, "batch layers*d_out"],
        target: Float[Tensor, "batch layers*d_out"],
        weights: Float[Tensor, "batch layers"] | None,
    ) -> Float[Tensor, ""]:
        if weights is None:
            return reconstruction(output, target)
        width = self.model.cfg.d_out
        layers = zip(output.split(width, 1), target.split(width, 1), weights.unbind(1), strict=True)
        return torch.stack([reconstruction(*layer) for layer in layers]).sum()

    def _dense_sizes(self, batch: int) -> tuple[int, int, int]:
        """(batch, d_in, d_sae) of one dense step that takes as many products as all of these."""
        cfg = self.model.cfg
        decoders = cfg.n_layers * (cfg.n_layers + 1) / 2 * cfg.d_out / cfg.d_in
        products = 2 * cfg.n_layers + 3 * decoders
        held = self.processes.held(cfg.d_sae)
        return round(batch * products / DENSE_PRODUCTS), cfg.d_in, held

    def _coefficients(self) -> list[float | Tensor]:
        fixed, warm_up = self.cfg.l0_coefficient, self.cfg.l0_warm_up_steps
        if fixed is None:
            return [control.multiplier for control in self.controls]
        share = min(1.0, (self.steps + 1) / warm_up) if warm_up else 1.0
        return [share * fixed] * self.model.cfg.n_layers

    def _require_finite(
        self, loss: Tensor, inputs: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> None:
        pairs = zip(self.model.cfg.pairs, inputs, targets, strict=True)
        activations = {
            hook: values
            for pair, x, y in pairs
            for hook, values in ((pair.hook_in, x), (pair.hook_out, y))
        }
        check = FiniteCheck(
            loss,
            self.model.sources,
            activations,
            self.steps,
            input_remedy="run the model in float32 or bfloat16",
            remedy="lower lr",
        )
        self._finite_check.begin(check, later=loss.is_cuda and loss.requires_grad)

    @torch.no_grad()
    def _calibrate(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """θ₀ and ε from the data, biases at the outputs' means, decoders where latents fire.

        Every process measures the whole batch.
        """
        inputs = [self.processes.gather_tokens(x) for x in inputs]
        targets = [self.processes.gather_tokens(y) for y in targets]
        weights = self._token_weights(targets, ONE_PROCESS)
        if weights is not None:
            # One outlier would move an output's mean, and the decoder rows of what fires on it.
            inlier = (weights == 1).all(1)
            inputs, targets = [x[inlier] for x in inputs], [y[inlier] for y in targets]
        means = [target.mean(0) for target in targets]
        centered = torch.cat([y - mean for y, mean in zip(targets, means, strict=True)], dim=1)
        layers = zip(self.model.sources, self.controls, inputs, means, strict=True)
        for source, control, x, mean in layers:
            z = x @ source.W_enc + source.b_enc
            source.threshold.data.fill_(control.settings.jumprelu_init_threshold)
            control.calibrate(source, z)
            source.b_dec.data.copy_(mean)
            written = centered[:, -source.W_dec.shape[1] :]
            rows, fires = output_directions(z, source.threshold, written)
            source.W_dec.data[fires] = rows[fires]
        self._calibrated = True

    # ---------------------------------------------------------------- around the optimizer's step

    def _by_kernels(self) -> bool:
        return self._path_choice.current == "triton"

    def _before_update(self) -> None:
        self._finite_check.finish()
        mean_l0 = sum(control.batch_l0 for control in self.controls) / len(self.controls)
        self._path_choice.finish(mean_l0 / self.model.cfg.d_sae)

    def _after_update(self) -> None:
        for source, control in zip(self.model.sources, self.controls, strict=True):
            control.after_update(
                source,
                self._optimizer_hooks.optimizer,
                unusual_inputs,
                by_kernels=self._by_kernels(),
            )

    def dead_share(self) -> float:
        """Share of all latents that have not fired for so long that they count as dead."""
        dead = torch.stack([control.dead() for control in self.controls])
        return float(self.processes.mean_over_shards(dead.float()))

    # ---------------------------------------------------------------- resuming

    def restore_layout(self) -> None:
        """Bring every parameter to its shape, should the optimizer's step have been interrupted."""
        self._optimizer_hooks.restore_layout()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside `tensors`, in JSON's types."""
        return {"steps": self.steps, "controls": [control.state() for control in self.controls]}

    def tensors(self) -> dict[str, Tensor]:
        """The controls' tensors, by name and layer."""
        return {
            f"{name}_{index}": tensor
            for index, control in enumerate(self.controls)
            for name, tensor in control.tensors().items()
        }

    def load_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` and `tensors` gave.

        Raises:
            ValueError: they have another form.
        """
        controls = state.get("controls") if isinstance(state, Mapping) else None
        if isinstance(controls, list):
            state = {**state, "controls": [with_earlier_defaults(each) for each in controls]}
        require_same_form(state, self.state())
        require_same_shapes(tensors, self.tensors())
        self.steps = state["steps"]
        for index, control in enumerate(self.controls):
            own = {name: tensors[f"{name}_{index}"] for name in control.tensors()}
            control.load_state(state["controls"][index], own)
        self._calibrated = all(control.bandwidth is not None for control in self.controls)
