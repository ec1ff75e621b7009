"""Loads language models: the embedded Gemma 2, a local folder, or a Hugging Face hub name.

By default, all sources and classes give an unprocessed model (no folded norms, no centered weights)
in evaluation mode and in float32; `loading_keywords.py` has what can be asked for.
HookedTransformer reads a model's sizes from a table of names that holds no small Gemma 2, so for a
local folder they are read from its config.json (`hooked_gemma_2.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from sae_lens.util import str_to_dtype
from torch import nn

from jumprelu_plugin.models.hooked_gemma_2 import build_hooked_gemma_2
from jumprelu_plugin.models.loading_keywords import LoadingKeywords
from jumprelu_plugin.records import read_json

EMBEDDED_MODEL = "tiny-gemma-2"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class _Source:
    """The model to load: its name, its folder (None for a hub name), and how it is loaded."""

    name: str
    folder: Path | None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    keywords: LoadingKeywords = field(default_factory=LoadingKeywords)

    @property
    def path(self) -> str | Path:
        """The folder or hub name, as transformers' loaders take it."""
        return self.name if self.folder is None else self.folder


def embedded_model_folder() -> Path:
    """The folder of this package's Gemma 2: weights, tokenizer, and README.md as model card."""
    return Path(__file__).parent / "tiny_gemma_2"


def load_model(
    model: str | Path = EMBEDDED_MODEL,
    model_class_name: str = "HookedSAETransformer",
    device: str = "cpu",
    dtype: str | None = None,
    **from_pretrained_kwargs: Any,
) -> Any:
    """Load a causal language model, with its tokenizer as `.tokenizer`.

    Args:
        model: `EMBEDDED_MODEL`, a local folder in Hugging Face layout (config.json, weights,
            tokenizer), or a hub name. Only a hub name uses the network.
        model_class_name: "HookedTransformer", "HookedSAETransformer" (from a folder: Gemma 2 only),
            "TransformerBridge", "SAETransformerBridge" (both in compatibility mode, so that hooks
            have HookedTransformer's names), or "AutoModelForCausalLM" (plain transformers, eager
            attention; `load_hooked_model` gives it hooks).
        device: where the weights are stored.
        dtype: of the weights, such as "float32" (the default) or "bfloat16".
        from_pretrained_kwargs: what SAELens calls model_from_pretrained_kwargs: TransformerLens'
            processing of weights (`fold_ln`, `center_writing_weights`, ...), flags of hooks
            (`use_hook_mlp_in`, ...), and arguments of the class's own loader.

    Raises:
        ValueError: the class, the dtype or a keyword argument is unknown, or the class cannot
            represent the folder's architecture.
        FileNotFoundError: the folder does not exist, or has no config.json or no tokenizer.
        OSError: the hub's weights cannot be loaded; the message explains gated licenses.
    """
    if model_class_name not in _LOADERS:
        raise ValueError(
            f"Unknown model class {model_class_name!r}: expected one of {sorted(_LOADERS)}."
        )
    folder = local_folder(model)
    if folder is not None:
        _require_files(folder)
    with nullcontext() if folder is not None else hub_errors_explained(str(model)):
        keywords = LoadingKeywords.sorted(
            from_pretrained_kwargs, model_class_name, str(model), folder
        )
        chosen = str_to_dtype(dtype or keywords.dtype or "float32")
        source = _Source(str(model), folder, device, chosen, keywords)
        loaded = _LOADERS[model_class_name](source).eval()
    keywords.set_hook_flags(loaded)
    return loaded


