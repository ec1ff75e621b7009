"""`jumprelu export`: a dictionary in another tool's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console

app = typer.Typer()


@app.command()
def export(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A saved dictionary; for circuit-tracer a folder of layer_0, ..."),
    ] = None,
    to: Annotated[str | None, typer.Option(help="Target; see --list.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    list_targets: Annotated[bool, typer.Option("--list", help="What each target takes.")] = False,
    unchecked: Annotated[
        bool, typer.Option(help="Do not read back with the target's loader (not installed).")
    ] = False,
    latent: Annotated[list[int] | None, typer.Option(help="Steering: which latent(s).")] = None,
    amount: Annotated[list[float] | None, typer.Option(help="Steering: how much of each.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Model, where not recorded.")] = None,
    hook_name: Annotated[str | None, typer.Option(help="Hook it reads, if not recorded.")] = None,
    hook_name_out: Annotated[str | None, typer.Option(help="Hook a transcoder writes.")] = None,
    fold_scale: Annotated[bool, typer.Option(help="Fold a checkpoint's input scale.")] = False,
    fold_gain: Annotated[bool, typer.Option(help="Fold the norm's gain (gemma-scope-2).")] = False,
    n_layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    pad_missing: Annotated[bool, typer.Option(help="Dead transcoders for missing layers.")] = False,
    scan: Annotated[str | None, typer.Option(help="Name of the set, for circuit-tracer.")] = None,
) -> None:
    """Write a dictionary in another tool's format, read it back with that tool and compare."""
    from jumprelu_plugin import formats as exports

    if list_targets:
        console.print(exports.table())
        return
    if folder is None or to is None or output is None:
        raise ValueError("give FOLDER, --to TARGET and --output FOLDER, or --list")
    given = {
        "amounts": exports.amounts(latent, amount),
        "model_name": model_name,
        "hook_name": hook_name,
        "hook_name_out": hook_name_out,
        "fold_scale": fold_scale,
        "fold_gain": fold_gain,
        "n_layers": n_layers,
        "pad_missing": pad_missing,
        "scan": scan,
    }
    check = exports.export(
        folder, to, output, unchecked=unchecked, **{k: v for k, v in given.items() if v}
    )
    console.print(f"written: {output} ({check or 'not read back'})", highlight=False)
