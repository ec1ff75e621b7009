"""The formats in which a dictionary can be written, and `export`, which writes any of them."""

from __future__ import annotations

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
    lm_eval,
    neuronpedia,
    nnsight,
    saelens,
)
from jumprelu_plugin.formats.checking import Check, Loader, is_export, write_record
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.explanations import read_explanations
from jumprelu_plugin.formats.processing import refuse_processing, warn_of_other_weights
from jumprelu_plugin.formats.reading import NoDictionaryError, layer_folders, load_dictionary
from jumprelu_plugin.models.language_models import local_folder
from jumprelu_plugin.records import read_json, whole_folder
from jumprelu_plugin.transcoders.clt import CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt import folder as clt_folder

# The options of `load_dictionary`, which most targets take.
_LOAD_OPTIONS = ("fold_scale", "hook_name", "hook_name_out", "model_name")
# The only target whose files can say that one head is read, or how the model is processed.
_NAMES_ALL = "saelens"


@dataclass(frozen=True)
class Target:
    """A format to export to.

    Attributes:
        name: its name in `export` and on the command line.
        accepts: the dictionaries it can hold, for `target_table`.
        files: the files it consists of, for `target_table`.
        loader: the loader that reads it back.
        options: the options of `export` that it takes.
        read: takes the source folder and the options; returns the dictionary, or all layers', and
            the keyword arguments of `write`.
        write: takes the dictionary, the folder and these keyword arguments.
        check: takes the dictionary, the folder and, for a steering vector, the amounts.
        own_keywords: those of `model_from_pretrained_kwargs` that its tool sets by itself.
    """

    name: str
    accepts: str
    files: str
    loader: Loader
    options: tuple[str, ...]
    read: Callable[..., tuple[Any, dict[str, Any]]]
    write: Callable[..., None]
    check: Callable[..., Check]
    own_keywords: tuple[str, ...] = ()


