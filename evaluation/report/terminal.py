"""The report's tables for a terminal of any width: a table where it fits, else a block of lines per row."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .tables import Summary, caption, distance_table, main_table, task_table


def show(summary: Summary, console: Console) -> None:
    """Caption, tables and notes, nothing cut off."""
    console.print(Text(caption(summary)))
    for title, table in (
        ("Configurations", main_table(summary)),
        ("Score per task", task_table(summary)),
        ("Distances between sets of images", distance_table(summary)),
    ):
        if table is not None:
            console.print()
            _table(console, title, *table)
    for note in summary["notes"]:
        console.print()
        console.print(Text(f"Note: {note}"))


def _table(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    if _fits(console, header, rows):
        table = Table(title=Text(title, "bold"), title_justify="left")
        for cell in header:
            table.add_column(Text(cell))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    console.print(Text(title, "bold"))
    for row in rows:
        console.print(Text(f"  {row[0]}", "bold"))
        for name, cell in zip(header[1:], row[1:], strict=True):
            if cell != "–":
                console.print(Text(f"    {name}: {cell}"))


def _fits(console: Console, header: list[str], rows: list[list[str]]) -> bool:
    """Whether every cell stands on one line: wrapped numbers are hard to read."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return sum(widths) + 3 * len(widths) + 1 <= console.width
