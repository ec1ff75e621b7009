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

from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig, StockConfig, as_plugin_config
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.transcoder import (
    JumpReLUTrainingSkipTranscoder,
    JumpReLUTrainingTranscoder,
)
from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.training.distributed.gradients import BACKWARD_ORDER, Gradients
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.distributed.mesh import Mesh
from jumprelu_plugin.training.distributed.processes import ManyProcesses, ShareOfGradient
from jumprelu_plugin.training.distributed.shares import require_divisible

# Rows of the whole dictionary that are drawn at one time.
_ROWS_AT_ONCE = 4096
# Parameters that are split, and the axis of the latents.
LATENT_AXIS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0}


def plain_name(name: str) -> str:
    """The SAE's attribute behind a name of `named_parameters`."""
    return name.removeprefix("parametrizations.").removesuffix(".original")


class ShardOfSAE(JumpReLUTrainingSAE):
    """One shard of a JumpReLU SAE in training.

    Args:
        cfg: of the whole dictionary.
        mesh: the processes that hold it and split its batches.

    Attributes:
        whole_cfg: of the whole dictionary; `cfg` is of this shard's latents.

    Raises:
        ValueError: the latents cannot be dealt evenly, or the config asks for something that
            shards do not have.
    """

    processes: ManyProcesses

    def __init__(self, cfg: StockConfig, mesh: Mesh):
        cfg = as_plugin_config(cfg)
        require_divisible(cfg, mesh.model_parallel_size)
        resolved = cfg.resolve()
        layout = LatentLayout(cfg.d_sae, mesh.model_parallel_size, resolved.matryoshka_widths)
        vars(self)["processes"] = ManyProcesses(layout, mesh)
        vars(self)["whole_cfg"] = cfg
        super().__init__(cfg)

    whole_cfg: JumpReLUTrainingSAEConfig
    gradients: Gradients | None = None

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
        layout = self.processes.layout
        if layout.shards == 1:
            return super().decode_prefixes(entries, *arguments)
        activations, W_dec, offset, wanted, scale, _ = arguments
        ends = [*layout.held_prefixes, layout.held]
        blocks = self.processes.sum_over_shards(entries.decode_blocks(activations, W_dec, ends))
        outputs = blocks.cumsum(1) + (offset if offset.ndim == 1 else offset[:, None])
        squares = (outputs[:, :-1] - wanted[:, None]).square().sum(2)
        return outputs[:, -1], (scale[:, None] * squares).mean(0)

    def _require_finite(self, loss: Tensor, rows: Tensor, step: int) -> None:
        # Every process must see what one of them sees, or the others would wait for it.
        vectors = self.b_enc.detach().sum() + self.threshold.detach().sum()
        super()._require_finite(
            loss + self.processes.mesh.latents.sum_in_place(0 * vectors), rows, step
        )

    @override
    def calibrate(self, rows: Float[Tensor, "tokens width"]) -> None:
        super().calibrate(self.processes.gather_tokens(rows))

    # ---------------------------------------------------------------- gradients

    def _begin_step(self, rows: Tensor) -> None:
        super()._begin_step(rows)
        if self.gradients is None and self.training:
            summed = frozenset({"b_dec"} if self.cfg.apply_b_dec_to_input else ())
            parameters = {plain_name(name): p for name, p in self.named_parameters()}
            matrices = [name for name in BACKWARD_ORDER if name in parameters]
            self.gradients = Gradients(
                parameters, matrices, frozenset(LATENT_AXIS), summed, self.processes
            )
            self.gradients.listen()
        if self.gradients is not None:
            self.gradients.begin()

    def _before_update(self) -> None:
        if self.gradients is None or not self.gradients.finished:
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


def shard_of(cfg: Any, mesh: Mesh) -> ShardOfSAE:
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
    return _SHARDS[name](cfg, mesh)


class _Draws(TorchFunctionMode):
    """Inside, `fill` decides what random draws put into a tensor."""

    _FUNCTIONS = (nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.uniform_)

    def fill(self, target: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """In place, fill a tensor that `draw` would fill; returns it."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func not in self._FUNCTIONS:
            return func(*args, **named)
        # `nn.init` hands its tensor on by name.
        target: Tensor = args[0] if args else named.pop("tensor")
        return self.fill(target, lambda rows: func(rows, *args[1:], **named))


class OwnRows(_Draws):
    """Inside, what is drawn for a shard's decoder rows is what one process draws for them.

    PyTorch's generator gives one number after the other, so all rows are drawn, a few at a time,
    and the shard's are kept. On a GPU, whose generator works otherwise, every shard still draws the
    same dictionary.
    """

    def __init__(self, layout: LatentLayout, shard: int):
        self._layout, self._shard = layout, shard

    @override
    def fill(self, target: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        if len(target) != self._layout.held:
            return draw(target)
        draw_rows(target, self._layout, self._shard, draw)
        return target


class Undrawn(_Draws):
    """Inside, nothing is drawn for weights that will be replaced.

    At 2,304 × 32,768, drawing takes 2.2 of the 2.7 seconds in which a dictionary is made.
    """

    @override
    def fill(self, target: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        return target.zero_()


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