def export(
    source: str | Path, to: str, output: str | Path, *, unchecked: bool = False, **options: Any
) -> Check | None:
    """Write the dictionary in `source` to the folder `output` in the format `to`.

    The export is read back with the target's own loader and compared before `output` appears.

    Args:
        source: the dictionary's folder, or for circuit-tracer the folder of all layers' folders or
            of a cross-layer transcoder.
        to: a name in `TARGETS`.
        output: a new folder, or one that holds an earlier export, which is replaced.
        unchecked: write without the comparison, for targets whose tool is not installed.
        options: those in the target's entry of `TARGETS`.

    Returns:
        The comparison, or None if `unchecked`.

    Raises:
        ValueError: the target or an option is unknown, the target cannot hold the dictionary, or
            the comparison fails.
        ImportError: the target's tool is not installed.
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
    dictionary, write_options = target.read(Path(source), **options)
    _refuse_one_head(dictionary, target)
    if target.name != _NAMES_ALL:
        refuse_processing(dictionary, target.name, target.own_keywords)
        warn_of_other_weights(dictionary, target.name)
    with whole_folder(output, replaces=is_export, kind="export") as folder:
        target.write(dictionary, folder, **write_options)
        check = None
        if not unchecked:
            check_options = {k: v for k, v in write_options.items() if k == "amounts"}
            check = target.check(dictionary, folder, **check_options)
        write_record(folder, to, check, source=str(source), options=dict(options))
    return check


def _refuse_one_head(dictionary: Any, target: Target) -> None:
    if (
        isinstance(dictionary, Dictionary)
        and dictionary.head is not None
        and target.name != _NAMES_ALL
    ):
        raise ValueError(
            f"the dictionary reads head {dictionary.head} of {dictionary.hook_name} alone, and "
            f"only --to {_NAMES_ALL} can say so: another tool would give it all heads"
        )


def target_table() -> Table:
    """All targets, what they accept and write, and the loaders, as a table for the terminal."""
    table = Table(
        title="jumprelu export FOLDER --to TARGET --output_path FOLDER", title_justify="left"
    )
    table.add_column("target", no_wrap=True)
    for column in ("accepts", "writes", "read back with"):
        table.add_column(column, overflow="fold")
    for target in TARGETS.values():
        installed = str(target.loader) if target.loader.installed else "not installed"
        table.add_row(target.name, target.accepts, target.files, installed)
    return table


def pair_amounts(latents: Sequence[int] | None, values: Sequence[float] | None) -> dict[int, float]:
    """The amount for each latent, from two sequences in the same order.

    Raises:
        ValueError: the sequences have different lengths, or a latent is named twice.
    """
    latents, values = latents or [], values or []
    if len(latents) != len(values):
        raise ValueError(
            f"{len(latents)} latents and {len(values)} amounts were given: give --latents and "
            "--amounts lists of the same length"
        )
    twice = sorted({latent for latent in latents if latents.count(latent) > 1})
    if twice:
        raise ValueError(
            f"--latents names {', '.join(map(str, twice))} more than once: give each latent once, "
            "with the sum of its amounts"
        )
    return dict(zip(latents, values, strict=True))


def _flag(option: str) -> str:
    return f"--{option}"


# ---------------------------------------------------------------- reading the source


def _read_dictionary(source: Path, **options: Any) -> tuple[Dictionary, dict[str, Any]]:
    return _load_one(source, **options), {}


def _read_with_gain(
    source: Path, *, fold_gain: bool = False, **options: Any
) -> tuple[Dictionary, dict[str, Any]]:
    dictionary = _load_one(source, **options)
    return gemma_scope_2.fold_gain(dictionary) if fold_gain else dictionary, {}


def _read_with_amounts(
    source: Path, *, amounts: Mapping[int, float] | None = None, **options: Any
) -> tuple[Dictionary, dict[str, Any]]:
    if not amounts:
        raise ValueError(
            "a steering vector is a sum of decoder rows: name the latents with --latents and "
            "--amounts, for example --latents 7 --amounts 20"
        )
    return _load_one(source, **options), {"amounts": dict(amounts)}


def _read_with_explanations(
    source: Path, *, explanations: str | Path | None = None, **options: Any
) -> tuple[Dictionary, dict[str, Any]]:
    found = None if explanations is None else read_explanations(explanations, source)
    return _load_one(source, **options), {"explanations": found}


def _load_one(source: Path, **options: Any) -> Dictionary:
    """`load_dictionary`; where there are several layers, its refusal names the target for them."""
    try:
        return load_dictionary(source, **options)
    except NoDictionaryError as error:
        if not layer_folders(source) and not clt_folder.is_here(source):
            raise
        raise ValueError(f"{error}. For all layers at once use --to circuit-tracer") from error


def _read_layers(
    source: Path,
    *,
    model_name: str | None = None,
    n_layers: int | None = None,
    pad_missing: bool = False,
    scan: str | None = None,
    fold_scale: bool = False,
) -> tuple[dict[int, Dictionary] | CrossLayerTranscoder, dict[str, Any]]:
    if clt_folder.is_here(source):
        if pad_missing or fold_scale:
            raise ValueError(
                f"{source} holds a cross-layer transcoder, which has all its layers and no scale "
                "to fold; leave out --pad_missing and --fold_scale"
            )
        return _read_clt(source, model_name, n_layers, scan)
    layers = circuit_tracer.read_layers(source, fold_scale=fold_scale)
    if model_name is None:
        circuit_tracer.require_one_model(layers)
    model_name = model_name or next(iter(layers.values())).model_name
    if not model_name:
        raise ValueError(f"the transcoders in {source} do not name their model; give --model_name")
    count = n_layers or _count_layers(model_name)
    complete = circuit_tracer.complete_layers(layers, count, pad_missing=pad_missing)
    return complete, {"model_name": model_name, "scan": scan or source.resolve().name}


def _read_clt(
    source: Path, model_name: str | None, n_layers: int | None, scan: str | None
) -> tuple[CrossLayerTranscoder, dict[str, Any]]:
    model_name = model_name or clt_folder.read_config(source).model_name
    if not model_name:
        raise ValueError(f"the transcoder in {source} does not name its model; give --model_name")
    clt = circuit_tracer_clt.read_clt(source, n_layers or _count_layers(model_name))
    return clt, {"model_name": model_name, "scan": scan or source.resolve().name}


def _count_layers(model_name: str) -> int:
    folder = local_folder(model_name)
    if folder is None:
        raise ValueError(
            f"the number of layers of {model_name!r} is not known, so a missing last layer could "
            "not be noticed: give --n_layers (26 for gemma-2-2b)"
        )
    path = folder / "config.json"
    layers = read_json(path).get("num_hidden_layers")
    if type(layers) is not int:
        raise ValueError(f"{path} has num_hidden_layers {layers!r}: give --n_layers")
    return layers


# ---------------------------------------------------------------- sets and cross-layer transcoders


def _write_circuit_tracer(dictionary: Any, folder: Path, **options: Any) -> None:
    if isinstance(dictionary, CrossLayerTranscoder):
        circuit_tracer_clt.write(dictionary, folder, **options)
    else:
        circuit_tracer.write(dictionary, folder, **options)


def _check_circuit_tracer(dictionary: Any, folder: Path) -> Check:
    if isinstance(dictionary, CrossLayerTranscoder):
        return circuit_tracer_clt.check(dictionary, folder)
    return circuit_tracer.check(dictionary, folder)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="saelens",
            accepts="SAEs and transcoders",
            files="cfg.json, sae_weights.safetensors",
            loader=saelens.LOADER,
            options=_LOAD_OPTIONS,
            read=_read_dictionary,
            write=saelens.write,
            check=saelens.check,
        ),
        Target(
            name="gemma-scope",
            accepts="SAEs of hook_resid_post, hook_mlp_out, attn.hook_z; transcoders "
            "ln2.hook_normalized -> hook_mlp_out without skip",
            files=gemma_scope.FILENAME,
            loader=gemma_scope.LOADER,
            options=_LOAD_OPTIONS,
            read=_read_dictionary,
            write=gemma_scope.write,
            check=gemma_scope.check,
        ),
        Target(
            name="gemma-scope-2",
            accepts="the same SAEs; transcoders, with skip too, of hook_resid_mid or mlp.hook_in",
            files=f"{gemma_scope_2.FILENAME}, {gemma_scope_2.CONFIG}",
            loader=gemma_scope_2.LOADER,
            options=(*_LOAD_OPTIONS, "fold_gain"),
            read=_read_with_gain,
            write=gemma_scope_2.write,
            check=gemma_scope_2.check,
        ),
        Target(
            name="circuit-tracer",
            accepts="a folder layer_0, layer_1, ... of transcoders of one width, all layers of the "
            "model, with skip or without; a cross-layer transcoder of all layers",
            files=f"{circuit_tracer.CONFIG}, layer_*.safetensors or W_enc_*, W_dec_*.safetensors",
            loader=circuit_tracer.LOADER,
            options=("fold_scale", "model_name", "n_layers", "pad_missing", "scan"),
            read=_read_layers,
            write=_write_circuit_tracer,
            check=_check_circuit_tracer,
        ),
        Target(
            name="dictionary-learning",
            accepts="SAEs of hook_resid_post, hook_mlp_out, hook_attn_out",
            files=f"{dictionary_learning.FILENAME}, {dictionary_learning.CONFIG}",
            loader=dictionary_learning.LOADER,
            options=_LOAD_OPTIONS,
            read=_read_dictionary,
            write=dictionary_learning.write,
            check=dictionary_learning.check,
        ),
        Target(
            name="lm-eval",
            accepts="latents of SAEs and transcoders that write hook_resid_post, hook_mlp_out or "
            "hook_attn_out",
            files=lm_eval.FILENAME,
            loader=lm_eval.LOADER,
            options=(*_LOAD_OPTIONS, "amounts"),
            read=_read_with_amounts,
            write=lm_eval.write,
            check=lm_eval.check,
        ),
        Target(
            name="nnsight",
            accepts="the same",
            files=f"{nnsight.VECTOR_FILENAME}, {nnsight.SETTINGS_FILENAME}",
            loader=nnsight.LOADER,
            options=(*_LOAD_OPTIONS, "amounts"),
            read=_read_with_amounts,
            write=nnsight.write,
            check=nnsight.check,
        ),
        Target(
            name="neuronpedia",
            accepts="SAEs, and transcoders without skip",
            files="cfg.json, sae_weights.safetensors, "
            f"{neuronpedia.SETTINGS}, {neuronpedia.EXPLANATIONS}",
            loader=neuronpedia.LOADER,
            options=(*_LOAD_OPTIONS, "explanations"),
            read=_read_with_explanations,
            write=neuronpedia.write,
            check=neuronpedia.check,
            own_keywords=neuronpedia.OWN_KEYWORDS,
        ),
    )
}
