"""Links inside the repository lead somewhere, anchors included; every page of docs/ is on the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from blocks import PAGES, ROOT, name

LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
FILES = [*PAGES, ROOT / "CHANGELOG.md"]


def without_code(text: str) -> str:
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", text)


def slug(heading: str) -> str:
    """As GitHub and mkdocs make anchors of headings of plain words."""
    words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", words))


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = {slug(m) for m in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    return headings | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def broken(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        outside = ROOT / "docs" in page.parents and ROOT / "docs" not in (file, *file.parents)
        if not file.exists() or outside or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", FILES, ids=name)
def test_links(page):
    assert broken(page) == []


def test_a_broken_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b\n[a](page.md#a-b) [b](page.md#c) [c](no.md) `[d](no.md)` [e](https://example.org)\n"
    )
    assert broken(page) == ["page.md#c", "no.md"]


def test_every_page_is_on_the_site():
    def listed(entry) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        return set().union(*(listed(e) for e in (entry.values() if isinstance(entry, dict) else entry)))

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert listed(site["nav"]) == {
        p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")
    }


def test_every_picture_is_used():
    text = "".join(page.read_text(encoding="utf-8") for page in FILES)
    pictures = [p.name for p in (ROOT / "docs").rglob("*") if p.suffix in (".png", ".svg")]
    assert [p for p in pictures if p not in text] == []
