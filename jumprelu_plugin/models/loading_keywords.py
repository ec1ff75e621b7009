"""The keyword arguments with which a language model is loaded, sorted by who takes them.

SAELens hands `model_from_pretrained_kwargs` to the loader of the model's class and records them
with the SAE, because they decide which activations the SAE sees. Which of them a model can take
depends on its class and on where it comes from: a folder has no revision, and plain transformers
does not fold norms. What a model does not take is an error, never ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# TransformerLens' processing of weights. It changes activations, and for most not the output.
PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
# TransformerLens' hooks that fire only when their flag is set.
HOOK_FLAGS = ("use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in")
_DTYPE = ("dtype", "torch_dtype")
# Fields of TransformerLens' config.
_TOKENS = ("default_prepend_bos", "default_padding_side")
_SIZES = ("n_ctx", "first_n_layers")
# Keyword arguments of transformers' from_pretrained. The second group finds files on the hub.
_TRANSFORMERS = (
    "device_map",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "subfolder",
    "trust_remote_code",
    "use_safetensors",
    "variant",
    "weights_only",
)
_HUB = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
)
# Values that ask for what every class does by default.
_NEUTRAL = {
    **dict.fromkeys((*PROCESSING, *HOOK_FLAGS), False),
    **dict.fromkeys((*_SIZES, *_TOKENS, "device_map", "revision"), None),
    "n_devices": 1,
}
_HOOKED = ("HookedTransformer", "HookedSAETransformer")
_BRIDGES = ("TransformerBridge", "SAETransformerBridge")


@dataclass(frozen=True)
class LoadingKeywords:
    """Keyword arguments of a loader.

    Attributes:
        dtype: of the weights, None if it is not given.
        processing: TransformerLens' processing of weights, all five, by name.
        hook_flags: flags of hooks that are off by default, by name.
        config: fields of TransformerLens' config.
        loader: keyword arguments of transformers' or TransformerLens' from_pretrained.
    """

    dtype: str | None = None
    processing: Mapping[str, bool] = field(default_factory=lambda: dict.fromkeys(PROCESSING, False))
    hook_flags: Mapping[str, bool] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def sorted(
        cls, given: Mapping[str, Any], class_name: str, name: str, folder: Path | None
    ) -> LoadingKeywords:
        """Sort the arguments for a model of a class.

        Args:
            given: the arguments, with the names that SAELens records.
            class_name: the model's class, as for `load_model`.
            name: the model's name.
            folder: the model's folder; None for a hub name.

        Raises:
            ValueError: the model does not take one of them, or two give different dtypes.
            OSError: the config of a hub name cannot be had, where it decides.
        """
        named = {key: value for key, value in given.items() if not _is_neutral(key, value)}
        taken = _taken(class_name, folder)
        unknown = [key for key in named if key not in taken]
        if unknown and class_name not in _HOOKED:
            config = _config(name, folder)
            unknown = [key for key in unknown if not hasattr(config, key)]
        if unknown:
            source = "a hub name" if folder is None else "a folder"
            raise ValueError(
                f"model_from_pretrained_kwargs holds {', '.join(map(repr, unknown))}, which "
                f"{class_name} with {source} does not take: leave it out, or choose another "
                f"model_class_name. It takes {', '.join(taken)}"
            )
        dtypes = {str(named.pop(key)).removeprefix("torch.") for key in _DTYPE if key in named}
        if len(dtypes) > 1:
            raise ValueError(
                f"model_from_pretrained_kwargs names two dtypes, {' and '.join(sorted(dtypes))}: "
                "leave out dtype or torch_dtype"
            )
        own = _TOKENS if folder is None or class_name not in _HOOKED else _TOKENS + _SIZES
        if folder is None and class_name in _HOOKED:
            own = ()  # its loader takes them
        return cls(
            dtype=next(iter(dtypes), None),
            processing={key: bool(named.pop(key, False)) for key in PROCESSING},
            hook_flags={key: bool(named.pop(key)) for key in HOOK_FLAGS if key in named},
            config={key: named.pop(key) for key in own if key in named},
            loader=named,
        )

    def set_hook_flags(self, model: Any) -> None:
        """Turn on the hooks of the given flags.

        Raises:
            ValueError: the model's attention or MLPs cannot have such a hook.
        """
        for name, value in self.hook_flags.items():
            try:
                getattr(model, f"set_{name}")(value)
            except (AssertionError, NotImplementedError, ValueError) as error:
                raise ValueError(
                    f"model_from_pretrained_kwargs holds {name}={value}, which this model does "
                    f"not take: {error}"
                ) from error


def _taken(class_name: str, folder: Path | None) -> tuple[str, ...]:
    hub = () if folder is not None else _HUB
    if class_name in _BRIDGES:
        return (*PROCESSING, *HOOK_FLAGS, *_DTYPE, *_TOKENS, *_TRANSFORMERS, *hub)
    if class_name not in _HOOKED:
        return (*_DTYPE, "attn_implementation", *_TRANSFORMERS, *hub)
    if folder is not None:
        return (*PROCESSING, *HOOK_FLAGS, *_DTYPE, *_TOKENS, *_SIZES)
    from transformer_lens import HookedTransformer

    parameters = inspect.signature(HookedTransformer.from_pretrained).parameters.values()
    own = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = [name for name in own if name not in ("model_name", "device")]
    return tuple(
        dict.fromkeys((*own, *HOOK_FLAGS, *_DTYPE, "attn_implementation", *_TRANSFORMERS, *hub))
    )


def _is_neutral(name: str, value: Any) -> bool:
    return name in _NEUTRAL and type(value) is type(_NEUTRAL[name]) and value == _NEUTRAL[name]


def _config(name: str, folder: Path | None) -> Any:
    """The model's config, whose fields transformers' from_pretrained takes too."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder or name, local_files_only=folder is not None)
