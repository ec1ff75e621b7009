"""What a cross-layer transcoder is, and how it is trained: two configs, and what they must hold.

Where a field means what it means for an SAE it has SAELens' name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jumprelu_plugin.control.dictionary_control import ControlSettings
from jumprelu_plugin.saes.resolved import density_limit, ste_input_share
from jumprelu_plugin.saes.validation import (
    a_density,
    a_share_with_input,
    a_target,
    no_fixed_penalty_to_warm_up,
    not_negative,
    one_of,
    positive,
    require,
    unread_bandwidth_std,
    unread_tanh_scale,
)
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
        model_name, model_class_name, model_from_pretrained_kwargs, dtype: the model it belongs to,
            and as what it was loaded.
        dataset_path, context_size: the text it was trained on, and the length of its sequences.

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
    model_class_name: str = "HookedSAETransformer"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    dataset_path: str = ""
    context_size: int | None = None

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
    def metadata(self) -> dict[str, Any]:
        """What an evaluation needs of the training, under the names that SAELens records."""
        return {
            "model_name": self.model_name,
            "model_class_name": self.model_class_name,
            "model_from_pretrained_kwargs": {
                **self.model_from_pretrained_kwargs,
                "dtype": self.dtype,
            },
            "dataset_path": self.dataset_path,
            "context_size": self.context_size,
        }

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
        jumprelu_ste_to_input, jumprelu_ste_input_share: whether the estimators' gradient also
            reaches the encoders, and how much of it. None: as for an SAE.
        unit_norm_decoder: hold ‖d_i‖ = 1, or leave the rows free. None: True where L0-controlled.
        resample_dead_latents: as for an SAE (`control.resampling`). None: True where L0-controlled.
        step_kernel: how encoding and decoding are computed (`step.choose`).
        jumprelu_bandwidth_std: where ε is taken from the data, how many standard deviations.
        max_latent_density: as for an SAE, for the latents of each layer: the largest share of
            tokens on which one is to fire (`control.density`). None is no limit.
        outlier_norm_ratio: as for an SAE, at each layer's output apart: the squared error of a
            token longer than this many times the batch's median norm counts as if it were that
            long. None is no limit: with one, massive activations are not reconstructed from a
            normalized input, whose tokens are all of one norm (docs/ablations.md).

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
    jumprelu_ste_input_share: float | None = None
    unit_norm_decoder: bool | None = None
    resample_dead_latents: bool | None = None
    step_kernel: Literal["auto", "sparse", "screened", "triton", "dense"] = "auto"
    jumprelu_bandwidth_std: float = 2.0
    max_latent_density: float | None = None
    outlier_norm_ratio: float | None = None

    def __post_init__(self) -> None:
        require(self, CLT_RULES)

    @property
    def controls_l0(self) -> bool:
        """Whether thresholds hold `target_l0` and λ is measured, instead of fixed."""
        return self.l0_coefficient is None

    def resolve(self, d_sae: int) -> ControlSettings:
        """The control of each layer of `d_sae` latents, with no field None."""
        controlled, target = self.controls_l0, self.target_l0 or 0.0
        rows, resample = self.unit_norm_decoder, self.resample_dead_latents
        return ControlSettings(
            d_sae=d_sae,
            controls_l0=controlled,
            target_l0=target,
            target_l0_start_ratio=1.0,
            target_l0_warm_up_steps=0,
            jumprelu_bandwidth=self.jumprelu_bandwidth or 0.0,
            jumprelu_bandwidth_std=self.jumprelu_bandwidth_std,
            jumprelu_init_threshold=self.jumprelu_init_threshold or 0.0,
            **ste_input_share(self),
            max_latent_density=density_limit(
                self.max_latent_density, target / d_sae, controls_l0=controlled
            ),
            resample_dead_latents=controlled if resample is None else resample,
            unit_norm_decoder=controlled if rows is None else rows,
        )


CLT_RULES = (
    a_target(24),
    *(
        positive(field)
        for field in (
            "target_l0",
            "jumprelu_bandwidth",
            "jumprelu_init_threshold",
            "jumprelu_tanh_scale",
            "jumprelu_bandwidth_std",
            "outlier_norm_ratio",
        )
    ),
    not_negative("l0_coefficient", "it must be 0 or more"),
    not_negative("l0_warm_up_steps", "it must be 0 or more"),
    a_density("max_latent_density"),
    a_share_with_input(),
    one_of("jumprelu_sparsity_loss_mode", SPARSITY_MODES),
    one_of("step_kernel", STEP_PATHS),
    no_fixed_penalty_to_warm_up("Give an l0_coefficient in place of target_l0, or leave it out"),
    unread_tanh_scale(),
    unread_bandwidth_std(),
)
