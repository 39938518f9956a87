"""One table, four views: Markdown, HTML (by the page's template), the terminal and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.table

NOTHING = "–"


class Markdown(str):
    """A cell that is Markdown already, such as a name in backticks; any other is escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """`rows` of as many cells as the `header` has; the first names its row. None is a cell without a value."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), (
            "a row of another length than the header"
        )

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], title: str = "") -> Table:
        """One row per record; a column for every key that any of them has."""
        header = list(dict.fromkeys(key for record in records for key in record))
        return cls(header, [[record.get(key) for key in header] for record in records], title)

    def markdown(self) -> str:
        """With its title as a heading. Cells cannot end the row, nor become tags, links or emphasis."""
        header = [_escape(name) for name in self.header]
        lines = [header, ["---"] * len(header), *self.texts(_escape)]
        drawn = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{drawn}" if self.title else drawn

    def terminal(self) -> rich.table.Table:
        """For `rich.console.Console.print`; columns of numbers to the right, nothing read as markup."""
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(title=self.title or None, title_justify="left")
        for index, name in enumerate(self.header):
            drawn.add_column(Text(name), justify="right" if index else "left")
        for row in self.texts(lambda cell: cell.replace("`", "") if isinstance(cell, Markdown) else cell):
            drawn.add_row(*map(Text, row))
        return drawn

    def csv(self) -> str:
        """Values as they are, for a spreadsheet; nothing where there is none."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.rows])
        return buffer.getvalue()

    def texts(self, form: Any = str) -> list[list[str]]:
        return [[NOTHING if cell is None else form(cell) for cell in row] for row in self.rows]


def lines(cell: str) -> list[tuple[str, str]]:
    """A cell's parts as (value, its interval or spread), for a table that sets them below each other."""
    parts = []
    for part in cell.split("; "):
        if part.startswith("n = "):
            parts.append(("", part))
            continue
        match = re.match(r"(.*?)(?: ([\[(].*))?$", part, re.DOTALL)
        assert match is not None
        parts.append((match[1], match[2] or ""))
    return parts


def escaped(text: str) -> str:
    """Text as Markdown that shows it, on one line. Brackets of intervals stay: alone they are no link."""
    for character in ("\\", "|", "`", "*", "_", "<"):
        text = text.replace(character, "\\" + character)
    return " ".join(re.sub(r"\](?=[\[(:])", r"\\]", text).split())


def _escape(cell: Any) -> str:
    return cell.replace("|", "\\|") if isinstance(cell, Markdown) else escaped(str(cell))
