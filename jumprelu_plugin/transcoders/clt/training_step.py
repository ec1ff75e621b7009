"""A cross-layer transcoder in training: its loss, each layer's L0 control, and what follows a step.

The reconstruction is joint, ‖y - ŷ‖² over all outputs. Sparsity is each layer's own: a controller a
layer holds its L0 (`control.l0`), and its coefficient is the price that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.control.calibration import calibrate
from jumprelu_plugin.control.decoder_norm import normalize_rows_, remove_parallel_gradient_
from jumprelu_plugin.control.l0 import L0Controller
from jumprelu_plugin.control.optimizer_hooks import OptimizerHooks
from jumprelu_plugin.control.resampling import (
    FiringRecord,
    patience,
    resample_dead_,
    unusual_inputs,
)
from jumprelu_plugin.step.choose import DENSE_PRODUCTS, PathChoice
from jumprelu_plugin.step.losses import (
    Step,
    outlier_token_weights,
    reconstruction,
    sparsity_term,
    threshold_slopes,
)
from jumprelu_plugin.transcoders.clt.config import CLTTrainingConfig
from jumprelu_plugin.transcoders.clt.forward import forward
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder, SourceLayer

# The L0 that calibration aims at where none was asked for, as a share of the latents.
_START_SHARE = 0.05


@dataclass(frozen=True)
class StepOutput:
    """What one step gave.

    Attributes:
        loss: to call backward on.
        target, output: y and ŷ, [batch, layers · d_out], in the units of training.
        l0: of each layer.
        coefficients: λ of each layer.
    """

    loss: Float[Tensor, ""]
    target: Float[Tensor, "batch layers*d_out"]
    output: Float[Tensor, "batch layers*d_out"]
    l0: list[float]
    coefficients: list[float | Tensor]

    def fvu(self, n_layers: int) -> list[float]:
        """Fraction of variance unexplained of each layer's output on this batch."""
        with torch.no_grad():
            residual = (self.output - self.target).square().sum(0)
            deviation = (self.target - self.target.mean(0)).square().sum(0)
            shape = (n_layers, -1)
            return (residual.view(shape).sum(1) / deviation.view(shape).sum(1)).tolist()

    def errors(self, n_layers: int) -> Float[Tensor, " layers"]:
        """Mean over tokens of each layer's ‖ŷ - y‖²."""
        with torch.no_grad():
            squares = (self.output - self.target).square().sum(0).view(n_layers, -1)
            return squares.sum(1) / len(self.target)


