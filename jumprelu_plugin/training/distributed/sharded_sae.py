"""The training SAE of one shard: the latents that this process holds, in the whole's step.

It is the SAE of one process, with its own latents in place of all of them. `step.processes` has the
sums over latents that its step takes; here are the few things that they do not cover: the weights
it starts from, the prefixes' errors, and the gradients of what every process holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from jumprelu_plugin.control.units import stored
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig, StockConfig, as_plugin_config
from jumprelu_plugin.saes.first_batch import full_precision
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.transcoder import (
    JumpReLUTrainingSkipTranscoder,
    JumpReLUTrainingTranscoder,
)
from jumprelu_plugin.step.choose import PLAIN_STEP_PATHS, PathChoice
from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.distributed.processes import ManyProcesses, ShareOfGradient

# SAELens' trainer clips the gradient's norm at this, of all parameters together.
MAX_GRADIENT_NORM = 1.0
# Rows of the whole dictionary that are drawn at one time.
_ROWS_AT_ONCE = 4096
# Parameters that are split, and the axis of the latents.
LATENT_AXIS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0}


class ShardOfSAE(JumpReLUTrainingSAE):
    """One shard of a JumpReLU SAE in training.

    Args:
        cfg: of the whole dictionary.
        group: the processes that hold it; None: all.
        shards: how many these are.

    Attributes:
        whole_cfg: of the whole dictionary; `cfg` is of this shard's latents.

    Raises:
        ValueError: the latents cannot be dealt evenly, or the config asks for something that
            shards do not have.
    """

    processes: ManyProcesses

    def __init__(self, cfg: StockConfig, shards: int, group: Any = None):
        cfg = as_plugin_config(cfg)
        if cfg.aux_loss_coefficient:
            raise ValueError(
                "aux_loss_coefficient needs every dead latent in one process: leave it out "
                "(resample_dead_latents does its work), or give model_parallel_size=1"
            )
        if cfg.step_kernel == "triton":
            raise ValueError(
                "step_kernel='triton' was never tried on shards: give 'auto', or "
                "model_parallel_size=1"
            )
        resolved = cfg.resolve()
        layout = LatentLayout(cfg.d_sae, shards, resolved.matryoshka_widths)
        vars(self)["processes"] = ManyProcesses(layout, group)
        vars(self)["whole_cfg"] = cfg
        super().__init__(cfg)
        self.path_choice = PathChoice(cfg.step_kernel, PLAIN_STEP_PATHS)
        self._ready = 0  # parameters whose gradient of this step is there
        self._finished = True

    whole_cfg: JumpReLUTrainingSAEConfig

    @override
    def initialize_weights(self) -> None:
        with OwnRows(self.processes.layout, self.processes.shard):
            super().initialize_weights()

    # ---------------------------------------------------------------- one step

    @override
    def decoder_offset(self, x: Tensor, b_dec: Tensor) -> Tensor:
        if self.cfg.apply_b_dec_to_input:
            shards = self.processes.layout.shards
            b_dec = ShareOfGradient.apply(b_dec, shards)  # type: ignore[assignment]
        return super().decoder_offset(x, b_dec)

    @override
    def decode_prefixes(
        self, entries: Entries, *arguments: Any
    ) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " prefixes"]]:
        activations, W_dec, offset, wanted, scale, _ = arguments
        layout = self.processes.layout
        ends = [*layout.held_prefixes, layout.held]
        blocks = self.processes.sum_over_shards(entries.decode_blocks(activations, W_dec, ends))
        outputs = blocks.cumsum(1) + (offset if offset.ndim == 1 else offset[:, None])
        squares = (outputs[:, :-1] - wanted[:, None]).square().sum(2)
        return outputs[:, -1], (scale[:, None] * squares).mean(0)

    def _require_finite(self, loss: Tensor, rows: Tensor, step: int) -> None:
        # Every process must see what one of them sees, or the others would wait for it.
        vectors = self.b_enc.detach().sum() + self.threshold.detach().sum()
        super()._require_finite(loss + self.processes.sum_in_place(0 * vectors), rows, step)

    # ---------------------------------------------------------------- gradients

    def _begin_step(self, rows: Tensor) -> None:
        first = self.optimizer_hooks is None
        super()._begin_step(rows)
        self._ready, self._finished = 0, False
        if first and self.training:
            # After the hooks of the decoder's constraint, which change a gradient.
            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(self._gradient_is_ready)

    def _gradient_is_ready(self, _: Tensor) -> None:
        self._ready += 1
        if self._ready == len(list(self.parameters())):
            self.finish_backward()

    @torch.no_grad()
    def finish_backward(self) -> None:
        """Make of every process's gradients the whole dictionary's, and clip their norm.

        SAELens' trainer clips each process's own norm afterwards, which is then below the bound.
        """
        if self.cfg.apply_b_dec_to_input:
            gradient = stored(self, "b_dec").grad
            assert gradient is not None
            self.processes.sum_in_place(gradient)
        everywhere = {id(parameter) for parameter in self.held_by_all()}
        gradients = [(p.grad, id(p) in everywhere) for p in self.parameters() if p.grad is not None]
        shared = sum(_square(grad) for grad, is_shared in gradients if is_shared)
        own = torch.stack([_square(grad) for grad, is_shared in gradients if not is_shared]).sum()

        def clip(squares: Tensor) -> None:
            norm = (squares + shared).sqrt()
            factor = (MAX_GRADIENT_NORM / (norm + 1e-6)).clamp_max(1.0)
            for gradient, _ in gradients:
                gradient.mul_(factor)

        self.processes.after_backward(own, clip)
        self.processes.finish_backward()
        self._finished = True

    def held_by_all(self) -> list[nn.Parameter]:
        """The parameters that every process holds whole."""
        split = {id(stored(self, name)) for name in LATENT_AXIS}
        return [parameter for parameter in self.parameters() if id(parameter) not in split]

    def _before_update(self) -> None:
        if not self._finished:
            raise RuntimeError("a parameter of this shard had no gradient: the step is not whole")
        super()._before_update()


class ShardOfTranscoder(ShardOfSAE, JumpReLUTrainingTranscoder):
    """One shard of a transcoder in training."""


class ShardOfSkipTranscoder(ShardOfSAE, JumpReLUTrainingSkipTranscoder):
    """One shard of a skip transcoder in training."""


_SHARDS: dict[str, type[ShardOfSAE]] = {
    "jumprelu": ShardOfSAE,
    "jumprelu_transcoder": ShardOfTranscoder,
    "jumprelu_skip_transcoder": ShardOfSkipTranscoder,
}


def shard_of(cfg: Any, shards: int, group: Any = None) -> ShardOfSAE:
    """This process's shard of the dictionary that a training config describes.

    Raises:
        ValueError: the architecture is not JumpReLU, or see `ShardOfSAE`.
    """
    name = cfg.architecture()
    if name not in _SHARDS:
        raise ValueError(
            f"architecture {name!r} is not trained on many processes; expected one of "
            f"{', '.join(_SHARDS)}"
        )
    return _SHARDS[name](cfg, shards, group)


class OwnRows(TorchFunctionMode):
    """Inside, what is drawn for a shard's decoder rows is what one process draws for them.

    PyTorch's generator gives one number after the other, so all rows are drawn, a few at a time,
    and the shard's are kept. On a GPU, whose generator works otherwise, every shard still draws the
    same dictionary.
    """

    _DRAWS = (nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.uniform_)

    def __init__(self, layout: LatentLayout, shard: int):
        self._layout, self._shard = layout, shard

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._DRAWS:
            return func(*args, **kwargs)
        named = dict(kwargs)
        # `nn.init` hands its tensor on by name.
        target: Tensor = args[0] if args else named.pop("tensor")
        if len(target) != self._layout.held:
            return func(*args, **kwargs)
        draw_rows(
            target,
            self._layout,
            self._shard,
            lambda rows: func(rows, *args[1:], **named),
        )
        return target


@torch.no_grad()
def draw_rows(
    own: Float[Tensor, "held width"],
    layout: LatentLayout,
    shard: int,
    draw: Callable[[Tensor], Any],
) -> None:
    """In place, fill a shard's rows with what `draw` fills them with in the whole dictionary."""
    slices = layout.slices(shard)
    sizes = [piece.stop - piece.start for piece in slices]
    done = {piece.start: sum(sizes[:i]) for i, piece in enumerate(slices)}
    for start in range(0, layout.d_sae, _ROWS_AT_ONCE):
        rows = own.new_empty(min(_ROWS_AT_ONCE, layout.d_sae - start), own.shape[1])
        draw(rows)
        for piece in slices:
            first, last = max(piece.start, start), min(piece.stop, start + len(rows))
            if first < last:
                place = done[piece.start] + first - piece.start
                own[place : place + last - first] = rows[first - start : last - start]


def _square(gradient: Tensor) -> Tensor:
    return full_precision(gradient).square().sum()
