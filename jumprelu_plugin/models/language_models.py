"""Language models for training and evaluation: the embedded Gemma 2, a local folder, or a hub name.

Every route gives the same unprocessed model (no folded norms, no centered weights), in evaluation
mode, in float32 by default. HookedTransformer takes its sizes from a table of names, which knows no
small Gemma 2, so that route builds the configuration from the folder's own config.json.

This file does not attach SAEs and does not choose hook points.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from sae_lens.util import str_to_dtype
from torch import nn

EMBEDDED_MODEL = "tiny-gemma-2"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class _Source:
    """A model to load: its name, its folder (None for a hub name), and what it becomes."""

    name: str
    folder: Path | None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def path(self) -> str | Path:
        """What transformers' loaders take."""
        return self.name if self.folder is None else self.folder


def embedded_model_folder() -> Path:
    """The folder of the Gemma 2 inside this package: weights, tokenizer, README.md card."""
    return Path(__file__).parent / "tiny_gemma_2"


def load_model(
    model: str | Path = EMBEDDED_MODEL,
    model_class_name: str = "HookedSAETransformer",
    device: str = "cpu",
    dtype: str = "float32",
    **from_pretrained_kwargs: Any,
) -> Any:
    """Load a causal language model with its tokenizer at `.tokenizer`.

    Args:
        model: `EMBEDDED_MODEL`, a local folder in Hugging Face layout (config.json, weights,
            tokenizer), or a hub name. Only a hub name uses the network.
        model_class_name: "HookedTransformer", "HookedSAETransformer" (from a folder: Gemma 2 only),
            "TransformerBridge", "SAETransformerBridge" (both in compatibility mode without weight
            processing, so that hooks have HookedTransformer's names), or "AutoModelForCausalLM"
            (plain transformers, eager attention).
        device: where the weights go.
        dtype: of the weights.
        from_pretrained_kwargs: further arguments of the loader of a hub name; a local folder, which
            is read as it is, takes none of them.

    Raises:
        ValueError: for an unknown class or dtype, or a folder whose architecture the class cannot
            hold.
        FileNotFoundError: for a folder without config.json or tokenizer, or a path that is absent.
        OSError: for a hub name whose weights cannot be had, with what to do about a licence gate.
    """
    if model_class_name not in _LOADERS:
        raise ValueError(
            f"Unknown model class {model_class_name!r}: expected one of {sorted(_LOADERS)}."
        )
    source = _Source(str(model), local_folder(model), device, str_to_dtype(dtype))
    if source.folder is not None:
        _require_files(source.folder)
        return _LOADERS[model_class_name](source).eval()
    with hub_errors_explained(source.name):
        return _LOADERS[model_class_name](source, **from_pretrained_kwargs).eval()


@contextmanager
def hub_errors_explained(name: str) -> Iterator[None]:
    """Say what to do when the model `name` cannot be loaded from the hub.

    Raises, in place of what the libraries raise: ValueError for a name that TransformerLens does
    not know, OSError for weights that cannot be had.
    """
    try:
        yield
    except ValueError as error:
        if "Valid official model names" not in str(error):
            raise
        from transformer_lens.loading_from_pretrained import OFFICIAL_MODEL_NAMES

        close = get_close_matches(name, OFFICIAL_MODEL_NAMES, n=3, cutoff=0.5)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ValueError(
            f"TransformerLens knows no model {name!r}{hint}. Give a hub name, the folder of a "
            f"model, or {EMBEDDED_MODEL!r} for the model inside this package."
        ) from error
    except OSError as error:
        raise OSError(
            f"The model {name!r} could not be had from the hub: {str(error).splitlines()[0]}\n"
            "Gemma's weights are gated: accept the licence on the model's page and log in with "
            "`hf auth login`. Without a network, give the folder of a model, or "
            f"{EMBEDDED_MODEL!r} for the model inside this package."
        ) from error


def build_hooked(hooked_class: Any, model: str | Path, device: str = "cpu") -> Any:
    """`model` as an unprocessed instance of `hooked_class`, a subclass of HookedTransformer.

    Raises as `load_model` does.
    """
    source = _Source(str(model), local_folder(model), device)
    if source.folder is not None:
        _require_files(source.folder)
    return _build_hooked(hooked_class, source).eval()


def model_digest(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of the weights' names, types, shapes and bytes.

    The digest is of the object's own layout, so a HookedTransformer and a plain transformers model
    of the same folder differ.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        values = weight.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- Where the files are ------------------------------------------------------------------------


def local_folder(model: str | Path) -> Path | None:
    """The folder `model` stands for, or None for a hub name.

    Raises FileNotFoundError for a path that is not there.
    """
    if str(model) == EMBEDDED_MODEL:
        return embedded_model_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    # A hub name is "name" or "owner/name"; anything else that is not there was meant as a path.
    if isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~")):
        raise FileNotFoundError(
            f"There is no model folder {path}. Pass an existing folder, a hub name such as "
            f"'google/gemma-2-2b', or {EMBEDDED_MODEL!r} for the model inside this package."
        )
    return None


def _require_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder. "
            "Save one with model.save_pretrained(folder)."
        )
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (looked for {', '.join(_TOKENIZER_FILES)}). "
            "Save the model's tokenizer beside it with tokenizer.save_pretrained(folder)."
        )


