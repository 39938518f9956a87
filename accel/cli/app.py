"""The command line: `accel demo`, `generate`, `tune`, `evaluate`, `bench`, `info`.

Errors a user can mend are printed as one line and exit with 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Annotated

import typer

from accel.errors import AccelError, AccelWarning

from . import bench, demo, evaluate, generate, info, terminal, tune

app = typer.Typer(
    name="accel",
    help="Faster image generation without retraining. Start with: accel demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(tune.tune)
app.command()(info.info)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(bench.app, name="bench")

# Not exported under a name of its own, and another class in every second release.
_ClickException: type[Exception] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)
_debug = False


def _version(value: bool) -> None:
    if value:
        from accel import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


def _show_warning(message: Warning | str, *details: object, **more: object) -> None:
    terminal.complain("warning", message, "yellow")


def main(arguments: Iterable[str] | None = None) -> None:
    """Run a command; always leaves by SystemExit.

    Args:
        arguments: what follows `accel` on the command line; None: of this process.
    """
    terminal.tolerate_narrow_encodings()
    with warnings.catch_warnings(), terminal.interrupts_end_soon():
        warnings.simplefilter("once", AccelWarning)
        warnings.showwarning = _show_warning
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    global _debug
    _debug = False
    try:
        return app(arguments, prog_name="accel", standalone_mode=False) or 0
    except typer.Abort:
        return terminal.INTERRUPTED
    except _ClickException as error:
        return _usage(error)
    except (AccelError, OSError) as error:
        if _debug:
            raise
        terminal.complain("error", error, "bold red")
        return 2
    except (MemoryError, RuntimeError) as error:
        if _debug or not _is_out_of_memory(error):
            raise
        terminal.complain("error", f"out of memory ({error}); {_LESS_MEMORY}", "bold red")
        return 2


_LESS_MEMORY = "make --size or --batch smaller, or take --dtype bfloat16"


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises a class of its own on GPUs, and a bare RuntimeError where the CPU's allocator fails."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _usage(error: Exception) -> int:
    """One line for what the command line itself refuses. Without arguments, help was printed already."""
    code = int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "NoArgsIsHelpError":
        return code
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "accel"
    message = error.format_message()  # type: ignore[attr-defined]
    stop = "" if message.endswith((".", "?", "!")) else "."
    terminal.complain("error", f"{message}{stop} See: {path} --help", "bold red")
    return code
