"""The parameters of a trained JumpReLU dictionary, what they compute, and every way to fold them.

With d_in the width it reads, d_out the width it writes and d_sae latents:

    z = W_encᵀ(x − b_pre) + b_enc,  f = ReLU(z)·H(z − θ),  x̂ = W_decᵀ f + b_dec (+ W_skip x)

where b_pre is b_dec for an SAE that subtracts it (SAELens' `apply_b_dec_to_input`) and 0 otherwise.
A fold changes the parameters and keeps the function, or says which change of input it absorbs.
Folds are done in float64 and rounded once to the parameters' own type.

It reads and writes no files and knows no hook names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.records import is_number

# The letters of the shapes below, for the error message of a wrong one.
_SHAPES = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
    "W_skip": ("d_out", "d_in"),
}


@dataclass(frozen=True, eq=False)
class Parameters:
    """A JumpReLU SAE (d_out = d_in) or transcoder.

    Raises:
        ValueError: for a wrong shape, a NaN or infinite value, or a negative threshold.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    subtracts_b_dec: bool = False

    def __post_init__(self) -> None:
        _check_shapes(self.tensors(), self.subtracts_b_dec)
        for name, value in self.tensors().items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} holds NaN or infinite values: the dictionary is broken")
        negative = int((self.threshold < 0).sum())
        if negative:
            raise ValueError(
                f"{negative} of {self.d_sae} thresholds are negative (the lowest is "
                f"{float(self.threshold.min()):.3g}), and a tool without a ReLU would let negative "
                "activations through. SAELens has the ReLU, so clamping them changes nothing "
                "there: sae.threshold.data.clamp_(min=0), then save the SAE again"
            )

    @staticmethod
    def of(sae: Any) -> Parameters:
        """The parameters of a SAELens JumpReLU SAE or transcoder, as float32 on the CPU.

        Raises ValueError when the object has no thresholds (another architecture).
        """
        if not hasattr(sae, "threshold"):
            raise ValueError(
                f"{type(sae).__name__} has no thresholds: only JumpReLU dictionaries are handled "
                "here (architecture jumprelu, jumprelu_transcoder or jumprelu_skip_transcoder)"
            )
        tensors = {name: _plain(getattr(sae, name)) for name in _SHAPES if hasattr(sae, name)}
        return Parameters.named(tensors, bool(sae.cfg.apply_b_dec_to_input))

    @staticmethod
    def named(tensors: Mapping[str, Tensor], subtracts_b_dec: bool = False) -> Parameters:
        """Parameters from tensors under their own names, W_skip among them or not."""
        return Parameters(subtracts_b_dec=subtracts_b_dec, **dict[str, Any](tensors))

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, without W_skip where there is none."""
        named = {name: getattr(self, name) for name in _SHAPES}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, dtype: torch.dtype) -> Parameters:
        """The same parameters in another type."""
        return self._with(**{name: value.to(dtype) for name, value in self.tensors().items()})

    # ---------------------------------------------------------------- the function

    def pre_activations(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_sae"]:
        """z, before ReLU and threshold."""
        return (x - self.b_dec if self.subtracts_b_dec else x) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_sae"]:
        """f, zero where a latent does not pass its threshold."""
        z = self.pre_activations(x)
        return torch.relu(z) * (z > self.threshold)

    def decode(
        self, f: Float[Tensor, "*n d_sae"], x: Float[Tensor, "*n d_in"]
    ) -> Float[Tensor, "*n d_out"]:
        """x̂ from f; x only matters to a skip connection."""
        decoded = f @ self.W_dec + self.b_dec
        return decoded if self.W_skip is None else decoded + x @ self.W_skip.T

    # ---------------------------------------------------------------- folds

    def fold_b_dec(self) -> Parameters:
        """The same function without subtracting b_dec first: b_enc − b_decᵀ W_enc instead."""
        if not self.subtracts_b_dec:
            return self
        shift = self.b_dec.double() @ self.W_enc.double()
        b_enc = (self.b_enc.double() - shift).to(self.b_enc.dtype)
        return self._with(b_enc=b_enc, subtracts_b_dec=False)

    def fold_decoder_norms(self) -> Parameters:
        """The same function with unit decoder rows: each latent in units of its row's norm."""
        return self.with_decoder_norms(torch.ones_like(self.threshold))

    def with_decoder_norms(self, norms: Float[Tensor, " d_sae"]) -> Parameters:
        """The same function with decoder rows of these norms: each latent in other units.

        W_enc's column, b_enc and θ are multiplied by what the row is divided by. A latent whose row
        is zero, or is to be, stays as it is.
        """
        now, norms = self.W_dec.double().norm(dim=1), norms.double()
        factor = torch.where((now > 0) & (norms > 0), now / norms, 1.0)
        return self._with(
            W_enc=(self.W_enc.double() * factor).to(self.W_enc.dtype),
            b_enc=(self.b_enc.double() * factor).to(self.b_enc.dtype),
            threshold=(self.threshold.double() * factor).to(self.threshold.dtype),
            W_dec=(self.W_dec.double() / factor[:, None]).to(self.W_dec.dtype),
        )

    def fold_scales(
        self,
        input_scale: float,
        output_scale: float | None = None,
        input_center: Sequence[float] = (),
        output_center: Sequence[float] = (),
    ) -> Parameters:
        """For parameters trained on `input_scale`·(x - `input_center`) and the same of y: the same
        function on x and y.

        `output_scale` is the input's for an SAE (None); without centers they are 0. Raises
        ValueError for a scale that is not a positive finite number.
        """
        output_scale = input_scale if output_scale is None else output_scale
        for scale in (input_scale, output_scale):
            if not (scale > 0 and scale < float("inf")):
                raise ValueError(f"an activation scale is {scale}; expected a positive number")
        if self.subtracts_b_dec and input_scale != output_scale:
            raise ValueError(
                f"b_dec is subtracted from the input, so input and output have one scale; got "
                f"{input_scale} and {output_scale}"
            )
        skip = None if self.W_skip is None else self.W_skip * (input_scale / output_scale)
        folded = self._with(
            W_enc=self.W_enc * input_scale,
            W_dec=self.W_dec / output_scale,
            b_dec=self.b_dec / output_scale,
            W_skip=skip,
        )
        return folded._moved(input_center, output_center) if len(input_center) else folded

    def _moved(self, center_in: Sequence[float], center_out: Sequence[float]) -> Parameters:
        """For parameters on x - `center_in` and y - `center_out`: the same, on x and y."""
        if self.subtracts_b_dec:
            raise ValueError("b_dec is subtracted from the input: it holds the center itself")
        shift_in, shift_out = _double(center_in, self.b_enc), _double(center_out, self.b_dec)
        b_enc = self.b_enc.double() - shift_in @ self.W_enc.double()
        b_dec = self.b_dec.double() + shift_out
        if self.W_skip is not None:
            b_dec = b_dec - self.W_skip.double() @ shift_in
        return self._with(b_enc=b_enc.to(self.b_enc.dtype), b_dec=b_dec.to(self.b_dec.dtype))

    def fold_input_gain(self, gain: Float[Tensor, " d_in"]) -> Parameters:
        """For parameters trained on x: the same function of x·gain (a norm's gain, no zeros)."""
        if (gain == 0).any():
            raise ValueError("the gain has zeros: what they erase cannot be read back")
        gain = gain.double()
        skip = self.W_skip
        return self._with(
            W_enc=(self.W_enc.double() / gain[:, None]).to(self.W_enc.dtype),
            W_skip=None if skip is None else (skip.double() / gain).to(skip.dtype),
        )

    def _with(self, **changes: Any) -> Parameters:
        return dataclasses.replace(self, **changes)


