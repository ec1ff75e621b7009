"""Studies over many SAEs: `jumprelu cache-activations`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console
from jumprelu_plugin.cli.generated import with_dataclass_options
from jumprelu_plugin.training.activations.cache.settings import CacheSettings

app = typer.Typer()


@app.command()
@with_dataclass_options
def cache_activations(
    output_path: Annotated[Path, typer.Option("--output_path", help="folder for the activations.")],
    hook_names: Annotated[
        str,
        typer.Option("--hook_names", help="hooks whose activations are kept.", metavar="HOOK,HOOK"),
    ],
    settings: CacheSettings,
) -> None:
    """Write activations of several hooks to disk, for `jumprelu train --activations`.

    The size is announced and checked against the disk before the model runs. Interrupted, the same
    command goes on where it stopped.
    """
    from jumprelu_plugin.training.activations.cache.settings import cache_activations

    cache_activations(output_path, hook_names.split(","), settings, log=console.print)
    console.print(f"written: {output_path}", highlight=False)
