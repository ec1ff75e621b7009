"""The formats a dictionary can be written in, and the one function that writes any of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from jumprelu_plugin.formats import (
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    neuronpedia,
    saelens,
    steering_vector,
)
from jumprelu_plugin.formats.checking import Check, Loader, is_export, record
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.reading import load_dictionary
from jumprelu_plugin.models.language_models import local_folder
from jumprelu_plugin.records import whole_folder
from jumprelu_plugin.transcoders.clt import CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt import folder as cross_layer_folder

_READING = ("fold_scale", "hook_name", "hook_name_out", "model_name")


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        takes: which dictionaries.
        writes: which files.
        loader: what reads them back.
        options: of `export`, those that this target takes.
        prepare: the source folder and options, to what `write` and `check` take as positional
            arguments around the folder, and what `write` takes by name besides.
    """

    name: str
    takes: str
    writes: str
    loader: Loader
    options: tuple[str, ...]
    prepare: Callable[..., tuple[Any, dict[str, Any]]]
    write: Callable[..., None]
    check: Callable[..., Check]


def export(
    source: str | Path, to: str, output: str | Path, *, unchecked: bool = False, **options: Any
) -> Check | None:
    """Write the dictionary in `source` to the folder `output` in the format `to`.

    It is read back with the target's own loader and compared before `output` appears.

    Args:
        unchecked: write without that comparison, where the target is not installed.
        options: as the target's entry in `TARGETS` lists them.

    Returns:
        The comparison, or None for `unchecked`.

    Raises:
        ValueError: unknown target or option, a dictionary the target cannot take, or outputs that
            differ.
        ImportError: the target's loader is not installed.
    """
    if to not in TARGETS:
        raise ValueError(f"unknown target {to!r}: expected one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    unknown = [name for name in options if name not in target.options]
    if unknown:
        raise ValueError(
            f"{', '.join(map(_flag, unknown))}: not an option of --to {to}, which takes "
            f"{', '.join(map(_flag, target.options))}"
        )
    if not unchecked:
        target.loader.require()
    subject, named = target.prepare(Path(source), **options)
    with whole_folder(output, replaces=is_export, kind="export") as folder:
        target.write(subject, folder, **named)
        check = None
        if not unchecked:
            checking = {key: value for key, value in named.items() if key == "amounts"}
            check = target.check(subject, folder, **checking)
        record(folder, to, check, source=str(source), options=dict(options))
    return check


def table() -> Table:
    """What each target takes and writes, for printing."""
    shown = Table(
        title="jumprelu export FOLDER --to TARGET --output_path FOLDER", title_justify="left"
    )
    shown.add_column("target", no_wrap=True)
    for column in ("takes", "writes", "read back with"):
        shown.add_column(column, overflow="fold")
    for target in TARGETS.values():
        installed = str(target.loader) if target.loader.installed else "not installed"
        shown.add_row(target.name, target.takes, target.writes, installed)
    return shown


def amounts(latents: Sequence[int] | None, values: Sequence[float] | None) -> dict[int, float]:
    """Latents and their amounts, paired in order.

    Raises ValueError when there are not as many of the one as of the other.
    """
    latents, values = latents or [], values or []
    if len(latents) != len(values):
        raise ValueError(
            f"{len(latents)} latents and {len(values)} amounts were given: give --latents and "
            "--amounts lists of one length"
        )
    return dict(zip(latents, values, strict=True))


def _flag(option: str) -> str:
    return f"--{option}"


# ---------------------------------------------------------------- what each target is given


def _one(source: Path, **options: Any) -> tuple[Dictionary, dict[str, Any]]:
    return load_dictionary(source, **options), {}


def _one_with_gain(
    source: Path, *, fold_gain: bool = False, **options: Any
) -> tuple[Dictionary, dict[str, Any]]:
    dictionary = load_dictionary(source, **options)
    return gemma_scope_2.fold_gain(dictionary) if fold_gain else dictionary, {}


def _latents(
    source: Path, *, amounts: Mapping[int, float] | None = None, **options: Any
) -> tuple[Dictionary, dict[str, Any]]:
    if not amounts:
        raise ValueError(
            "a steering vector is a sum of latents' decoder rows: give them with --latents "
            "and --amounts, for example --latents 7 --amounts 20"
        )
    return load_dictionary(source, **options), {"amounts": dict(amounts)}


def _layers(
    source: Path,
    *,
    model_name: str | None = None,
    n_layers: int | None = None,
    pad_missing: bool = False,
    scan: str | None = None,
    fold_scale: bool = False,
) -> tuple[dict[int, Dictionary] | CrossLayerTranscoder, dict[str, Any]]:
    if cross_layer_folder.is_here(source):
        if pad_missing or fold_scale:
            raise ValueError(
                f"{source} holds a cross-layer transcoder: it has all its layers and no scale "
                "left to fold; leave --pad_missing and --fold_scale out"
            )
        return _cross_layer(source, model_name, n_layers, scan)
    layers = circuit_tracer.read_layers(source, fold_scale=fold_scale)
    model_name = model_name or next(iter(layers.values())).model_name
    if not model_name:
        raise ValueError(f"the transcoders in {source} do not say their model; give --model_name")
    count = n_layers or _layers_of(model_name)
    complete = circuit_tracer.complete(layers, count, pad_missing=pad_missing)
    return complete, {"model_name": model_name, "scan": scan or source.resolve().name}


def _cross_layer(
    source: Path, model_name: str | None, n_layers: int | None, scan: str | None
) -> tuple[CrossLayerTranscoder, dict[str, Any]]:
    model_name = model_name or cross_layer_folder.read_config(source).model_name
    if not model_name:
        raise ValueError(f"the transcoder in {source} does not say its model; give --model_name")
    found = circuit_tracer_clt.read(source, n_layers or _layers_of(model_name))
    return found, {"model_name": model_name, "scan": scan or source.resolve().name}


def _write_circuit_tracer(subject: Any, folder: Path, **named: Any) -> None:
    if isinstance(subject, CrossLayerTranscoder):
        circuit_tracer_clt.write(subject, folder, **named)
    else:
        circuit_tracer.write(subject, folder, **named)


def _check_circuit_tracer(subject: Any, folder: Path) -> Check:
    if isinstance(subject, CrossLayerTranscoder):
        return circuit_tracer_clt.check(subject, folder)
    return circuit_tracer.check(subject, folder)


def _layers_of(model_name: str) -> int:
    folder = local_folder(model_name)
    if folder is None:
        raise ValueError(
            f"how many layers {model_name!r} has is not known here, and without that a missing "
            "last layer would go unseen: give --n_layers (26 for gemma-2-2b)"
        )
    return json.loads((folder / "config.json").read_text())["num_hidden_layers"]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "saelens",
            "SAEs and transcoders",
            "cfg.json, sae_weights.safetensors",
            saelens.LOADER,
            _READING,
            _one,
            saelens.write,
            saelens.check,
        ),
        Target(
            "gemma-scope",
            "SAEs of hook_resid_post, hook_mlp_out, attn.hook_z; transcoders "
            "ln2.hook_normalized -> hook_mlp_out without skip",
            gemma_scope.FILENAME,
            gemma_scope.LOADER,
            _READING,
            _one,
            gemma_scope.write,
            gemma_scope.check,
        ),
        Target(
            "gemma-scope-2",
            "the same SAEs; transcoders, with skip too, of hook_resid_mid or mlp.hook_in",
            f"{gemma_scope_2.FILENAME}, {gemma_scope_2.CONFIG}",
            gemma_scope_2.LOADER,
            (*_READING, "fold_gain"),
            _one_with_gain,
            gemma_scope_2.write,
            gemma_scope_2.check,
        ),
        Target(
            "circuit-tracer",
            "a folder layer_0, layer_1, ... of transcoders of one width, all layers of the "
            "model, with skip or without; a cross-layer transcoder of all layers",
            f"{circuit_tracer.CONFIG}, layer_*.safetensors or W_enc_*, W_dec_*.safetensors",
            circuit_tracer.LOADER,
            ("fold_scale", "model_name", "n_layers", "pad_missing", "scan"),
            _layers,
            _write_circuit_tracer,
            _check_circuit_tracer,
        ),
        Target(
            "dictionary-learning",
            "SAEs of hook_resid_post, hook_mlp_out, hook_attn_out",
            f"{dictionary_learning.FILENAME}, {dictionary_learning.CONFIG}",
            dictionary_learning.LOADER,
            _READING,
            _one,
            dictionary_learning.write,
            dictionary_learning.check,
        ),
        Target(
            "lm-eval",
            "latents of SAEs and transcoders that write hook_resid_post, hook_mlp_out or "
            "hook_attn_out",
            steering_vector.LM_EVAL_FILENAME,
            steering_vector.LM_EVAL,
            (*_READING, "amounts"),
            _latents,
            steering_vector.write_lm_eval,
            steering_vector.check_lm_eval,
        ),
        Target(
            "nnsight",
            "the same",
            ", ".join(steering_vector.NNSIGHT_FILENAMES),
            steering_vector.NNSIGHT,
            (*_READING, "amounts"),
            _latents,
            steering_vector.write_nnsight,
            steering_vector.check_nnsight,
        ),
        Target(
            "neuronpedia",
            "SAEs, and transcoders without skip",
            f"cfg.json, sae_weights.safetensors, {neuronpedia.SETTINGS}",
            neuronpedia.LOADER,
            _READING,
            _one,
            neuronpedia.write,
            neuronpedia.check,
        ),
    )
}