# --- Plain transformers -------------------------------------------------------------------------


def _load_plain(source: _Source, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(
        source.path,
        dtype=source.dtype,
        attn_implementation="eager",  # Gemma 2's softcapping exists only in the eager path
        local_files_only=source.folder is not None,
        **kwargs,
    )
    plain.to(torch.device(source.device))  # pyright: ignore[reportArgumentType]
    plain.tokenizer = _tokenizer(source)
    return plain


def _tokenizer(source: _Source) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.path, local_files_only=source.folder is not None)


# --- HookedTransformer --------------------------------------------------------------------------


def _load_hooked(source: _Source, **kwargs: Any) -> Any:
    from transformer_lens import HookedTransformer

    return _build_hooked(HookedTransformer, source, **kwargs)


def _load_hooked_sae(source: _Source, **kwargs: Any) -> Any:
    from sae_lens import HookedSAETransformer

    return _build_hooked(HookedSAETransformer, source, **kwargs)


def _build_hooked(hooked_class: Any, source: _Source, **kwargs: Any) -> Any:
    if source.folder is None:
        return hooked_class.from_pretrained_no_processing(
            source.name, device=source.device, dtype=source.dtype, **kwargs
        )
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    architecture = json.loads((source.folder / "config.json").read_text()).get("model_type")
    if architecture != "gemma2":
        raise ValueError(
            f"{hooked_class.__name__} can be built from a folder for Gemma 2 only, and "
            f"{source.folder} holds model_type {architecture!r}. Use "
            "model_class_name='TransformerBridge' or 'SAETransformerBridge', which take any causal "
            "language model."
        )
    plain = _load_plain(replace(source, device="cpu"))
    config = _hooked_gemma_2_config(plain.config, source, source.folder)
    hooked = hooked_class(config, tokenizer=plain.tokenizer)
    with torch.no_grad():
        weights = convert_gemma_weights(plain, config)
    hooked.load_and_process_state_dict(
        weights,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return hooked.to(source.device, print_details=False)


def _hooked_gemma_2_config(config: Any, source: _Source, folder: Path) -> Any:
    """TransformerLens's fields for google/gemma-2-2b, with the folder's sizes."""
    from transformer_lens import HookedTransformerConfig

    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return HookedTransformerConfig(
        model_name=_model_name(source),
        tokenizer_name=str(folder),
        original_architecture="Gemma2ForCausalLM",
        device=source.device,
        dtype=source.dtype,
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_activation,
        initializer_range=config.initializer_range,
        normalization_type="RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        positional_embedding_type="rotary",
        rotary_base=_rotary_base(config),
        rotary_dim=config.head_dim,
        use_attn_scale=True,
        attn_scale=float(config.query_pre_attn_scalar) ** 0.5,
        attn_scores_soft_cap=config.attn_logit_softcapping or -1.0,
        output_logits_soft_cap=config.final_logit_softcapping or -1.0,
        use_local_attn=True,
        window_size=config.sliding_window,
        attn_types=[kinds[kind] for kind in config.layer_types],
        gated_mlp=True,
        default_prepend_bos=True,
    )


def _rotary_base(config: Any) -> float:
    # transformers 5 moved rope_theta into rope_parameters.
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or config.rope_theta)


# --- TransformerBridge --------------------------------------------------------------------------


def _load_bridge(source: _Source, **kwargs: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return _boot_bridge(TransformerBridge, source, **kwargs)


def _load_sae_bridge(source: _Source, **kwargs: Any) -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    return _boot_bridge(SAETransformerBridge, source, **kwargs)


def _boot_bridge(bridge_class: Any, source: _Source, **kwargs: Any) -> Any:
    plain = _load_plain(source, **kwargs)
    # The tokenizer is passed because the bridge asks the hub for one otherwise.
    bridge = bridge_class.boot_transformers(
        str(source.path),
        hf_model=plain,
        tokenizer=plain.tokenizer,
        device=source.device,
        dtype=source.dtype,
    )
    bridge.enable_compatibility_mode(no_processing=True)
    if source.folder is not None:
        bridge.cfg.model_name = _model_name(source)
        bridge.cfg.tokenizer_name = str(source.folder)
    return bridge


def _model_name(source: _Source) -> str:
    if source.folder is None or source.name == EMBEDDED_MODEL:
        return source.name
    return source.folder.name


_LOADERS: dict[str, Callable[..., Any]] = {
    "HookedTransformer": _load_hooked,
    "HookedSAETransformer": _load_hooked_sae,
    "TransformerBridge": _load_bridge,
    "SAETransformerBridge": _load_sae_bridge,
    "AutoModelForCausalLM": _load_plain,
}
