"""The parameters of a cross-layer transcoder and what they compute.

With layers 0 … n-1, inputs x_l and MLP outputs y_m:

    f_l = JumpReLU_θ(x_l W_enc_l + b_enc_l),      ŷ_m = Σ_{l ≤ m} f_l W_dec_{l→m} + b_dec_m

The decoders of a layer lie side by side in one matrix, [d_sae, later · d_out]: what a layer writes
is then one product, and a latent's row is all that it writes, which is the vector the tanh penalty
takes the norm of (Ameisen et al., 2025, section 2). There are none to earlier layers.

It trains nothing and reads no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jumprelu_plugin.control.decoder_norm import normalize_rows_
from jumprelu_plugin.saes.parameters import PairScale, Parameters, fold_scales_
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.running_outputs import RunningOutputs


class SourceLayer(nn.Module):
    """One layer: what its latents read and write.

    Shapes: W_enc [d_in, d_sae], b_enc [d_sae], threshold [d_sae], W_dec [d_sae, later · d_out] and
    b_dec [d_out], the bias of this layer's own output.
    """

    def __init__(self, d_in: int, d_sae: int, d_out: int, later: int):
        super().__init__()
        self.d_out, self.later = d_out, later
        # Stored by latent, as the fast step computes its gradient (`saes.jumprelu`).
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, later * d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.threshold = nn.Parameter(torch.zeros(d_sae))
        nn.init.kaiming_uniform_(self.W_enc.data.t())  # fan_in: d_in
        nn.init.kaiming_uniform_(self.W_dec.data)
        normalize_rows_(self.W_dec.data)

    # The interface of `saes.parameters.Parameters`, over trained parameters.

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_sae"]:
        z = x @ self.W_enc + self.b_enc
        return torch.relu(z) * (z > self.threshold)

    def write(self, f: Float[Tensor, "*n d_sae"]) -> Float[Tensor, "*n later d_out"]:
        """What these latents add to this layer's output and each later one's, without biases."""
        return (f @ self.W_dec).unflatten(-1, (self.later, self.d_out))

    def parameters_to_all(self) -> Parameters:
        """This layer as a transcoder from x to what it adds to its own and all later outputs.

        Raises:
            ValueError: values that are not finite, or negative thresholds.
        """
        bias = torch.zeros(self.W_dec.shape[1], dtype=self.b_dec.dtype)
        bias[: self.d_out] = self.b_dec.detach().cpu()
        named = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "threshold")}
        tensors = {name: value.detach().cpu() for name, value in named.items()}
        return Parameters(**tensors, b_dec=bias)


class CrossLayerTranscoder(nn.Module):
    """A cross-layer transcoder, in float32.

    Args:
        held: latents of each layer that are here, where several processes hold them; None: all.

    Attributes:
        cfg: sizes and places; of the whole transcoder.
        sources: its layers, in order.
    """

    def __init__(self, cfg: CLTConfig, held: int | None = None):
        super().__init__()
        self.cfg = cfg
        latents = cfg.d_sae if held is None else held
        self.sources: Sequence[SourceLayer] = nn.ModuleList(  # type: ignore[assignment]
            SourceLayer(cfg.d_in, latents, cfg.d_out, cfg.later(index))
            for index in range(cfg.n_layers)
        )

    @property
    def device(self) -> torch.device:
        return self.sources[0].b_enc.device

    def encode(self, x: Float[Tensor, "layers *n d_in"]) -> Float[Tensor, "layers *n d_sae"]:
        """Each layer's latents from its own input."""
        self._refuse_other_layers(x)
        inputs = x.unbind(0)
        return torch.stack([s.encode(part) for s, part in zip(self.sources, inputs, strict=True)])

    def decode(self, f: Float[Tensor, "layers *n d_sae"]) -> Float[Tensor, "layers *n d_out"]:
        """Each layer's output from the latents of its own layer and those before."""
        self._refuse_other_layers(f)
        running = RunningOutputs()
        return torch.stack(
            [
                running.take(index, source.write(f[index]).unbind(-2)) + source.b_dec
                for index, source in enumerate(self.sources)
            ]
        )

    def forward(self, x: Float[Tensor, "layers *n d_in"]) -> Float[Tensor, "layers *n d_out"]:
        return self.decode(self.encode(x))

    def _refuse_other_layers(self, values: Tensor) -> None:
        if len(values) != self.cfg.n_layers:
            raise ValueError(
                f"got {len(values)} layers of activations, shape {tuple(values.shape)}; this "
                f"transcoder has {self.cfg.n_layers}: give [layers, ..., width]"
            )

    @torch.no_grad()
    def fold_scales_(self, scales: Sequence[tuple[float, float] | PairScale]) -> None:
        """In place: from weights on s_in·(x - c_in) and s_out·(y - c_out), weights on x and y.

        Args:
            scales: of each layer, (s_in, s_out) or with centers. An encoder is multiplied by its
                own layer's s_in; each decoder is divided by the s_out of the layer it writes to; θ
                stays, and so does b_enc without centers.

        Raises:
            ValueError: not one pair a layer, or a scale that is not a positive finite number.
        """
        if len(scales) != self.cfg.n_layers:
            raise ValueError(f"{len(scales)} pairs of scales for {self.cfg.n_layers} layers")
        for scale in (number for pair in scales for number in pair[:2]):
            if not 0 < scale < float("inf"):
                raise ValueError(f"an activation scale is {scale}; expected a positive number")
        pairs = [PairScale.of(pair) for pair in scales]
        outputs = torch.tensor([pair.scale_out for pair in pairs], dtype=torch.float64)
        for index, (source, pair) in enumerate(zip(self.sources, pairs, strict=True)):
            per_column = outputs[index:].repeat_interleave(self.cfg.d_out)
            own = PairScale(pair.scale_in, 1.0, pair.center_in, ())
            fold_scales_(source, *own)
            source.W_dec.data /= per_column.to(source.W_dec)
            source.b_dec.data /= pair.scale_out
            if len(pair.center_out):
                source.b_dec.data += torch.tensor(pair.center_out).to(source.b_dec)
