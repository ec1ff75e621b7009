"""A saved dictionary on its model: `jumprelu evaluate`, `steer`, `dashboard` and `l0-sweep`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console
from jumprelu_plugin.cli.generated import with_dataclass_options
from jumprelu_plugin.models.number_lists import numbers, whole_numbers
from jumprelu_plugin.models.options import ModelOptions

app = typer.Typer()

Folder = Annotated[Path, typer.Argument(help="folder of an SAE, as SAELens saves it.")]
ContextSize = Annotated[
    int | None,
    typer.Option(
        "--context_size",
        min=2,
        help="tokens in a sequence. Default: the dictionary's own, else 128.",
    ),
]


class Change(str, Enum):
    """What to do to a latent."""

    add = "add"
    clamp = "clamp"
    ablate = "ablate"


@app.command()
@with_dataclass_options
def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of an SAE or a cross-layer transcoder.")],
    options: ModelOptions,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="held-out sequences.")] = 128,
    context_size: ContextSize = None,
    output_path: Annotated[
        Path | None, typer.Option("--output_path", help="JSON record to write.")
    ] = None,
) -> None:
    """Delta LM loss, FVU, L0, dead and dense latents of a saved dictionary.

    A cross-layer transcoder takes the place of all its MLPs at once.
    """
    from jumprelu_plugin.analysis.output_file import require_place_for_file
    from jumprelu_plugin.formats.saved import RECORD_FILENAME, load_saved

    if output_path is not None:
        require_place_for_file(output_path, RECORD_FILENAME)
    saved = load_saved(folder, options, context_size=context_size, clt=True)
    console.print(saved.evaluate(sequences, output_path).table())
    if output_path is not None:
        console.print(f"written: {output_path}")


@app.command()
@with_dataclass_options
def steer(
    folder: Folder,
    options: ModelOptions,
    latent: Annotated[int, typer.Option("--latent", help="number of the latent.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="text to continue. Default: the start of a held-out text."),
    ] = None,
    amount: Annotated[
        float | None,
        typer.Option(
            "--amount",
            help="added, or clamped to, in the SAE's activation units; ablate takes none. "
            "Default: 20.",
        ),
    ] = None,
    change: Annotated[
        Change, typer.Option("--change", help="what to do to the latent.")
    ] = Change.add,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="tokens to generate.")] = 40,
    seed: Annotated[int, typer.Option("--seed", help="of the sampling.")] = 0,
) -> None:
    """Continue a prompt without and with a change to one latent."""
    from jumprelu_plugin.analysis.generation import generate_steered, intervention
    from jumprelu_plugin.analysis.steering import check_interventions
    from jumprelu_plugin.formats.saved import load_saved

    if change is Change.ablate and amount is not None:
        raise ValueError(
            f"--amount {amount:g} has no effect with --change ablate, which sets the latent to 0: "
            "leave it out, or give --change clamp"
        )
    chosen = intervention(change.value, latent, 20.0 if amount is None else amount)
    saved = load_saved(folder, options)
    check_interventions(saved.dictionary, [chosen])  # before a text for the prompt is read
    without, steered = generate_steered(
        saved.model,
        saved.dictionary,
        chosen,
        saved.prompt() if prompt is None else prompt,
        seed=seed,
        new_tokens=tokens,
        prepend_bos=saved.choice.prepend_bos,
    )
    console.print("[bold]without[/]")
    console.print(without, markup=False, highlight=False)
    console.print(f"\n[bold]with[/] ({change.value} latent {latent})")
    console.print(steered, markup=False, highlight=False)


@app.command()
@with_dataclass_options
def dashboard(
    folder: Folder,
    options: ModelOptions,
    output_path: Annotated[Path, typer.Option("--output_path", help="HTML file to write.")] = Path(
        "features.html"
    ),
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="held-out sequences.")] = 256,
    context_size: ContextSize = None,
    examples: Annotated[
        int, typer.Option("--examples", min=1, help="contexts shown of a latent.")
    ] = 8,
    latents: Annotated[
        str | None,
        typer.Option("--latents", help="numbers of latents. Default: all.", metavar="0,1,3|0-5"),
    ] = None,
    explanations: Annotated[
        Path | None,
        typer.Option("--explanations", help="explanations.json of `study explain` to show."),
    ] = None,
) -> None:
    """Write a searchable HTML page of a dictionary's latents; it needs no network."""
    from jumprelu_plugin.analysis.dashboard import DASHBOARD_FILENAME, write_dashboard
    from jumprelu_plugin.analysis.output_file import require_place_for_file
    from jumprelu_plugin.formats.explanations import read_explanations
    from jumprelu_plugin.formats.saved import load_saved

    require_place_for_file(output_path, DASHBOARD_FILENAME)
    chosen = None if latents is None else whole_numbers("--latents", latents)
    texts = None if explanations is None else read_explanations(explanations, folder).texts
    saved = load_saved(folder, options, context_size=context_size)
    _, tokens = saved.sequences(sequences)
    path = write_dashboard(
        output_path, saved.model, saved.dictionary, tokens, latents=chosen, examples=examples,
        explanations=texts,
    )  # fmt: skip
    console.print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)", highlight=False)


@app.command()
@with_dataclass_options
def l0_sweep(
    folder: Folder,
    options: ModelOptions,
    l0: Annotated[str, typer.Option("--l0", help="L0s to refit to.", metavar="10,20,40")],
    output_path: Annotated[
        Path, typer.Option("--output_path", help="folder for l0_10, l0_20, … and a record.")
    ],
    train: Annotated[
        str, typer.Option("--train", help="thresholds, decoder or all.")
    ] = "thresholds",
    steps: Annotated[int, typer.Option("--steps", min=0, help="training steps for each L0.")] = 300,
    train_batch_size_tokens: Annotated[
        int, typer.Option("--train_batch_size_tokens", min=1, help="tokens in a training step.")
    ] = 2048,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="learning rate. Default: what suits --train."),
    ] = None,
    sequences: Annotated[
        int, typer.Option("--sequences", min=1, help="sequences to fit on.")
    ] = 2048,
    held_out: Annotated[
        int, typer.Option("--held_out", min=1, help="held-out sequences to evaluate on.")
    ] = 256,
    context_size: ContextSize = None,
    seed: Annotated[int, typer.Option("--seed", help="of the data order.")] = 0,
) -> None:
    """Refit a trained SAE's thresholds to several L0s, each saved and evaluated."""
    from jumprelu_plugin.finetune.l0_sweep import frontier_table
    from jumprelu_plugin.finetune.refit import RefitSettings
    from jumprelu_plugin.finetune.sweep_saved import run_saved_l0_sweep

    points = run_saved_l0_sweep(
        folder,
        numbers("--l0", l0),
        output_path,
        settings=RefitSettings(train, steps, train_batch_size_tokens, lr, seed),
        options=options,
        sequences=sequences,
        held_out=held_out,
        context_size=context_size,
        log=console.print,
    )
    console.print(frontier_table(points))
    console.print(f"written: {output_path}", highlight=False)
