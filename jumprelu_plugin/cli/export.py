"""`jumprelu export`: a dictionary in another tool's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console
from jumprelu_plugin.models.number_lists import numbers, whole_numbers

app = typer.Typer()


@app.command()
def export(
    folder: Annotated[
        Path | None,
        typer.Argument(help="a saved dictionary; for circuit-tracer a folder of layer_0, …"),
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="target; see --list.")] = None,
    output_path: Annotated[
        Path | None, typer.Option("--output_path", help="folder to write.")
    ] = None,
    list_targets: Annotated[bool, typer.Option("--list", help="what each target takes.")] = False,
    unchecked: Annotated[
        bool,
        typer.Option("--unchecked", help="do not read it back (the target is not installed)."),
    ] = False,
    latents: Annotated[
        str | None,
        typer.Option("--latents", help="for a steering vector: which latents.", metavar="7,11"),
    ] = None,
    amounts: Annotated[
        str | None,
        typer.Option("--amounts", help="for a steering vector: how much.", metavar="20,-5"),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model_name", help="the model, where it is not recorded.")
    ] = None,
    hook_name: Annotated[
        str | None, typer.Option("--hook_name", help="the hook it reads, where not recorded.")
    ] = None,
    hook_name_out: Annotated[
        str | None, typer.Option("--hook_name_out", help="the hook that a transcoder writes.")
    ] = None,
    fold_scale: Annotated[
        bool, typer.Option("--fold_scale", help="fold a checkpoint's input scale.")
    ] = False,
    fold_gain: Annotated[
        bool, typer.Option("--fold_gain", help="fold the norm's gain, for gemma-scope-2.")
    ] = False,
    n_layers: Annotated[
        int | None, typer.Option("--n_layers", help="the model's number of layers.")
    ] = None,
    pad_missing: Annotated[
        bool, typer.Option("--pad_missing", help="dead transcoders for missing layers.")
    ] = False,
    scan: Annotated[
        str | None, typer.Option("--scan", help="name of the set, for circuit-tracer.")
    ] = None,
    explanations: Annotated[
        Path | None,
        typer.Option(
            "--explanations", help="explanations.json of `study explain`, for neuronpedia."
        ),
    ] = None,
) -> None:
    """Write a dictionary in another tool's format, read it back with that tool and compare."""
    from jumprelu_plugin import formats

    if list_targets:
        console.print(formats.target_table())
        return
    if folder is None or to is None or output_path is None:
        raise ValueError("give FOLDER, --to TARGET and --output_path FOLDER, or --list")
    given = {
        "amounts": formats.pair_amounts(
            None if latents is None else whole_numbers("--latents", latents),
            None if amounts is None else numbers("--amounts", amounts),
        ),
        "model_name": model_name,
        "hook_name": hook_name,
        "hook_name_out": hook_name_out,
        "fold_scale": fold_scale,
        "fold_gain": fold_gain,
        "n_layers": n_layers,
        "pad_missing": pad_missing,
        "scan": scan,
        "explanations": explanations,
    }
    check = formats.export(
        folder, to, output_path, unchecked=unchecked, **{k: v for k, v in given.items() if v}
    )
    console.print(f"written: {output_path} ({check or 'not read back'})", highlight=False)
