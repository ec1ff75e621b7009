"""`jumprelu demo`: the whole workflow on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console

app = typer.Typer()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("jumprelu-demo"),
    steps: Annotated[int | None, typer.Option(help="Training steps; fewer is quicker.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
) -> None:
    """Train on the embedded Gemma 2, evaluate, look at latents, steer with one, save."""
    from jumprelu_plugin.studies.demo import DemoSettings, run_demo

    settings = DemoSettings(seed=seed) if steps is None else DemoSettings(seed=seed, steps=steps)
    run_demo(output, settings, console)