@contextmanager
def hub_errors_explained(name: str) -> Iterator[None]:
    """Replace the libraries' errors about the hub model `name` by errors that say what to do.

    Raises:
        ValueError: TransformerLens does not know the name.
        OSError: the weights cannot be loaded.
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
            f"The model {name!r} could not be loaded from the hub: {str(error).splitlines()[0]}\n"
            "Gemma's weights are gated: accept the license on the model's page and log in with "
            "`hf auth login`. Without a network, give the folder of a model, or "
            f"{EMBEDDED_MODEL!r} for the model inside this package."
        ) from error


def build_hooked(hooked_class: Any, model: str | Path, device: str = "cpu") -> Any:
    """Load `model` as an unprocessed instance of `hooked_class`, a subclass of HookedTransformer.

    Raises the errors of `load_model`.
    """
    source = _Source(str(model), local_folder(model), device)
    if source.folder is not None:
        _require_files(source.folder)
    return _build_hooked(hooked_class, source).eval()


def model_digest(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of the weights' names, types, shapes and bytes.

    The digest depends on the names and layout of the weights, so a HookedTransformer and a plain
    transformers model of the same folder have different digests.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        values = weight.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- Files --------------------------------------------------------------------------------------


def local_folder(model: str | Path) -> Path | None:
    """The local folder that `model` names, or None for a hub name.

    Raises:
        FileNotFoundError: `model` is a path that does not exist.
    """
    if str(model) == EMBEDDED_MODEL:
        return embedded_model_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    # A hub name is "name" or "owner/name"; everything else is meant as a path.
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


def _load_plain(source: _Source) -> Any:
    from transformers import AutoModelForCausalLM

    # Gemma 2's softcapping needs eager attention.
    options = {"attn_implementation": "eager", **source.keywords.loader}
    options.setdefault("local_files_only", source.folder is not None)
    plain = AutoModelForCausalLM.from_pretrained(source.path, dtype=source.dtype, **options)
    if options.get("device_map") is None:
        plain.to(torch.device(source.device))  # pyright: ignore[reportArgumentType]
    plain.tokenizer = _tokenizer(source)
    return plain


def _tokenizer(source: _Source) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.path, local_files_only=source.folder is not None)


# --- HookedTransformer --------------------------------------------------------------------------


def _load_hooked(source: _Source) -> Any:
    from transformer_lens import HookedTransformer

    return _build_hooked(HookedTransformer, source)


def _load_hooked_sae(source: _Source) -> Any:
    from sae_lens import HookedSAETransformer

    return _build_hooked(HookedSAETransformer, source)


def _build_hooked(hooked_class: Any, source: _Source) -> Any:
    keywords = source.keywords
    if source.folder is None:
        several = keywords.loader.get("n_devices", 1) > 1  # TransformerLens spreads it over them
        return hooked_class.from_pretrained_no_processing(
            source.name,
            device="cuda" if several else source.device,
            dtype=source.dtype,
            **keywords.processing,
            **keywords.loader,
        )
    architecture = read_json(source.folder / "config.json").get("model_type")
    if architecture != "gemma2":
        raise ValueError(
            f"{hooked_class.__name__} can be built from a folder for Gemma 2 only, and "
            f"{source.folder} holds model_type {architecture!r}. Use "
            "model_class_name='TransformerBridge' or 'SAETransformerBridge', which take any causal "
            "language model."
        )
    plain = _load_plain(replace(source, device="cpu"))
    return build_hooked_gemma_2(
        hooked_class, plain, _model_name(source), source.folder, source.device, keywords
    )


# --- TransformerBridge --------------------------------------------------------------------------


def _load_bridge(source: _Source) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return _boot_bridge(TransformerBridge, source)


def _load_sae_bridge(source: _Source) -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    return _boot_bridge(SAETransformerBridge, source)


def _boot_bridge(bridge_class: Any, source: _Source) -> Any:
    plain = _load_plain(source)
    # Without a tokenizer, the bridge would request one from the hub.
    bridge = bridge_class.boot_transformers(
        str(source.path),
        hf_model=plain,
        tokenizer=plain.tokenizer,
        device=source.device,
        dtype=source.dtype,
    )
    processing = source.keywords.processing
    bridge.enable_compatibility_mode(no_processing=not any(processing.values()), **processing)
    for name, value in source.keywords.config.items():
        setattr(bridge.cfg, name, value)
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
