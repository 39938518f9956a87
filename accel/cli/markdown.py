"""A report's Markdown on a terminal. rich renders its text; its tables have more columns than a terminal has room
for, and rich would cut their headers to two letters: those are shown row by row."""

from __future__ import annotations

import re
import sys
from itertools import groupby

from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from .terminal import console, say, visible

_BETWEEN = 2


def show_report(markdown: str) -> None:
    """A report: rendered on a terminal, as it is into a file or a pipe."""
    if not console.is_terminal:
        sys.stdout.write(markdown.rstrip("\n") + "\n")
        return
    for is_table, lines in groupby(markdown.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            _show_table([_cells(line) for line in lines])
        else:
            console.print(Markdown("\n".join(map(visible, lines))))


def _cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [_plain(part.strip()) for part in parts]


def _plain(text: str) -> str:
    """A cell without the marks of bold and code, links as their text, escapes undone."""
    text = re.sub(r"\[([^\]\\]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(?<!\\)(\*\*|`)", "", text)
    return visible(re.sub(r"\\(\W)", r"\1", text))


def _show_table(rows: list[list[str]]) -> None:
    header, *body = [row for row in rows if not all(re.fullmatch(":?-+:?", cell) for cell in row)]
    widths = [max(map(len, column)) + _BETWEEN for column in zip(header, *body, strict=False)]
    if sum(widths) <= console.width:
        table = Table(box=None, pad_edge=False, padding=(0, _BETWEEN, 0, 0))
        for name in header:
            table.add_column(Text(name), no_wrap=True)
        for row in body:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    for row in body:
        say(row[0], "bold")
        for name, value in zip(header[1:], row[1:], strict=False):
            if value:
                say(f"  {name}: {value}")
