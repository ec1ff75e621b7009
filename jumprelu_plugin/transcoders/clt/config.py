"""What a cross-layer transcoder is, and how it is trained: two configs, and what they must hold.

Where a field means what it means for an SAE it has SAELens' name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jumprelu_plugin.step.choose import STEP_PATHS
from jumprelu_plugin.training.activations.pairs import HookPair

SPARSITY_MODES = ("step", "tanh")


@dataclass(frozen=True)
class CLTConfig:
    """Sizes and places.

    Attributes:
        d_in, d_out: widths of every input and every output hook.
        d_sae: latents of each layer.
        hook_in, hook_out: the pair at each layer; `{layer}` stands for its number.
        layers: which, consecutive and ascending.
        model_name: the model it belongs to.

    Raises:
        ValueError: layers that are not consecutive, a hook without `{layer}`, or a width below 1.
    """

    d_in: int
    d_out: int
    d_sae: int
    layers: tuple[int, ...]
    hook_in: str = "blocks.{layer}.ln2.hook_normalized"
    hook_out: str = "blocks.{layer}.hook_mlp_out"
    model_name: str = ""

    def __post_init__(self) -> None:
        layers = tuple(self.layers)
        object.__setattr__(self, "layers", layers)
        if not layers:
            raise ValueError("layers is empty; leave it out to train all")
        if layers[0] < 0 or layers != tuple(range(layers[0], layers[0] + len(layers))):
            raise ValueError(
                f"layers are {', '.join(map(str, layers))}; a cross-layer transcoder's latents "
                "write to every later layer, so its layers must be consecutive and ascending, "
                "such as 0-5"
            )
        for name in ("hook_in", "hook_out"):
            if "{layer}" not in getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must hold {{layer}}, such as "
                    "blocks.{layer}.hook_mlp_out, or all layers would have the same hook"
                )
        for name in ("d_in", "d_out", "d_sae"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def pairs(self) -> tuple[HookPair, ...]:
        """Both hooks of each layer."""
        return tuple(
            HookPair(
                self.hook_in.replace("{layer}", str(layer)),
                self.hook_out.replace("{layer}", str(layer)),
            )
            for layer in self.layers
        )

    def later(self, index: int) -> int:
        """How many layers the latents of the layer at `index` write to, its own among them."""
        return self.n_layers - index


@dataclass(frozen=True)
class CLTTrainingConfig:
    """How one is trained. `CLTTrainingConfig(target_l0=24)` is a complete recipe.

    Attributes:
        target_l0: active latents a token at each layer. Without `l0_coefficient`, every layer has
            its own controller (`control.l0`), which holds it and measures its coefficient.
        l0_coefficient: λ, fixed, the same at every layer.
        l0_warm_up_steps: steps over which a fixed λ rises from 0.
        jumprelu_sparsity_loss_mode: `step`, λ Σ_i H(z_i - θ_i), or `tanh`, λ Σ_i tanh(c·f_i·‖d_i‖)
            with d_i all of latent i's decoder rows in one vector.
        jumprelu_tanh_scale: c.
        jumprelu_bandwidth: ε; None takes it from the spread of each layer's pre-activations.
        jumprelu_init_threshold: θ₀; None takes it from their quantiles.
        jumprelu_ste_to_input: whether the estimators' gradient also reaches the encoders.
        decoder_rows: `unit_norm` holds ‖d_i‖ = 1, `free` does not. None: unit norm where
            `target_l0` is steered to.
        resample_dead_latents: as for an SAE (`control.resampling`); None: where it is steered to.
        step_kernel: how encoding and decoding are computed (`step.choose`).
        jumprelu_bandwidth_std: where ε is taken from the data, how many standard deviations.
        outlier_norm_ratio: as for an SAE, at each layer's output apart: the squared error of a token
            longer than this many times the batch's median norm counts as if it were that long.
            None is no limit: with one, massive activations are not rebuilt from a normalised
            input, whose tokens are all of one length (docs/cross_layer.md).

    Raises:
        ValueError: naming the field, what it holds, and what to do.
    """

    target_l0: float | None = None
    l0_coefficient: float | None = None
    l0_warm_up_steps: int = 0
    jumprelu_sparsity_loss_mode: Literal["step", "tanh"] = "step"
    jumprelu_tanh_scale: float = 4.0
    jumprelu_bandwidth: float | None = None
    jumprelu_init_threshold: float | None = None
    jumprelu_ste_to_input: bool = True
    decoder_rows: Literal["free", "unit_norm"] | None = None
    resample_dead_latents: bool | None = None
    step_kernel: Literal["auto", "sparse", "screened", "dense"] = "auto"
    jumprelu_bandwidth_std: float = 2.0
    outlier_norm_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.l0_coefficient is None and self.target_l0 is None:
            raise ValueError(
                "neither target_l0 nor l0_coefficient is set: give target_l0=24 (say) for 24 "
                "active latents a token at each layer, or l0_coefficient for a fixed penalty"
            )
        positive = (
            "target_l0", "jumprelu_bandwidth", "jumprelu_init_threshold", "jumprelu_tanh_scale",
            "jumprelu_bandwidth_std", "outlier_norm_ratio",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number greater than 0")
        if self.l0_coefficient is not None and not 0 <= self.l0_coefficient < math.inf:
            raise ValueError(f"l0_coefficient is {self.l0_coefficient}; it must be 0 or more")
        choices = {
            "jumprelu_sparsity_loss_mode": SPARSITY_MODES,
            "decoder_rows": (None, "free", "unit_norm"),
            "step_kernel": STEP_PATHS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(map(str, allowed))
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {names}")

    @property
    def controls_l0(self) -> bool:
        return self.l0_coefficient is None

    @property
    def unit_norm_decoder(self) -> bool:
        return self.controls_l0 if self.decoder_rows is None else self.decoder_rows == "unit_norm"

    @property
    def resamples_dead_latents(self) -> bool:
        return (
            self.controls_l0 if self.resample_dead_latents is None else self.resample_dead_latents
        )
