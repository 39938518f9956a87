"""YAML and JSON that come from outside, read strictly, and JSON that every parser takes.

The parsers' own leniency is where surprises come from: of two keys with one name the last wins, aliases make a
kilobyte into gigabytes, deep nesting ends in a RecursionError, `NaN` is written although JSON has no such thing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 1 << 20  #: of a YAML file; a preset has 300
MAX_DEPTH = 20  #: levels of nesting of YAML; a preset has 2


class StrictError(ValueError):
    """The text is refused; the message says why, and on which line where that is known."""


def read_text(path: Path, limit: int | None = None) -> str:
    """UTF-8 text of a file, without a byte order mark.

    Args:
        limit: of its length in bytes, so that `/dev/zero` ends, too.

    Raises:
        OSError: it cannot be read.
        StrictError: longer than the limit, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise StrictError(f"is longer than {limit} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StrictError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error


def parse_yaml(text: str) -> Any:
    """One YAML document of plain values: `yaml.safe_load` without aliases, repeated keys and deep nesting.

    Raises:
        StrictError: not YAML, or one of those.
    """
    import yaml

    try:
        _check_events(text)
        return yaml.load(text, _loader())
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise StrictError(f"not valid YAML: {line}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise StrictError(f"not valid YAML: {' '.join(str(error).split())}") from error


def parse_json(text: str) -> Any:
    """`json.loads` that refuses repeated keys, NaN and infinity, and does not fail otherwise than by `StrictError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise StrictError(f"key {twice!r} is given twice{_lines_of(twice, text)}")
        return found

    try:
        return json.loads(
            text, object_pairs_hook=unique, parse_constant=_refuse_constant, parse_float=_finite_number
        )
    except StrictError:
        raise
    except RecursionError as error:
        raise StrictError("not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise StrictError(f"not JSON ({error})") from error


def _refuse_constant(name: str) -> NoReturn:
    raise StrictError(f"{name} is no JSON number")


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictError(f"{text} is too large a number")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        StrictError: as `parse_json`; or it holds something else than an object.
    """
    found = parse_json(read_text(path))
    if not isinstance(found, dict):
        raise StrictError(f"expected a JSON object, got {type(found).__name__}")
    return found


def dump_json(value: Any) -> str:
    """Indented JSON; what is not a finite number becomes null, for which JSON has no other word."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _lines_of(key: str, text: str) -> str:
    """Where a key stands, as far as text alone can say (the decoder does not)."""
    found = re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)
    lines = [text.count("\n", 0, match.start()) + 1 for match in found]
    return f" (lines {', '.join(map(str, lines))})" if len(lines) > 1 else ""


def _check_events(text: str) -> None:
    """Before anything is built: the parser is a loop, what composes its events recurses and multiplies."""
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            raise StrictError(f"line {line}: aliases (*{event.anchor}) are refused; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise StrictError(f"line {line}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _loader() -> Any:
    """A SafeLoader whose errors in values name the line, too."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise StrictError(
                        f"line {line}: key {key.value!r} is given twice, first on line {seen[key.value]}"
                    )
                if isinstance(key, yaml.ScalarNode):
                    seen[key.value] = line
            return super().construct_mapping(node, deep)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (StrictError, yaml.YAMLError):
                raise
            except Exception as error:  # a constructor raises what its text makes int(), date(), … raise
                line = node.start_mark.line + 1
                raise StrictError(f"line {line}: not a value that can be read ({error})") from error

    return Loader
