"""A saved dictionary on its model: `jumprelu evaluate`, `steer`, `dashboard` and `l0-sweep`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console
from jumprelu_plugin.models.options import ModelOptions

app = typer.Typer()


class Change(str, Enum):
    """What to do to a latent."""

    add = "add"
    clamp = "clamp"
    ablate = "ablate"


@app.command()
def evaluate(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE or a cross-layer transcoder.")],
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences to read.")] = 128,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    output: Annotated[Path | None, typer.Option(help="JSON record to write.")] = None,
) -> None:
    """Delta LM loss, FVU, L0, dead and dense latents of a saved SAE.

    A cross-layer transcoder takes the place of all its MLPs at once.
    """
    from jumprelu_plugin.formats.saved import load_saved

    saved = load_saved(sae, ModelOptions(model), context_size=context_size, clt=True)
    console.print(saved.evaluate(sequences, output).table())
    if output is not None:
        console.print(f"written: {output}")


@app.command()
def steer(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE, as SAELens saves it.")],
    latent: Annotated[int, typer.Option(help="Which latent.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    amount: Annotated[float, typer.Option(help="Added, or clamped to; activation units.")] = 20.0,
    change: Annotated[Change, typer.Option(help="What to do to the latent.")] = Change.add,
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt without and with a change to one latent."""
    from jumprelu_plugin.analysis.generation import generate_steered, intervention
    from jumprelu_plugin.formats.saved import load_saved

    saved = load_saved(sae, ModelOptions(model))
    what = intervention(change.value, latent, amount)
    without, changed = generate_steered(
        saved.model, saved.dictionary, what, prompt, seed=seed, new_tokens=tokens
    )
    console.print("[bold]without[/]")
    console.print(without, markup=False, highlight=False)
    console.print(f"\n[bold]with[/] ({change.value} latent {latent})")
    console.print(changed, markup=False, highlight=False)


@app.command()
def dashboard(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE, as SAELens saves it.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("features.html"),
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences to read.")] = 256,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    examples: Annotated[int, typer.Option(help="Contexts shown of each latent.")] = 8,
    latent: Annotated[list[int] | None, typer.Option(help="Only these latents.")] = None,
) -> None:
    """Write a searchable HTML page of a dictionary's latents; it needs no network."""
    from jumprelu_plugin.analysis.dashboard import write_dashboard
    from jumprelu_plugin.formats.saved import load_saved

    saved = load_saved(sae, ModelOptions(model), context_size=context_size)
    _, tokens = saved.sequences(sequences)
    path = write_dashboard(
        output, saved.model, saved.dictionary, tokens, latents=latent, examples=examples
    )
    console.print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)", highlight=False)


@app.command()
def l0_sweep(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE, as SAELens saves it.")],
    l0: Annotated[str, typer.Option(help="L0s to refit to, such as 10,20,40.")],
    output: Annotated[Path, typer.Option(help="Folder for l0_10, l0_20, … and a record.")],
    train: Annotated[str, typer.Option(help="thresholds, decoder or all.")] = "thresholds",
    steps: Annotated[int, typer.Option(help="Training steps for each.")] = 300,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to fit on.")] = 2048,
    held_out: Annotated[int, typer.Option(help="Held-out sequences to judge on.")] = 256,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the order of the tokens.")] = 0,
) -> None:
    """Refit a trained SAE's thresholds to several L0s, each saved and judged."""
    from jumprelu_plugin.finetune.l0_sweep import frontier_table, parse_l0_list
    from jumprelu_plugin.finetune.refit import RefitSettings
    from jumprelu_plugin.finetune.sweep_saved import run_saved_l0_sweep

    points = run_saved_l0_sweep(
        sae,
        parse_l0_list(l0),
        output,
        settings=RefitSettings(train, steps, batch_tokens, lr, seed),
        options=ModelOptions(model),
        sequences=sequences,
        held_out=held_out,
        context_size=context_size,
        log=console.print,
    )
    console.print(frontier_table(points))
    console.print(f"written: {output}", highlight=False)
