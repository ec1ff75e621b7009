"""The common representation of a dictionary, from which and to which every format converts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from jumprelu_plugin.saes.parameters import Parameters

_LAYER = re.compile(r"^blocks\.(\d+)\.(.+)$")


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A JumpReLU SAE or transcoder, with its hooks and its model.

    Attributes:
        parameters: in float32, in the units of the model's activations.
        hook_name: TransformerLens' name of the hook it reads; None if neither the files nor the
            user name it.
        hook_name_out: the hook that a transcoder writes; None for an SAE.
        model_name: a hub name or a model folder.
        metadata: the other metadata of a SAELens folder (context size, dataset, ...).

    Raises:
        ValueError: input and output have different widths, and `hook_name_out` is None.
    """

    parameters: Parameters
    hook_name: str | None = None
    hook_name_out: str | None = None
    model_name: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        square = self.parameters.d_in == self.parameters.d_out
        if not self.is_transcoder and not square:
            raise ValueError(
                f"the dictionary reads width {self.parameters.d_in} and writes width "
                f"{self.parameters.d_out}, so it is a transcoder: name the hook it writes with "
                "--hook_name_out"
            )

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another hook than it reads, or has a skip connection."""
        return self.hook_name_out not in (None, self.hook_name) or self.has_skip

    @property
    def has_skip(self) -> bool:
        """Whether it has a linear map from input to output."""
        return self.parameters.W_skip is not None

    @property
    def head(self) -> int | None:
        """The only head that it reads; None for all."""
        return self.metadata.get("hook_head_index")

    @property
    def architecture(self) -> str:
        """SAELens' name of its architecture."""
        if not self.is_transcoder:
            return "jumprelu"
        return "jumprelu_skip_transcoder" if self.has_skip else "jumprelu_transcoder"

    def site(self) -> tuple[int, str]:
        """The layer it reads, and the hook's name inside the block.

        Raises:
            ValueError: the hook is not known, or not inside a block.
        """
        return split_hook(self.hook_name)

    def site_out(self) -> tuple[int, str]:
        """The layer it writes, and the hook's name inside the block; for an SAE, as `site`.

        Raises:
            ValueError: the hook is not known, or not inside a block.
        """
        return split_hook(self.hook_name_out or self.hook_name)

    @torch.no_grad()
    def as_sae(self) -> Any:
        """A stock SAELens inference object with these parameters."""
        from sae_lens.registry import get_sae_class

        parameters = self.parameters
        sae_class, config_class = get_sae_class(self.architecture)
        config = {
            "architecture": self.architecture,
            "d_in": parameters.d_in,
            "d_sae": parameters.d_sae,
            "dtype": "float32",
            "apply_b_dec_to_input": parameters.subtracts_b_dec,
            "normalize_activations": "none",
            "metadata": self._full_metadata(),
        }
        if self.is_transcoder:
            config["d_out"] = parameters.d_out
        elif (self.hook_name or "").endswith("hook_z") and self.head is None:
            config["reshape_activations"] = "hook_z"
        sae = sae_class(config_class.from_dict(config))
        sae.load_state_dict(dict(parameters.tensors()))
        return sae.eval()

    def _full_metadata(self) -> dict[str, Any]:
        known = {
            "hook_name": self.hook_name,
            "hook_name_out": self.hook_name_out if self.is_transcoder else None,
            "model_name": self.model_name,
        }
        return {**self.metadata, **{k: v for k, v in known.items() if v is not None}}


def split_hook(hook: str | None) -> tuple[int, str]:
    """Split `blocks.3.ln2.hook_normalized` into `(3, "ln2.hook_normalized")`.

    Raises:
        ValueError: the hook is None, or not inside a block.
    """
    if hook is None:
        raise ValueError(
            "the files do not name the hook that the dictionary reads. Name it with --hook_name, "
            "for example --hook_name blocks.12.hook_resid_post"
        )
    match = _LAYER.match(hook)
    if match is None:
        raise ValueError(
            f"the hook {hook!r} is not inside a block; expected blocks.<layer>.<hook>, for "
            "example blocks.12.hook_resid_post"
        )
    return int(match[1]), match[2]
