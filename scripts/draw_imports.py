"""Who imports whom, read from the code, and a picture of it.

    python scripts/draw_imports.py --out docs/imports.svg
    python scripts/draw_imports.py --root ANOTHER_CHECKOUT --title "before the move" --out docs/imports-before.svg

An import counts wherever it stands: at the top, in a function, under TYPE_CHECKING; so does a module that a table names
in a string. `accel/__init__.py` counts as a target of nothing and a source of nothing: it only forwards names. A room is
a folder; the files that lie directly in `accel/` are two rooms, because what everybody raises (`errors`) cannot stand on the
same floor as the verb that calls everybody. Red arrows go against the order that most imports give.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

#: Folders of a checkout -> what they are called in an import.
FOLDERS = {
    "accel": "accel",
    "pipelines": "accel.pipelines",
    "kernels": "accel.kernels",
    "evaluation": "accel.evaluation",
    "configs": "accel.configs",
}
TITLE = "Imports between folders: every arrow goes down"
_NAME = re.compile(r"accel(\.\w+)+")
#: Files of `accel/` on which everything may stand; they import nothing of it but each other.
FOUNDATIONS = {"errors", "stats", "backends", "strict"}


@dataclass(frozen=True)
class Import:
    """`source` imports `target`; both are modules' names. `where` is file:line."""

    source: str
    target: str
    where: str


def modules(root: Path) -> dict[str, Path]:
    """Names of all modules of a checkout -> their files."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def imports(root: Path) -> list[Import]:
    """Every import of one module of the checkout by another, once a line.

    Raises:
        SyntaxError: a file is not Python.
    """
    known, found = modules(root), []
    for source, path in known.items():
        if source == "accel":
            continue
        package = source if path.name == "__init__.py" else source.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            for name in _names(node, package):
                target = _home(name, known, root)
                if target not in (None, "accel", source):
                    where = f"{path.relative_to(root).as_posix()}:{node.lineno}"  # type: ignore[attr-defined]
                    found.append(Import(source, str(target), where))
    return list(dict.fromkeys(found))


def _names(node: ast.AST, package: str) -> Iterator[str]:
    """The full names that a piece of code imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAME.fullmatch(node.value):
        yield node.value


def _home(name: str, known: dict[str, Path], root: Path) -> str | None:
    """The module that holds what is imported, through `accel`'s forwarding; None for other packages."""
    if name in known:
        return name
    base, _, last = name.rpartition(".")
    if base == "accel":
        return _forwarded(root).get(last, "accel")
    return base if base in known else None


def _forwarded(root: Path) -> dict[str, str]:
    """`accel.NAME` -> the module where it is defined, as `accel/__init__.py` says."""
    path = root / "accel/__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["_HOME"]:
            return ast.literal_eval(node.value)
    return {}


def room(module: str) -> str:
    """The folder that a module lies in, as in DESIGN's layout: `accel/core`, `pipelines`, `evaluation/bench` …"""
    parts = module.split(".")
    if parts[1] in FOLDERS:
        bench = parts[1:3] == ["evaluation", "bench"]
        return "evaluation/bench" if bench else parts[1]
    if parts[1] in FOUNDATIONS:
        return "accel: foundations"
    if parts[1] == "__main__":
        return "accel/cli"
    folders = {"core", "methods", "cli", "bench"}
    return f"accel/{parts[1]}" if parts[1] in folders else "accel"


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """The groups of names that reach each other, each sorted; none where all arrows go one way."""
    after: dict[str, set[str]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)
        after.setdefault(b, set())
    reach = {name: _reach(name, after) for name in after}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in after if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def _reach(start: str, after: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    queue = list(after[start])
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue.extend(after[name])
    return seen


def floors(weights: Counter[tuple[str, str]]) -> dict[str, int]:
    """Room -> floor, 0 at the bottom: above everything it imports, where that is possible.

    In a circle the direction with fewer imports gives way, one arrow at a time.
    """
    kept = dict(weights)
    while groups := circles(set(kept)):
        inside = {edge: n for edge, n in kept.items() for group in groups if {*edge} <= {*group}}
        del kept[min(inside, key=lambda edge: (inside[edge], edge))]
    height: dict[str, int] = {name: 0 for edge in weights for name in edge}
    for _ in height:
        for above, below in kept:
            height[above] = max(height[above], height[below] + 1)
    return height


def draw(root: Path, title: str) -> str:
    """The picture, as SVG."""
    found = imports(root)
    weights = Counter((room(i.source), room(i.target)) for i in found if room(i.source) != room(i.target))
    height = {room(name): 0 for name in modules(root) if name != "accel"} | floors(weights)
    files = Counter(room(name) for name in modules(root) if name != "accel")
    width, top, row, box, tall = 860, 70, 96, 190, 44
    rows = [sorted(r for r in height if height[r] == h) for h in range(max(height.values()), -1, -1)]
    place: dict[str, tuple[float, float]] = {}
    for y, names in enumerate(rows):
        for x, name in enumerate(names):
            # Every other floor a little to the side: arrows that pass a floor then go beside its box, not through it.
            shift = (80 if y % 2 else -80) if len(names) == 1 else 0
            place[name] = width * (x + 0.5) / len(names) + shift, top + y * row
    upward = {edge for edge in weights if place[edge[0]][1] >= place[edge[1]][1]}
    circle = circles({(i.source, i.target) for i in found})
    words = f"{len(weights)} arrows, {len(upward)} upwards; circles between files: {len(circle) or 'none'}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + len(rows) * row}" '
        'font-family="sans-serif" font-size="14">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker></defs>',
        f'<text x="20" y="28" font-size="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="20" y="48" fill="#555">{escape(words)}</text>',
    ]
    for edge in sorted(weights, key=lambda e: e in upward):
        said = f"{edge[0]} → {edge[1]}: {weights[edge]} imports"
        lines.append(_arrow(place[edge[0]], place[edge[1]], said, up=edge in upward, tall=tall))
    for name, (x, y) in place.items():
        lines.append(
            f'<rect x="{x - box / 2:.0f}" y="{y}" width="{box}" height="{tall}" rx="8" fill="#eef3fb" stroke="#41619d"/>'
            f'<text x="{x:.0f}" y="{y + 19}" text-anchor="middle" font-size="13">{escape(name)}</text>'
            f'<text x="{x:.0f}" y="{y + 35}" text-anchor="middle" font-size="11" fill="#555">{files[name]} files</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _arrow(start: tuple[float, float], end: tuple[float, float], said: str, *, up: bool, tall: int) -> str:
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:  # neighbours on one floor
        y0, y1, bend = y0 + tall, y1 + tall, 40.0
    else:
        y0, y1 = (y0, y1 + tall) if up else (y0 + tall, y1)
        bend = 0.4 * (y1 - y0)
    lean = 24 if up else 0  # beside the arrow that goes down between the same rooms
    x0, x1 = x0 + 0.18 * (x1 - x0) + lean, x1 - 0.18 * (x1 - x0) + lean
    color, thick = ("#c0392b", 2.0) if up else ("#8a97ad", 0.6 if "foundations" in said else 1.4)
    path = f"M{x0:.0f} {y0:.0f}C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1:.0f}"
    title = f"<title>{escape(said)}</title>"
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{thick}" marker-end="url(#tip)">{title}</path>'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).parent.parent, help="the checkout to read"
    )
    parser.add_argument("--title", default=TITLE)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(draw(args.root, args.title), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
