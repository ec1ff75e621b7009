"""Language models for training and evaluation: the embedded Gemma 2, a local folder, or a hub name.

Every route gives the same unprocessed model (no folded norms, no centred weights), in float32, in
evaluation mode. HookedTransformer takes its sizes from a table of names, which knows no small
Gemma 2, so that route builds the configuration from the folder's own config.json.

This file does not attach SAEs and does not choose hook points.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

EMBEDDED_MODEL = "tiny-gemma-2"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def embedded_model_folder() -> Path:
    """The folder of the Gemma 2 inside this package: weights, tokenizer, README.md card."""
    return Path(__file__).parent / "tiny_gemma_2"


def load_model(
    model: str | Path = EMBEDDED_MODEL,
    model_class_name: str = "HookedSAETransformer",
    device: str = "cpu",
) -> Any:
    """Load a causal language model with its tokenizer at `.tokenizer`, weights in float32.

    Args:
        model: `EMBEDDED_MODEL`, a local folder in Hugging Face layout (config.json, weights,
            tokenizer), or a hub name. Only a hub name uses the network.
        model_class_name: "HookedTransformer", "HookedSAETransformer" (from a folder: Gemma 2 only),
            "TransformerBridge", "SAETransformerBridge" (both in compatibility mode without weight
            processing, so that hooks have HookedTransformer's names), or "AutoModelForCausalLM"
            (plain transformers, eager attention).
        device: where the weights go.

    Raises:
        ValueError: for an unknown class, or a folder whose architecture the class cannot hold.
        FileNotFoundError: for a folder without config.json or tokenizer, or a path that is absent.
        OSError: for a hub name whose weights cannot be had, with what to do about a licence gate.
    """
    if model_class_name not in _LOADERS:
        raise ValueError(
            f"Unknown model class {model_class_name!r}: expected one of {sorted(_LOADERS)}."
        )
    folder = local_folder(model)
    if folder is not None:
        _require_files(folder)
    name = EMBEDDED_MODEL if str(model) == EMBEDDED_MODEL else str(model)
    if folder is not None:
        return _LOADERS[model_class_name](name, folder, device).eval()
    with hub_errors_explained(name):
        return _LOADERS[model_class_name](name, None, device).eval()


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
    folder = local_folder(model)
    if folder is not None:
        _require_files(folder)
    return _build_hooked(hooked_class, str(model), folder, device).eval()


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


def _load_plain(name: str, folder: Path | None, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(
        name if folder is None else folder,
        dtype=torch.float32,
        attn_implementation="eager",  # Gemma 2's softcapping exists only in the eager path
        local_files_only=folder is not None,
    )
    plain.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    plain.tokenizer = _tokenizer(name, folder)
    return plain


def _tokenizer(name: str, folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        name if folder is None else folder, local_files_only=folder is not None
    )


# --- HookedTransformer --------------------------------------------------------------------------


def _load_hooked(name: str, folder: Path | None, device: str) -> Any:
    from transformer_lens import HookedTransformer

    return _build_hooked(HookedTransformer, name, folder, device)


def _load_hooked_sae(name: str, folder: Path | None, device: str) -> Any:
    from sae_lens import HookedSAETransformer

    return _build_hooked(HookedSAETransformer, name, folder, device)


def _build_hooked(hooked_class: Any, name: str, folder: Path | None, device: str) -> Any:
    if folder is None:
        return hooked_class.from_pretrained_no_processing(name, device=device, dtype=torch.float32)
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    architecture = json.loads((folder / "config.json").read_text()).get("model_type")
    if architecture != "gemma2":
        raise ValueError(
            f"{hooked_class.__name__} can be built from a folder for Gemma 2 only, and {folder} "
            f"holds model_type {architecture!r}. Use model_class_name='TransformerBridge' or "
            "'SAETransformerBridge', which take any causal language model."
        )
    plain = _load_plain(name, folder, "cpu")
    config = _hooked_gemma_2_config(plain.config, name, folder, device)
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
    return hooked.to(device, print_details=False)


def _hooked_gemma_2_config(config: Any, name: str, folder: Path, device: str) -> Any:
    """TransformerLens's fields for google/gemma-2-2b, with the folder's sizes."""
    from transformer_lens import HookedTransformerConfig

    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return HookedTransformerConfig(
        model_name=name if name == EMBEDDED_MODEL else folder.name,
        tokenizer_name=str(folder),
        original_architecture="Gemma2ForCausalLM",
        device=device,
        dtype=torch.float32,
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


def _load_bridge(name: str, folder: Path | None, device: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return _boot_bridge(TransformerBridge, name, folder, device)


def _load_sae_bridge(name: str, folder: Path | None, device: str) -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    return _boot_bridge(SAETransformerBridge, name, folder, device)


def _boot_bridge(bridge_class: Any, name: str, folder: Path | None, device: str) -> Any:
    plain = _load_plain(name, folder, device)
    # The tokenizer is passed because the bridge asks the hub for one otherwise.
    bridge = bridge_class.boot_transformers(
        name if folder is None else str(folder),
        hf_model=plain,
        tokenizer=plain.tokenizer,
        device=device,
        dtype=torch.float32,
    )
    bridge.enable_compatibility_mode(no_processing=True)
    if folder is not None:
        bridge.cfg.model_name = name if name == EMBEDDED_MODEL else folder.name
        bridge.cfg.tokenizer_name = str(folder)
    return bridge


_LOADERS: dict[str, Callable[[str, Path | None, str], Any]] = {
    "HookedTransformer": _load_hooked,
    "HookedSAETransformer": _load_hooked_sae,
    "TransformerBridge": _load_bridge,
    "SAETransformerBridge": _load_sae_bridge,
    "AutoModelForCausalLM": _load_plain,
}
