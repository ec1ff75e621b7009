"""Interpretability: `jumprelu study make`, `serve`, `report` and `explain`, `jumprelu explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jumprelu_plugin.cli.console import console
from jumprelu_plugin.cli.generated import with_dataclass_options
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.studies.explain.settings import BackendSettings, ExplainSettings
from jumprelu_plugin.studies.rating.settings import RatingStudySettings

app = typer.Typer()
study = typer.Typer(
    no_args_is_help=True, help="Interpretability of latents, judged by people and by models."
)
app.add_typer(study, name="study")

Folders = Annotated[
    list[str],
    typer.Argument(help="SAE folders, each FOLDER or LABEL=FOLDER; a label is a group compared."),
]
ContextSize = Annotated[
    int | None,
    typer.Option("--context_size", help="tokens in a sequence. Default: the SAEs' own."),
]


def print_table(table: Any) -> None:
    """Print a table of a report."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(*table.header)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


@study.command()
@with_dataclass_options
def make(
    folders: Folders,
    settings: RatingStudySettings,
    options: ModelOptions,
    output_path: Annotated[
        Path, typer.Option("--output_path", help="folder for the rating set, which raters see.")
    ],
    key_path: Annotated[
        Path | None,
        typer.Option("--key_path", help="file for the key. Default: OUTPUT_PATH.key.json."),
    ] = None,
    context_size: ContextSize = None,
) -> None:
    """Make a blind rating set of latents from one or several SAEs, and its key."""
    from jumprelu_plugin.studies.rating.questions import make_rating_study

    folder, key = make_rating_study(
        folders,
        output_path,
        key_path=key_path,
        settings=settings,
        options=options,
        context_size=context_size,
        log=console.print,
    )
    console.print(f"written: {folder}", highlight=False)
    console.print(f"the key, which raters must not see: {key}", highlight=False)
    console.print(f"next: jumprelu study serve {folder}", highlight=False)


@study.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="what `study make` wrote.")],
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="of the loopback address; 0: a free one."),
    ] = 8765,
) -> None:
    """Serve a rating set to browsers on this machine, until interrupted."""
    from jumprelu_plugin.studies.rating.server import RatingServer

    with RatingServer(folder, port) as server:
        console.print(f"{server.url}  (Ctrl-C stops; every rating is on the disk already)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("stopped")


@study.command()
def report(
    folder: Annotated[Path, typer.Argument(help="what `study make` wrote, with ratings.")],
    key_path: Annotated[
        Path | None, typer.Option("--key_path", help="the key. Default: FOLDER.key.json.")
    ] = None,
    output_path: Annotated[
        Path | None, typer.Option("--output_path", help="folder. Default: FOLDER-report.")
    ] = None,
) -> None:
    """Unblind a rating study: shares with intervals, agreement, SAEs compared."""
    from jumprelu_plugin.studies.rating.report import (
        PAGE_FILENAME,
        agreement_text,
        shares_table,
        write_rating_report,
    )

    beside = folder.resolve()
    key = key_path or beside.with_name(f"{beside.name}.key.json")
    output = output_path or beside.with_name(f"{beside.name}-report")
    result = write_rating_report(folder, key, output)
    print_table(shares_table(result))
    console.print(agreement_text(result.agreement))
    for warning in result.warnings:
        console.print(f"[yellow]{warning}[/]", highlight=False)
    console.print(f"written: {output / PAGE_FILENAME}", highlight=False)


@study.command(name="explain")
@with_dataclass_options
def study_explain(
    folders: Folders,
    settings: ExplainSettings,
    backend: BackendSettings,
    options: ModelOptions,
    output_path: Annotated[
        Path, typer.Option("--output_path", help="new folder, or one of an earlier run to go on.")
    ],
    context_size: ContextSize = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="start without asking about the cost.")
    ] = False,
) -> None:
    """Explain latents with a language model and score what it predicts from the explanations."""
    from jumprelu_plugin.studies.explain.report import PAGE_FILENAME, scores_table
    from jumprelu_plugin.studies.explain.study import run_explanation_study

    result = run_explanation_study(
        folders,
        output_path,
        settings=settings,
        backend=backend,
        options=options,
        context_size=context_size,
        confirm=lambda estimate: yes or typer.confirm("Start?"),
        log=lambda text: console.print(text, highlight=False),
    )
    print_table(scores_table(result))
    if result.unfinished:
        raise ValueError(
            f"stopped: {result.unfinished}. The replies are kept in {output_path}, and the same "
            "command goes on"
        )
    console.print(f"written: {output_path / PAGE_FILENAME}", highlight=False)


@app.command()
@with_dataclass_options
def explain(
    folder: Annotated[Path, typer.Argument(help="folder of an SAE, as SAELens saves it.")],
    backend: BackendSettings,
    options: ModelOptions,
    latent: Annotated[int, typer.Option("--latent", help="number of the latent.")],
    sequences: Annotated[int, typer.Option("--sequences", help="sequences of text.")] = 256,
    context_size: ContextSize = None,
) -> None:
    """Explain one latent with a language model, and score what it predicts from that."""
    from jumprelu_plugin.studies.explain.one import explain_latent

    shown, found = explain_latent(
        folder,
        latent,
        backend=backend,
        options=options,
        sequences=sequences,
        context_size=context_size,
    )
    for text in shown:
        console.print(text, markup=False, highlight=False)
    for line in found:
        console.print(line, markup=False, highlight=False)
