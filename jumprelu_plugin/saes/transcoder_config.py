"""The configs of the training transcoders: the SAE's, with an output width and an output hook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig


@dataclass
class JumpReLUTrainingTranscoderConfig(JumpReLUTrainingSAEConfig):
    """How to train a JumpReLU transcoder: latents read one hook and reconstruct another.

    `JumpReLUTrainingTranscoderConfig(d_in=…, d_sae=…, target_l0=30, hook_name_out=…)` is a
    complete recipe. Every field of `JumpReLUTrainingSAEConfig` means the same here. There is no
    limit on outlier tokens unless it is asked for.

    Args:
        d_out: width of the output hook's activations; None takes d_in.
        hook_name_out: the hook whose activations are the target. The input hook is the runner
            config's `hook_name`.
        normalize_activations: `expected_average_only_in` divides input and target each by its own
            root mean square (E‖·‖² = d_in for both) and folds both scales when training is over.
        jumprelu_bandwidth_std: twice an SAE's.
        apply_b_dec_to_input: must stay False, since b_dec lives in the output's space.
    """

    # From a normalized input a long output is not reconstructed with it (docs/ablations.md).
    outlier_limit_by_default: ClassVar[bool] = False

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
