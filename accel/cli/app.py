"""The command line: `accel demo`, `generate`, `evaluate`, `info`.

Errors a user can mend are printed as one line and exit with 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from accel import __version__
from accel.errors import AccelError, AccelWarning

from . import bench, demo, evaluate, generate, info

app = typer.Typer(
    name="accel",
    help="Faster image generation without retraining. Start with: accel demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(info.info)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(bench.app, name="bench")

_debug = False


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    global _debug
    _debug = debug


def _show_warning(message: Warning | str, *details: object, **more: object) -> None:
    Console(stderr=True).print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)


def main() -> None:
    warnings.simplefilter("once", AccelWarning)
    warnings.showwarning = _show_warning
    try:
        app()
    except (AccelError, OSError) as error:
        if _debug:
            raise
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)
