"""The code blocks of README, CONTRIBUTING and docs/, and what their markers say.

A comment right above a block says what a test does with it: `<!-- run -->` executes it (the blocks of a page share their
names, in order), `<!-- file: PATH -->` is that file of the repository while the page runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- (.+?) -->\n\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block. `marker` is the comment above it, or empty."""

    page: Path
    line: int
    language: str
    marker: str
    text: str

    @property
    def where(self) -> str:
        return f"{name(self.page)}:{self.line}"

    @property
    def file(self) -> str | None:
        return self.marker.removeprefix("file: ") if self.marker.startswith("file: ") else None


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        marker = _MARKER.search(before)
        found.append(
            Block(
                page,
                before.count("\n") + 1,
                match[2],
                marker[1] if marker else "",
                re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE),
            )
        )
    return found


ALL = [block for page in PAGES for block in blocks(page)]
