"""Encode and decode with a trained JumpReLU SAE at the cost of its active latents. Opt-in.

A stock `sae_lens.JumpReLUSAE` multiplies out every latent twice, though a few of them are active.
`sparse_inference(sae)` is a copy that finds the active latents with one product and decodes from
them alone. Its outputs are the stock ones, up to the rounding of float32 sums. It stands wherever
the stock SAE does: alone, or spliced into a hooked model.

It never guesses: where the stock computation is observable in another way, it is the one that runs.
That is where gradients are wanted (use `torch.no_grad()`), where a hook reads the pre-activations,
where an input is not finite, and in half precision.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import JumpReLUSAE
from torch import Tensor, nn
from typing_extensions import override

from jumprelu_plugin.step.pattern import Pattern
from jumprelu_plugin.step.select import select


def sparse_inference(sae: JumpReLUSAE, *, screen: bool = False) -> SparseJumpReLUSAE:
    """A copy of an SAE, with sparse `encode`, `decode` and `forward`.

    Args:
        sae: a stock JumpReLU SAE. Its hook points are shared with the copy; its parameters are not,
            because the copy stores W_enc with each latent's vector contiguous.
        screen: look for active latents in bfloat16 first, and compute them in full precision.

    Raises:
        TypeError: `sae` is not a stock JumpReLU SAE.
    """
    if type(sae) not in (JumpReLUSAE, SparseJumpReLUSAE):
        raise TypeError(
            f"sparse_inference() takes a trained sae_lens.JumpReLUSAE; got {type(sae).__name__}. "
            "An SAE in training becomes one with SAE.load_from_disk once it is saved for inference"
        )
    twin = copy.copy(sae)
    twin.__class__ = SparseJumpReLUSAE
    assert isinstance(twin, SparseJumpReLUSAE)
    twin.cfg = copy.deepcopy(sae.cfg)  # `to` and folding write into it
    twin._parameters = {  # type: ignore[assignment]
        name: nn.Parameter(
            parameter.detach().t().contiguous().t()
            if name == "W_enc"
            else parameter.detach().clone(),
            requires_grad=parameter.requires_grad,
        )
        for name, parameter in sae.named_parameters(recurse=False)
    }
    # SAELens keeps these as closures, which keep what they saw in the SAE that made them.
    twin._setup_activation_normalization()
    if twin.hook_z_reshaping_mode:
        twin.turn_on_forward_pass_hook_z_reshaping()
    twin.screen = screen
    return twin


class SparseJumpReLUSAE(JumpReLUSAE):
    """A stock JumpReLU SAE computed from its active latents; made by `sparse`."""

    screen: bool

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae], dense, as the stock SAE gives them."""
        if self._wants_all(x) or _hooked(self.hook_sae_acts_pre) or not _finite(x):
            return super().encode(x)
        sae_in = self.process_sae_in(x)
        pattern, values = self._active(sae_in)
        acts = sae_in.new_zeros(pattern.batch, pattern.d_sae)
        acts[pattern.rows, pattern.cols] = values
        return self.hook_sae_acts_post(acts.view(*sae_in.shape[:-1], -1))

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction [..., d_in] of activations that are mostly zero."""
        if self._wants_all(feature_acts):
            return super().decode(feature_acts)
        acts = feature_acts.reshape(-1, feature_acts.shape[-1])
        pattern = Pattern(acts.nonzero().t(), len(acts), acts.shape[1])
        values = acts[pattern.rows, pattern.cols]
        return self._reconstruct(pattern, values, feature_acts.shape[:-1])

    @override
    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction; no tensor as wide as the dictionary where no hook asks for one."""
        observed = (
            self.hook_sae_input,
            self.hook_sae_acts_pre,
            self.hook_sae_acts_post,
            self.hook_sae_recons,
        )
        if self._wants_all(x) or any(map(_hooked, observed)) or not _finite(x):
            return super().forward(x)
        sae_in = self.process_sae_in(x)
        out = self._reconstruct(*self._active(sae_in), sae_in.shape[:-1])
        if self.use_error_term:
            out = out + self.hook_sae_error(x - out)
        return self.hook_sae_output(out)

    def _active(self, sae_in: Float[Tensor, "... d_in"]) -> tuple[Pattern, Float[Tensor, " nnz"]]:
        tokens = sae_in.reshape(-1, sae_in.shape[-1])
        # Below zero the ReLU is zero, whatever the threshold says.
        edge = self.threshold.clamp_min(0.0)
        pattern, z = select(tokens, self.W_enc, self.b_enc, edge, screen=self.screen)
        return pattern, self.activation_fn(z)

    def _reconstruct(
        self, pattern: Pattern, values: Float[Tensor, " nnz"], leading: torch.Size
    ) -> Tensor:
        out = pattern.times(values, self.W_dec) + self.b_dec
        out = self.hook_sae_recons(out.view(*leading, -1))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    def _wants_all(self, tensor: Tensor) -> bool:
        differentiable = torch.is_grad_enabled() and (
            tensor.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        return differentiable or self.dtype != torch.float32 or tensor.numel() == 0


def _hooked(point: nn.Module) -> bool:
    return bool(point._forward_hooks or point._backward_hooks)


def _finite(x: Tensor) -> bool:
    """Whether all of it is finite: NaN passes no threshold, and the stock SAE hands it on."""
    return bool(x.sum().isfinite())