class CLTTrainingStep:
    """Everything a training keeps beside the parameters.

    `loss` begins a step and calibrates on the first; the rest happens around the step of the
    optimiser that holds the parameters (`OptimizerHooks`).
    """

    def __init__(self, model: CrossLayerTranscoder, cfg: CLTTrainingConfig):
        shape = model.cfg
        if cfg.target_l0 is not None and cfg.target_l0 > shape.d_sae:
            raise ValueError(
                f"target_l0 is {cfg.target_l0}; it must be at most d_sae, which is {shape.d_sae}"
            )
        self.model, self.cfg = model, cfg
        self.sparsity = sparsity_term(
            cfg.jumprelu_sparsity_loss_mode,
            target_l0=cfg.target_l0,
            tanh_scale=cfg.jumprelu_tanh_scale,
        )
        layers = range(shape.n_layers)
        steered = cfg.controls_l0 and cfg.target_l0 is not None
        self.controllers = [L0Controller(cfg.target_l0 or 0.0) for _ in layers] if steered else []
        self.firing = [FiringRecord(shape.d_sae) for _ in layers]
        self.bandwidths: list[float] = []
        self.steps = 0
        self._path = PathChoice(cfg.step_kernel)
        self._l0 = [0.0] * shape.n_layers
        self._batch = 1
        self._slopes: list[Tensor] = []
        self._latest: dict[int, tuple[Tensor, Tensor]] = {}  # inputs and residual of a layer
        self._seam = OptimizerHooks(
            model.sources[0].W_dec, before=self._gradients_ready, after=self._parameters_moved
        )
        if cfg.unit_norm_decoder:
            for source in model.sources:
                normalize_rows_(source.W_dec.data)
                source.W_dec.register_post_accumulate_grad_hook(_make_tangential)

    # ---------------------------------------------------------------- one step

    def loss(
        self,
        inputs: Sequence[Float[Tensor, "batch d_in"]],
        targets: Sequence[Float[Tensor, "batch d_out"]],
    ) -> StepOutput:
        """The loss on a batch, scaled as training scales it.

        Raises:
            ValueError: activations or parameters that are not finite.
        """
        self._seam.settle()
        if not self.bandwidths:
            self._calibrate(inputs, targets)
        target = torch.cat(list(targets), dim=1)
        worth = self._worth(targets)
        self._batch = len(target)
        path = self._path.start(target.device, self._sizes(len(target)))
        steps, output = forward(
            self.model,
            inputs,
            self.bandwidths,
            path=path,
            to_input=self.cfg.jumprelu_ste_to_input,
        )
        penalties = [self.sparsity(step) for step in steps]
        coefficients = self._coefficients()
        loss = self._reconstruction(output, target, worth)
        for coefficient, penalty in zip(coefficients, penalties, strict=True):
            loss = loss + coefficient * penalty
        self._refuse_non_finite(loss, inputs, target)
        if loss.requires_grad:
            residual = (target - output).detach()
            self._watch(steps, penalties, coefficients, inputs, residual, worth)
            self.steps += 1
        return StepOutput(loss, target, output, list(self._l0), coefficients)

    def _worth(
        self, targets: Sequence[Float[Tensor, "batch d_out"]]
    ) -> Float[Tensor, "batch layers"] | None:
        """What a token's squared error counts at each output (`outlier_token_weights`); None: in full."""
        limit = self.cfg.outlier_norm_ratio
        if limit is None:
            return None
        return torch.stack([outlier_token_weights(target, limit) for target in targets], dim=1)

    def _reconstruction(
        self,
        output: Float[Tensor, "batch layers*d_out"],
        target: Float[Tensor, "batch layers*d_out"],
        worth: Float[Tensor, "batch layers"] | None,
    ) -> Float[Tensor, ""]:
        if worth is None:
            return reconstruction(output, target)
        width = self.model.cfg.d_out
        sides = zip(output.split(width, 1), target.split(width, 1), worth.unbind(1), strict=True)
        return torch.stack([reconstruction(*side) for side in sides]).sum()

    def _sizes(self, batch: int) -> tuple[int, int, int]:
        """(batch, d_in, d_sae) of one dense step that takes as many products as all of these."""
        cfg = self.model.cfg
        decoders = cfg.n_layers * (cfg.n_layers + 1) / 2 * cfg.d_out / cfg.d_in
        products = 2 * cfg.n_layers + 3 * decoders
        return round(batch * products / DENSE_PRODUCTS), cfg.d_in, cfg.d_sae

    def _coefficients(self) -> list[float | Tensor]:
        if self.controllers:
            return [controller.coefficient for controller in self.controllers]
        warm_up, fixed = self.cfg.l0_warm_up_steps, self.cfg.l0_coefficient
        assert fixed is not None
        share = min(1.0, (self.steps + 1) / warm_up) if warm_up else 1.0
        return [share * fixed] * self.model.cfg.n_layers

    def _watch(
        self,
        steps: Sequence[Step],
        penalties: Sequence[Tensor],
        coefficients: Sequence[float | Tensor],
        inputs: Sequence[Tensor],
        residual: Tensor,
        worth: Float[Tensor, "batch layers"] | None,
    ) -> None:
        """Measure what control and restarts need of this batch."""
        self._slopes, self._latest = [], {}
        for index, step in enumerate(steps):
            active = step.entries.as_matrix(step.activations, where=step.activations > 0)
            count = active._nnz() if active.is_sparse else active.count_nonzero()
            self._l0[index] = float(count) / step.entries.batch
            if self.controllers:
                self._price(index, step, penalties[index], coefficients[index])
            self.firing[index].update(active)
            restarts = self.cfg.resamples_dead_latents
            if restarts and self.firing[index].due(self._patience(index)):
                later = residual[:, index * self.model.cfg.d_out :]
                if worth is not None:
                    by_output = later.unflatten(1, (-1, self.model.cfg.d_out))
                    later = (by_output * worth[:, index:, None].sqrt()).flatten(1)
                self._latest[index] = inputs[index].detach(), later

    def _price(self, index: int, step: Step, penalty: Tensor, coefficient: float | Tensor) -> None:
        controller = self.controllers[index]
        slopes = threshold_slopes(self.sparsity, step, penalty)
        self._slopes.append(slopes.l0)
        paid = coefficient * slopes.penalty

        def price(gradient: Tensor) -> None:
            controller.price(gradient.sum() - paid, slopes.penalty)

        step.threshold.register_hook(price)

    def _patience(self, index: int) -> int:
        target = self.cfg.target_l0 or max(1.0, self._l0[index])
        return patience(self.model.cfg.d_sae, target, self._batch)

    def _refuse_non_finite(self, loss: Tensor, inputs: Sequence[Tensor], target: Tensor) -> None:
        # A latent whose b_enc or θ is NaN is selected nowhere, and the loss would not show it.
        vectors = sum(
            s.b_enc.detach().sum() + s.threshold.detach().sum() for s in self.model.sources
        )
        if torch.isfinite(loss.detach() + 0 * vectors):
            return
        width = self.model.cfg.d_out
        for pair, x, y in zip(self.model.cfg.pairs, inputs, target.split(width, 1), strict=True):
            for hook, values in ((pair.hook_in, x), (pair.hook_out, y)):
                if not torch.isfinite(values).all():
                    raise ValueError(
                        f"the activations of {hook} hold NaN or infinite values (training step "
                        f"{self.steps}); run the model in float32 or bfloat16"
                    )
        raise ValueError(
            f"the loss became {loss.item()} at training step {self.steps} though the activations "
            "are finite: the training diverged; lower lr"
        )

    # ---------------------------------------------------------------- the first step

    @torch.no_grad()
    def _calibrate(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """θ₀ and ε from the data, biases at the outputs' means, decoders where latents fire."""
        cfg, worth = self.cfg, self._worth(targets)
        if worth is not None:
            # One outlier would move an output's mean, and the decoder rows of what fires on it.
            usual = (worth == 1).all(1)
            inputs, targets = [x[usual] for x in inputs], [y[usual] for y in targets]
        aim = self.controllers[0].aim() if self.controllers else _START_SHARE * self.model.cfg.d_sae
        means = [target.mean(0) for target in targets]
        centred = torch.cat([y - mean for y, mean in zip(targets, means, strict=True)], dim=1)
        for source, x, mean in zip(self.model.sources, inputs, means, strict=True):
            z = x @ source.W_enc + source.b_enc
            found = calibrate(z, aim, cfg.jumprelu_bandwidth_std)
            start = cfg.jumprelu_init_threshold
            source.threshold.data.copy_(found.threshold if start is None else torch.tensor(start))
            self.bandwidths.append(cfg.jumprelu_bandwidth or found.bandwidth)
            source.b_dec.data.copy_(mean)
            self._aim_decoder(source, z, centred[:, -source.W_dec.shape[1] :])

    def _aim_decoder(self, source: SourceLayer, z: Tensor, centred: Tensor) -> None:
        """Each row of W_dec along the mean of all outputs where its latent fires."""
        rows = (z * (z > source.threshold)).t() @ centred
        fires = rows.norm(dim=1) > 0
        normalize_rows_(rows)
        source.W_dec.data[fires] = rows[fires]

    # ---------------------------------------------------------------- around the optimiser's step

    def _gradients_ready(self) -> None:
        self._path.finish(sum(self._l0) / (len(self._l0) * self.model.cfg.d_sae))

    @torch.no_grad()
    def _parameters_moved(self) -> None:
        for index, source in enumerate(self.model.sources):
            if self.cfg.unit_norm_decoder:
                normalize_rows_(source.W_dec.data)
            if self.controllers and self._slopes:
                shift = self.controllers[index].shift(
                    self._l0[index], self._slopes[index], self.bandwidths[index]
                )
                source.threshold.data.copy_(
                    torch.maximum(source.threshold + shift, 0.5 * source.threshold)
                )
            # Also after the last step: below 0, an active latent could be negative.
            source.threshold.data.clamp_(min=0.0)
            if self.cfg.resamples_dead_latents:
                self._restart(index, source)
        self._slopes = []

    def _restart(self, index: int, source: SourceLayer) -> None:
        firing, optimizer = self.firing[index], self._seam.optimizer
        assert optimizer is not None
        if not firing.may_resample(optimizer) or index not in self._latest:
            return
        x, residual = self._latest.pop(index)
        seed = firing.steps * self.model.cfg.n_layers + index
        resample_dead_(
            source, firing, self._patience(index), x, residual, unusual_inputs, optimizer, seed
        )

    def dead_share(self) -> float:
        """Share of all latents silent for so long that they count as dead."""
        shares = [
            float(record.dead(self._patience(index)).float().mean())
            for index, record in enumerate(self.firing)
        ]
        return sum(shares) / len(shares)

    # ---------------------------------------------------------------- resuming

    def settle(self) -> None:
        """Bring every parameter to its shape, should the optimiser's step have been interrupted."""
        self._seam.settle()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, in JSON's types."""
        return {
            "steps": self.steps,
            "bandwidths": self.bandwidths,
            "l0": self._l0,
            "controllers": [controller.state() for controller in self.controllers],
            "firing": [record.state() for record in self.firing],
        }

    def firing_tensors(self) -> dict[str, Tensor]:
        """How long each latent has lived and been silent, by layer."""
        return {
            f"{name}_{index}": tensor
            for index, record in enumerate(self.firing)
            for name, tensor in record.tensors().items()
        }

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.steps, self.bandwidths = state["steps"], list(state["bandwidths"])
        self._l0 = list(state["l0"])
        for controller, saved in zip(self.controllers, state["controllers"], strict=True):
            controller.load_state(saved)
        for index, (record, saved) in enumerate(zip(self.firing, state["firing"], strict=True)):
            record.load_state(
                saved, {name: tensors[f"{name}_{index}"] for name in record.tensors()}
            )


def _make_tangential(W_dec: Tensor) -> None:
    if W_dec.grad is not None:
        remove_parallel_gradient_(W_dec.grad, W_dec.data)
