"""GenEval's prompt metadata (Ghosh et al., 2310.11513): one JSON object per line, in and out, strictly.

A line is `{"tag", "include": [{"class", "count"[, "color"][, "position": [relation, index]]}],
["exclude": [{"class", "count"}],] "prompt"}`. `index` points at an earlier entry of `include`.
Anything else is an error naming file, line and reason: a key that is silently dropped would
silently change a score.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.evaluation.errors import MetadataError
from accel.evaluation.textfiles import parse_json, read_text, split_lines, writable

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class ObjectSpec:
    """One entry of `include` or `exclude`.

    As `include`: at least `count` objects of class `label`; as `exclude`: fewer than `count`.
    `position` is `(relation, index)`: this object stands in `relation` to `include[index]`.
    """

    label: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"class": self.label, "count": self.count}
        if self.color is not None:
            entry["color"] = self.color
        if self.position is not None:
            entry["position"] = list(self.position)
        return entry


@dataclass(frozen=True)
class Metadata:
    """One GenEval prompt: the text and what an image of it must and must not show."""

    tag: str
    include: tuple[ObjectSpec, ...]
    prompt: str
    exclude: tuple[ObjectSpec, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """In GenEval's own key order, so that writing what was read gives the same line."""
        line: dict[str, Any] = {"tag": self.tag, "include": [entry.to_dict() for entry in self.include]}
        if self.exclude:
            line["exclude"] = [entry.to_dict() for entry in self.exclude]
        return line | {"prompt": self.prompt}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def parse_line(text: str, source: str = "<string>", line: int = 1) -> Metadata:
    """Parse one metadata line; `source` and `line` go into the `MetadataError`, if there is one."""
    try:
        return _metadata(parse_json(text))
    except (ValueError, _Reason) as error:
        raise MetadataError(f"{source}, line {line}: not a GenEval metadata line: {error}") from None


def read_metadata(path: str | Path) -> list[Metadata]:
    """Read a GenEval `*.jsonl` file. Blank lines are allowed only at the end of the file."""
    lines = split_lines(read_text(path).rstrip())
    if not any(lines):
        raise MetadataError(f"{path}: no metadata lines in the file")
    return [parse_line(content, str(path), number) for number, content in enumerate(lines, 1)]


def read_place(folder: Path) -> Metadata:
    """What `metadata.jsonl` of one image folder in GenEval's layout says: one line."""
    lines = read_metadata(folder / "metadata.jsonl")
    if len(lines) > 1:
        raise MetadataError(f"{folder / 'metadata.jsonl'}: one line is expected, not {len(lines)}")
    return lines[0]


def write_metadata(path: str | Path, items: Iterable[Metadata]) -> None:
    """Write metadata as GenEval's jsonl."""
    Path(path).write_text("".join(item.to_json() + "\n" for item in items), encoding="utf-8")


class _Reason(Exception):
    """Why a line is not GenEval's; `parse_line` adds where."""


def _metadata(data: Any) -> Metadata:
    _keys(data, "the line", required={"tag", "include", "prompt"}, optional={"exclude"})
    if data["tag"] not in TASKS:
        raise _Reason(f"tag {data['tag']!r} is none of {', '.join(TASKS)}")
    if not isinstance(data["prompt"], str) or not data["prompt"].strip():
        raise _Reason("'prompt' must be a non-empty string")
    if not writable(data["prompt"]):
        raise _Reason("'prompt' holds half of a character (a lone surrogate)")
    include = _entries(data, "include", optional={"color", "position"})
    if not include:
        raise _Reason("'include' is empty: such a prompt could never fail")
    exclude = _entries(data, "exclude", optional=set())
    return Metadata(data["tag"], include, data["prompt"], exclude)


def _entries(data: dict[str, Any], key: str, optional: set[str]) -> tuple[ObjectSpec, ...]:
    entries = data.get(key, [])
    if not isinstance(entries, list):
        raise _Reason(f"'{key}' must be a list, not {type(entries).__name__}")
    return tuple(_entry(entry, f"{key}[{i}]", i, optional) for i, entry in enumerate(entries))


def _entry(entry: Any, where: str, index: int, optional: set[str]) -> ObjectSpec:
    _keys(entry, where, required={"class", "count"}, optional=optional)
    if not isinstance(entry["class"], str) or not entry["class"]:
        raise _Reason(f"{where}: 'class' must be a non-empty string")
    if not _is_int(entry["count"]) or entry["count"] < 1:
        raise _Reason(f"{where}: 'count' must be an integer of at least 1, not {entry['count']!r}")
    color = entry.get("color")
    if color is not None and color not in COLORS:
        raise _Reason(f"{where}: color {color!r} is none of {', '.join(COLORS)}")
    return ObjectSpec(entry["class"], entry["count"], color, _position(entry, where, index))


def _position(entry: dict[str, Any], where: str, index: int) -> tuple[str, int] | None:
    if "position" not in entry:
        return None
    position = entry["position"]
    if not isinstance(position, list) or len(position) != 2 or not _is_int(position[1]):
        raise _Reason(f"{where}: 'position' must be [relation, index], not {position!r}")
    relation, target = position
    if relation not in RELATIONS:
        raise _Reason(f"{where}: relation {relation!r} is none of {', '.join(RELATIONS)}")
    if not 0 <= target < index:
        raise _Reason(f"{where}: position refers to include[{target}], which does not come before it")
    return relation, target


def _keys(data: Any, where: str, required: set[str], optional: set[str]) -> None:
    if not isinstance(data, dict):
        raise _Reason(f"{where} must be an object, not {type(data).__name__}")
    if missing := sorted(required - data.keys()):
        raise _Reason(f"{where} lacks {', '.join(map(repr, missing))}")
    if unknown := sorted(data.keys() - required - optional):
        valid = ", ".join(sorted(required | optional))
        raise _Reason(f"{where} has unknown key {unknown[0]!r} (valid: {valid})")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
