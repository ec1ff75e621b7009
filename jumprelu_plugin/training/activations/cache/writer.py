"""Writes an activation cache: one pass of the model over the text, for any number of hooks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from jumprelu_plugin.evaluation.splicing import (
    evaluated_positions,
    evaluation_mode,
    special_token_ids_of,
)
from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.models.firing import hook_widths
from jumprelu_plugin.models.hooks import flat_heads, hook_point
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.records import provenance
from jumprelu_plugin.saes.tensor_files import read_safetensors
from jumprelu_plugin.step import spinning
from jumprelu_plugin.training.activations.cache.coding import (
    DTYPES,
    Standardization,
    encode_rows,
)
from jumprelu_plugin.training.activations.cache.manifest import MANIFEST_FILENAME, CacheManifest
from jumprelu_plugin.training.activations.cache.reader import STANDARDIZATION_FILENAME

# Kept free beside the cache.
_SPARE_BYTES = 64 * 2**20
_UNFINISHED = ".unfinished-"


def write_activation_cache(
    folder: str | Path,
    model: Any,
    hook_names: Sequence[str] | str,
    tokens: Int[Tensor, "sequences positions"],
    *,
    model_name: str,
    model_class_name: str = "HookedSAETransformer",
    dataset_path: str = "",
    prepend_bos: bool = True,
    dtype: str = "float32",
    exclude_special_tokens: bool = True,
    sequences_per_shard: int = 512,
    batch_size: int = 32,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> CacheManifest:
    """Write the activations of a text at several hooks, in shards of shuffled tokens.

    The sequences are shuffled over the whole text before they are put into shards, and tokens are
    shuffled inside a shard. A shard is whole or absent; called again after an interruption, the
    function writes only the missing ones. A cache that is complete is left as it is.

    Args:
        folder: to write; new, empty, or a cache of the same model, text and hooks, or more hooks.
        model: a hooked model.
        hook_names: names of the hooks, or one name; head axes are flattened.
        tokens: the text.
        model_name, model_class_name, dataset_path, prepend_bos: what model and text are called, for
            trainings that read the cache.
        dtype: float32, bfloat16 or int8 (a quarter of float32's bytes; see `coding.py`).
        exclude_special_tokens: leave out activations at BOS, EOS, PAD and the like.
        sequences_per_shard: sequences of a shard, which training reads into memory as a whole.
        batch_size: sequences in a forward pass.
        seed: of the order.
        log: called with the size before the model runs, and with what is left to do.

    Raises:
        ValueError: unknown dtype or hook; no token is left; the folder holds something else, or a
            cache of another model, text or hooks; activations that are not finite.
        OSError: the disk has too little room. Nothing is written then.
    """
    folder = Path(folder)
    manifest, kept = _plan(
        model,
        [hook_names] if isinstance(hook_names, str) else list(dict.fromkeys(hook_names)),
        tokens,
        model_name=model_name,
        model_class_name=model_class_name,
        dataset_path=dataset_path,
        prepend_bos=prepend_bos,
        dtype=dtype,
        exclude_special_tokens=exclude_special_tokens,
        sequences_per_shard=sequences_per_shard,
        seed=seed,
    )
    manifest = _of_folder(folder, manifest)
    missing = manifest.missing(folder)
    if not missing:
        log(f"{folder} holds these activations already")
        return manifest
    _announce(folder, manifest, missing, log)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_UNFINISHED}*"):  # of a process that was killed
        leftover.unlink()
    if not (folder / MANIFEST_FILENAME).exists():
        manifest.save(folder)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    with evaluation_mode(model):
        for number in tqdm(missing, desc="Caching activations", unit="shard"):
            chosen = order[number * sequences_per_shard : (number + 1) * sequences_per_shard]
            rows = _harvest(model, manifest.hooks, tokens[chosen], kept[chosen], batch_size)
            _write_shard(folder, manifest, number, rows)
    return manifest


def _plan(
    model: Any,
    hook_names: list[str],
    tokens: Tensor,
    *,
    dtype: str,
    exclude_special_tokens: bool,
    sequences_per_shard: int,
    seed: int,
    **names: Any,
) -> tuple[CacheManifest, Bool[Tensor, "sequences positions"]]:
    """The manifest of the cache to be, and which tokens it keeps."""
    if dtype not in DTYPES:
        raise ValueError(f"the cache's dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not hook_names:
        raise ValueError("an activation cache needs at least one hook")
    if sequences_per_shard < 1:
        raise ValueError(f"sequences_per_shard is {sequences_per_shard}; expected at least 1")
    for hook in hook_names:
        hook_point(model, hook)
    special = special_token_ids_of(model, None if exclude_special_tokens else ())
    kept = evaluated_positions(tokens, special)
    if not kept.any():
        raise ValueError(f"all {tokens.numel()} tokens are special, so there are no activations")
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    per_shard = kept.sum(1)[order].split(sequences_per_shard)
    manifest = CacheManifest(
        model_digest=model_digest(model),
        text_digest=digest(tokens.to(torch.int64)),
        n_sequences=len(tokens),
        context_size=tokens.shape[1],
        excluded_tokens=tuple(special),
        hooks={hook: hook_widths(model, [hook])[hook] for hook in hook_names},
        dtype=dtype,
        seed=seed,
        sequences_per_shard=sequences_per_shard,
        shard_rows=tuple(int(counts.sum()) for counts in per_shard),
        provenance=provenance(seed=seed),
        **names,
    )
    return manifest, kept


def _of_folder(folder: Path, wanted: CacheManifest) -> CacheManifest:
    """The manifest that is there, perhaps of more hooks than are wanted; else the wanted one."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder for the cache")
    if not folder.is_dir() or not any(folder.iterdir()):
        return wanted
    there = CacheManifest.load(folder)
    if there.hooks.items() >= wanted.hooks.items():
        wanted = replace(wanted, hooks=there.hooks)
    if different := there.differences(wanted):
        raise ValueError(
            f"{folder} holds other activations than asked for ({'; '.join(different)}): give "
            "another folder, or remove this one"
        )
    return there