class PairScale(NamedTuple):
    """What a transcoder's rows are in training: [s_in·(x - c_in) ‖ s_out·(y - c_out)].

    Attributes:
        scale_in, scale_out: s.
        center_in, center_out: c, [d_in] and [d_out]; empty where the origin is the center.
    """

    scale_in: float
    scale_out: float
    center_in: tuple[float, ...] = ()
    center_out: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Any) -> PairScale:
        """From a sequence as JSON gives it, with centers or without.

        Raises:
            ValueError: it is something else.
        """
        is_whole = isinstance(values, Sequence) and len(values) in (2, 4)
        scales, centers = (values[:2], values[2:]) if is_whole else ((), ())
        are_lists = all(isinstance(center, Sequence) for center in centers)
        if not (is_whole and are_lists and all(map(is_number, chain(scales, *centers)))):
            raise ValueError(
                f"the scales of a transcoder's rows are {values!r}; expected two numbers, or two "
                "numbers and two lists of numbers"
            )
        return cls(*scales, *map(tuple, centers))


@torch.no_grad()
def fold_scales_(
    transcoder: Any,
    scale_in: float,
    scale_out: float,
    center_in: Sequence[float] = (),
    center_out: Sequence[float] = (),
) -> None:
    """In place: from weights that map scale_in·(x - center_in) to scale_out·(y - center_out),
    weights that map x to y.

    W_enc·s_in, W_dec/s_out, b_dec/s_out, W_skip·s_in/s_out; θ stays, and so does b_enc without
    centers. Takes a training transcoder stored plainly or one of SAELens' inference classes.
    """
    transcoder.W_enc.data *= scale_in
    transcoder.W_dec.data /= scale_out
    transcoder.b_dec.data /= scale_out
    if hasattr(transcoder, "W_skip"):
        transcoder.W_skip.data *= scale_in / scale_out
    if not len(center_in):
        return
    shift = _double(center_in, transcoder.b_enc)
    transcoder.b_enc.data -= (shift @ transcoder.W_enc.double()).to(transcoder.b_enc)
    if len(center_out):
        transcoder.b_dec.data += _double(center_out, transcoder.b_dec).to(transcoder.b_dec)
    if hasattr(transcoder, "W_skip"):
        transcoder.b_dec.data -= (transcoder.W_skip.double() @ shift).to(transcoder.b_dec)


def dead_parameters(d_in: int, d_sae: int, d_out: int, *, skip: bool = False) -> Parameters:
    """A dictionary that never fires and writes zero: it stands in where none was trained."""
    return Parameters(
        W_enc=torch.zeros(d_in, d_sae),
        b_enc=torch.zeros(d_sae),
        W_dec=torch.zeros(d_sae, d_out),
        b_dec=torch.zeros(d_out),
        threshold=torch.full((d_sae,), 1e9),
        W_skip=torch.zeros(d_out, d_in) if skip else None,
    )


def _double(values: Sequence[float], like: Tensor) -> Float[Tensor, " n"]:
    return torch.as_tensor(values, dtype=torch.float64, device=like.device)


def _plain(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu().contiguous()


def _check_shapes(tensors: dict[str, Tensor], square: bool) -> None:
    sizes: dict[str, int] = {}
    for name, value in tensors.items():
        letters = _SHAPES[name]
        if value.ndim != len(letters):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected [{', '.join(letters)}]"
            )
        for letter, size in zip(letters, value.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, [{', '.join(letters)}], and the "
                    f"parameters before it say {letter} = {sizes[letter]}"
                )
    if square and sizes["d_in"] != sizes["d_out"]:
        raise ValueError(
            f"b_dec (width {sizes['d_out']}) is subtracted from the input (width {sizes['d_in']})"
        )
