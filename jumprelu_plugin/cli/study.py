"""Interpretability studies: `jumprelu study make`, `serve` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console
from jumprelu_plugin.cli.generated import with_dataclass_options
from jumprelu_plugin.models.options import ModelOptions
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
    typer.Option("--context_size", help="tokens in a sequence. Default: the first SAE's own."),
]


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
    from rich.table import Table

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
    shown = shares_table(result)
    table = Table(*shown.header)
    for row in shown.rows:
        table.add_row(*row)
    console.print(table)
    console.print(agreement_text(result.agreement))
    for warning in result.warnings:
        console.print(f"[yellow]{warning}[/]", highlight=False)
    console.print(f"written: {output / PAGE_FILENAME}", highlight=False)
