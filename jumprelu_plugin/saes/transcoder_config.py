"""The configs of the training transcoders: the SAE's, an output width and an output hook."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig, check

_NORMALIZATIONS = ("none", "expected_average_only_in")


@dataclass
class JumpReLUTrainingTranscoderConfig(JumpReLUTrainingSAEConfig):
    """How to train a JumpReLU transcoder: latents read one hook and rebuild another.

    `JumpReLUTrainingTranscoderConfig(d_in=…, d_sae=…, target_l0=30, hook_name_out=…)` is a
    complete recipe. Every field of `JumpReLUTrainingSAEConfig` means the same here.

    Args:
        d_out: width of the output hook's activations; None takes d_in.
        hook_name_out: the hook whose activations are the target. The input hook is the runner
            config's `hook_name`.
        normalize_activations: `expected_average_only_in` divides input and target each by its own
            root mean square (E‖·‖² = d_in for both) and folds both scales when training is over.
        jumprelu_bandwidth_std: twice an SAE's. On layer 4 of the embedded Gemma 2 (2,048 latents, L0 24,
            800k tokens) held-out FVU was 0.377 with 2 and 0.401 with 1, before λ was measured.
        apply_b_dec_to_input: must stay False, since b_dec lives in the output's space.
    """

    apply_b_dec_to_input: bool = False
    jumprelu_bandwidth_std: float = 2.0
    d_out: int | None = None
    hook_name_out: str | None = None

    @override
    def __post_init__(self) -> None:
        if self.d_out is None:
            self.d_out = self.d_in
        if self.hook_name_out is not None:
            self.metadata.hook_name_out = self.hook_name_out
        super().__post_init__()

    @property
    @override
    def matryoshka_by_default(self) -> bool:
        # Measured on SAEs only.
        return False

    @property
    @override
    def limits_outliers_by_default(self) -> bool:
        # From a normalised input a long output is not rebuilt with it (docs/guides/transcoders-and-clt.md).
        return False

    @property
    def width_out(self) -> int:
        """d_out, which construction has filled in."""
        assert self.d_out is not None
        return self.d_out

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_transcoder"


@dataclass
class JumpReLUTrainingSkipTranscoderConfig(JumpReLUTrainingTranscoderConfig):
    """As `JumpReLUTrainingTranscoderConfig`, with a linear map W_skip from input to output."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_skip_transcoder"


def check_transcoder(cfg: JumpReLUTrainingTranscoderConfig) -> None:
    """Refuse a config that cannot train a transcoder.

    Raises:
        ValueError: naming the field, what it holds, and what to do.
    """
    check(cfg)
    if cfg.width_out < 1:
        raise ValueError(f"d_out is {cfg.d_out}; it must be the width of the output hook")
    if cfg.apply_b_dec_to_input:
        raise ValueError(
            "apply_b_dec_to_input is True, but a transcoder's b_dec lives in the output's space: "
            "leave it False"
        )
    if cfg.initialization != "saelens":
        raise ValueError(
            f"initialization is {cfg.initialization!r}, which makes the encoder of the decoder; a "
            "transcoder's are drawn apart: leave it 'saelens'"
        )
    if cfg.normalize_activations not in _NORMALIZATIONS:
        raise ValueError(
            f"normalize_activations is {cfg.normalize_activations!r}; a transcoder takes "
            f"{' or '.join(_NORMALIZATIONS)}: nothing else can be folded into its weights"
        )
    if cfg.reshape_activations != "none":
        raise ValueError(
            f"reshape_activations is {cfg.reshape_activations!r}; a transcoder takes flattened "
            "heads: leave it 'none'"
        )
