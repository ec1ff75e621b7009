"""`jumprelu demo`: the whole workflow on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console

app = typer.Typer()


@app.command()
def demo(
    output_path: Annotated[
        Path, typer.Option("--output_path", help="folder for the result.")
    ] = Path("jumprelu-demo"),
    steps: Annotated[
        int | None, typer.Option("--steps", help="training steps. Default: 1000.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of initialization and data order.")] = 0,
) -> None:
    """Train on the embedded Gemma 2, evaluate, look at latents, steer with one, save."""
    from jumprelu_plugin.studies.demo import DemoSettings, run_demo

    settings = DemoSettings(seed=seed) if steps is None else DemoSettings(seed=seed, steps=steps)
    run_demo(output_path, settings, console)
