"""The `jumprelu` command: one subcommand, one function; the work is done elsewhere."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from jumprelu_plugin.cli import analyse, demo, export, studies, study, train, transcoders


class UserError(typer.BadParameter):
    """What the user can mend: said without a traceback, exit code 2."""

    def format_message(self) -> str:
        return self.message


class Commands(TyperGroup):
    """The subcommands, with their errors said as typer says a wrong option."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; JUMPRELU_TRACEBACK=1 keeps the traceback of an error."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, BrokenPipeError) or os.environ.get("JUMPRELU_TRACEBACK"):
                raise
            raise UserError(str(error)) from error
        except Exception as error:
            from sae_lens.training._interruption import InterruptedException

            if not isinstance(error, InterruptedException):
                raise
            typer.echo(error, err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    # Every flag is taken with - and with _; the commands inherit it.
    context_settings={
        "token_normalize_func": lambda name: name.replace("-", "_"),
        "help_option_names": ["-h", "--help"],
    },
    pretty_exceptions_enable=False,
    help="Train, evaluate and use JumpReLU sparse autoencoders with SAELens.",
)
for group in (demo, train, transcoders, analyse, studies, study, export):
    app.add_typer(group.app)


def main() -> None:
    """Run the command."""
    app(prog_name="jumprelu")


if __name__ == "__main__":
    main()