def _announce(
    folder: Path, manifest: CacheManifest, missing: list[int], log: Callable[[str], None]
) -> None:
    """Say the size; raise OSError if there is too little room for it."""
    needed = sum(manifest.shard_bytes[number] for number in missing)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    log(
        f"{manifest.n_rows:,} tokens at {len(manifest.hooks)} hooks in {manifest.dtype} take "
        f"{_size(manifest.n_bytes)} in {len(manifest.shard_rows)} shards; "
        f"{len(missing)} shards ({_size(needed)}) are to be written, {_size(free)} are free"
    )
    if needed + _SPARE_BYTES > free:
        raise OSError(
            f"the activations take {_size(needed)} and {place} has {_size(free)} free: give "
            "another folder, fewer tokens or hooks, or dtype int8"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


@torch.no_grad()
def _harvest(
    model: Any, hooks: Iterable[str], tokens: Tensor, kept: Tensor, batch_size: int
) -> dict[str, Float[Tensor, "rows d"]]:
    names = list(hooks)
    stop = max((_stop_at(name) for name in names), key=lambda layer: layer or 10**9)
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for text, chosen in zip(tokens.split(batch_size), kept.split(batch_size), strict=True):
        spinning.adapt()
        text = text.long().to(next(model.parameters()).device)
        _, cache = model.run_with_cache(
            text, names_filter=names, stop_at_layer=stop, prepend_bos=False
        )
        for name in names:
            activation = flat_heads(cache[name])
            parts[name].append(activation[chosen.to(activation.device)].float().cpu())
    found = {name: torch.cat(part) for name, part in parts.items()}
    for name, rows in found.items():
        bad = int((~rows.isfinite()).any(1).sum())
        if bad:
            raise ValueError(
                f"the activations of {name} hold NaN or infinite values on {bad} of {len(rows)} "
                "tokens; run the model in float32 or bfloat16 (float16 overflows)"
            )
    return found


def _stop_at(hook: str) -> int | None:
    return extract_stop_at_layer_from_tlens_hook_name(hook)


def _write_shard(
    folder: Path, manifest: CacheManifest, number: int, rows: dict[str, Tensor]
) -> None:
    standard = _standardizations(folder, manifest, rows)
    count = manifest.shard_rows[number]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(manifest.seed + number))
    tensors: dict[str, Tensor] = {}
    for hook, values in rows.items():
        for part, stored in encode_rows(values[order], manifest.dtype, standard.get(hook)).items():
            tensors[f"{hook}/{part}"] = stored.contiguous()
        tensors[f"{hook}/sum"] = values.double().sum(0)
    _save_whole(folder, manifest.shard(folder, number).name, tensors)


def _standardizations(
    folder: Path, manifest: CacheManifest, rows: dict[str, Tensor]
) -> dict[str, Standardization]:
    """Those of the first shard that was written."""
    if manifest.dtype != "int8":
        return {}
    path = folder / STANDARDIZATION_FILENAME
    if not path.exists():
        found = {hook: Standardization.of(values) for hook, values in rows.items()}
        tensors = {f"{hook}/center": s.center for hook, s in found.items()}
        tensors |= {f"{hook}/spread": s.spread for hook, s in found.items()}
        _save_whole(folder, STANDARDIZATION_FILENAME, tensors)
    saved = read_safetensors(path)
    return {
        hook: Standardization(saved[f"{hook}/center"], saved[f"{hook}/spread"]) for hook in rows
    }


def _save_whole(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write a file that is whole or absent, also after a crash of the machine."""
    beside = folder / f"{_UNFINISHED}{name}"
    save_file(tensors, beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(folder / name)
