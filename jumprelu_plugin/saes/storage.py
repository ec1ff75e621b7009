"""How a training SAE keeps, copies, saves and loads its parameters.

The optimizer may see a parameter in other units than everyone else: log θ in place of θ, or biases
in units of E‖x‖² = 1 or of the data's own spread (`control.units`). What is folded, saved or handed
on is always the plain parameter. W_enc lies by latent in memory.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens import JumpReLUTrainingSAE as StockTrainingSAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from torch import Tensor
from torch.nn.utils import parametrize
from typing_extensions import Self, override

from jumprelu_plugin.control.dictionary_control import DictionaryControl
from jumprelu_plugin.control.optimizer_hooks import OptimizerHooks
from jumprelu_plugin.control.saved_state import require_same_shapes
from jumprelu_plugin.control.standardization import Standardization
from jumprelu_plugin.control.units import (
    LogParameter,
    ScaledParameter,
    Units,
    parametrized,
    set_units,
    stored,
)
from jumprelu_plugin.records import require_file
from jumprelu_plugin.saes import checkpoint
from jumprelu_plugin.saes.tensor_files import explained

_NAMES = ("threshold", "b_enc", "b_dec")


class StoredParameters(StockTrainingSAE):
    """SAELens' training SAE with parameters that may be stored in other units.

    A parameter that is (`parametrized_names`) is computed when it is read: writing into it, or into
    its `.data`, changes nothing. Assign to it instead, `sae.b_dec = value`, or load a state dict.

    Attributes:
        control: what training keeps beside the parameters.
        calibrated: whether everything that the config leaves to the data is set.
        has_loaded_weights: whether its weights came from a file or a state dict, and the first
            batch is not to initialize them. Set it after assigning weights by hand.
        optimizer_hooks: around the steps of its optimizer; None before the first step.
        units: factors from the config's units to those of the activations.
        standardization: center and spread of the data, where training works in units of them; None
            before calibration.
        whitening: what shortens the data's longest directions (`control.calibration`), where
            training works in units of the data.
    """

    control: DictionaryControl
    units: Units
    standardization: Standardization | None = None
    whitening: Float[Tensor, "d_in d_in"] | None = None
    calibrated = False
    has_loaded_weights = False
    optimizer_hooks: OptimizerHooks | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that trains on its own: SAELens' normalization functions are closures over the
        SAE they were made for, and an optimizer's hooks belong to one SAE."""
        new = memo[id(self)] = type(self).__new__(type(self))
        vars(new).update(copy.deepcopy({**vars(self), "optimizer_hooks": None}, memo))
        new._setup_activation_normalization()
        return new

    def store_in_units(self, scale: float, *, standardizes: bool, log_threshold: bool) -> None:
        """Let the optimizer see θ and the biases divided by `scale`, or log θ.

        Args:
            standardizes: whether `standardize` will be called.
        """
        scaled = standardizes or scale != 1.0
        if log_threshold:
            parametrize.register_parametrization(self, "threshold", LogParameter(scale))
        elif scaled:
            parametrize.register_parametrization(self, "threshold", ScaledParameter(scale))
        if scaled:
            for name in ("b_enc", "b_dec"):
                parametrize.register_parametrization(self, name, ScaledParameter(scale))

    def standardize(self, found: Standardization) -> None:
        """From now on train in units of this center and spread; no parameter's value changes."""
        self.standardization = found
        scale = found.scale
        self.units = Units(self.units.activation * scale, self.units.loss * scale**2)
        set_units(self, "threshold", self.units.activation)
        set_units(self, "b_enc", self.units.activation)
        set_units(self, "b_dec", self.units.activation, found.center)

    def store_plainly(self) -> None:
        """Replace parametrized parameters by plain ones: for folding, when training is over."""
        for name in self.parametrized_names():
            parametrize.remove_parametrizations(self, name, leave_parametrized=True)

    def parametrized_names(self) -> list[str]:
        """The parameters that are stored in other units."""
        return [name for name in _NAMES if parametrized(self, name) is not None]

    def stored_parameters(self) -> dict[str, Tensor]:
        """Those parameters as the optimizer sees them; exp(log θ) is not exact to the last bit."""
        return {name: stored(self, name).detach().clone() for name in self.parametrized_names()}

    def load_stored_parameters(self, tensors: dict[str, Tensor]) -> None:
        """Set parameters from what `stored_parameters` gave."""
        # A checkpoint of an older version may hold none.
        for name in filter(tensors.__contains__, self.parametrized_names()):
            require_same_shapes(tensors, {name: stored(self, name)})
            stored(self, name).data.copy_(tensors[name])

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # θ stays in float32 at least, whatever the SAE's dtype, as SAELens keeps a plain one.
        out = super()._apply(*args, **kwargs)
        if parametrized(self, "threshold") is not None:
            threshold = stored(self, "threshold")
            exact = torch.promote_types(threshold.dtype, torch.float32)
            threshold.data = threshold.data.to(exact)
        return out  # type: ignore[return-value]

    # ---------------------------------------------------------------- folding

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Make the weights take and give raw activations.

        SAELens leaves a latent's activation in the scaled units, which a long mean makes smaller.
        What was trained in the data's own units keeps its unit rows instead: a latent's activation
        is then the norm of what it writes.
        """
        self.store_plainly()
        if self.standardization is None:
            return super().fold_activation_norm_scaling_factor(scaling_factor)
        for name in _NAMES:
            getattr(self, name).data /= scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        self.store_plainly()
        super().fold_activation_whitening(*args, **kwargs)

    @override
    def fold_W_dec_norm(self) -> None:
        self.store_plainly()
        super().fold_W_dec_norm()

    # ---------------------------------------------------------------- saving, loading

    @override
    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """As SAELens', in float64: in float32, numpy refuses to divide norms that are 1 ± 1e-7."""
        found = super().log_histograms()
        return {name: values.astype("float64") for name, values in found.items()}

    @override
    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """The state dict of a stock SAE: plain parameters, which say all without their units."""
        found = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in self.parametrized_names():
            del found[f"{prefix}parametrizations.{name}.original"]
            found[prefix + name] = getattr(self, name).detach()
        return found

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        threshold = state_dict.get(prefix + "threshold")
        if threshold is not None and (threshold != threshold[0]).any():  # or it was never trained
            self.has_loaded_weights = True
        for name in self.parametrized_names():
            how, plain = parametrized(self, name), prefix + name
            assert how is not None
            if plain in state_dict:
                key = f"{prefix}parametrizations.{name}.original"
                state_dict[key] = how.right_inverse(state_dict.pop(plain))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Write what stock SAELens reads: contiguous."""
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        self.has_loaded_weights = True
        state_dict["W_enc"] = by_latent(state_dict["W_enc"])

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save for resuming: SAELens' checkpoint files and, beside them, what they do not hold."""
        if self.optimizer_hooks is not None:  # the optimizer's step may have been interrupted
            self.optimizer_hooks.restore_layout()
        saved = super().save_model(path)
        tensors = self.stored_parameters()
        if self.whitening is not None:
            tensors["whitening"] = self.whitening
        checkpoint.write(Path(path), tensors, self.control, self.standardization)
        return saved

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        weights = Path(checkpoint_path, SAE_WEIGHTS_FILENAME)
        require_file(weights)
        with explained(weights):
            super().load_weights_from_checkpoint(checkpoint_path)
        found = checkpoint.read(Path(checkpoint_path), self.control)
        if found is not None:
            tensors, standardization = found
            with explained(Path(checkpoint_path, checkpoint.TENSORS_FILENAME)):
                if standardization is not None:
                    require_same_shapes({"center": standardization.center}, {"center": self.b_dec})
                    self.standardize(standardization)
                self.load_stored_parameters(tensors)
                if "whitening" in tensors:
                    square = self.W_enc.new_empty(self.cfg.d_in, self.cfg.d_in)
                    require_same_shapes(tensors, {"whitening": square})
            self.whitening = tensors.get("whitening")
        self.calibrated = self.control.bandwidth is not None


def by_latent(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """The same matrix, with each latent's encoder vector contiguous in memory.

    The fast step computes the encoder's gradient by latent ([d_sae, d_in]), and a parameter that is
    stored the same way takes it without a transposing copy.
    """
    return W_enc.t().contiguous().t()
