"""Text and JSON that others wrote: read as what it is, or refused in one line that names the file.

Python's own readers take a byte order mark for a character of the first line, split lines at U+2028, accept
`NaN`, keep the last of two equal keys and give up on deep nesting with a traceback.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from accel import strict

from .errors import EvaluationError, MetadataError

_LINE_END = re.compile(r"\r\n|\r|\n")
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | Path, error: type[EvaluationError] = MetadataError) -> str:
    """The file's text, UTF-8 with or without a byte order mark. `error` names file and byte if it is not."""
    try:
        content = Path(path).read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from reason
    if content.startswith(_WIDE_MARKS):
        raise error(f"{path}: not UTF-8 text but UTF-16 (byte 0); save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(
            f"{path}: not UTF-8 text (byte {reason.start}, 0x{content[reason.start]:02x}, in line "
            f"{len(_LINE_END.findall(content[: reason.start].decode('latin-1'))) + 1}); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise error(f"{path}: not a text file (a zero byte at {content.index(0)})")
    return text


def split_lines(text: str) -> list[str]:
    """Lines as editors end them: CR LF, LF or CR. U+2028, form feeds and the like are part of a line."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def parse_json(text: str | bytes) -> Any:
    """Strict JSON (`accel.strict.parse_json`), from bytes, too.

    Raises:
        ValueError: with a short reason.
    """
    try:
        return strict.parse_json(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as reason:
        raise ValueError(f"not UTF-8 text (byte {reason.start})") from None


def read_json(path: Path, error: type[EvaluationError], cure: str) -> dict[str, Any]:
    """The object in a JSON file of ours; `error` names the file and ends with `cure` if it holds none."""
    try:
        value = parse_json(read_text(path, error))
    except ValueError as reason:
        if isinstance(reason, EvaluationError):
            raise error(f"{reason}; {cure}") from None
        raise error(f"{path}: damaged: {reason}; {cure}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: damaged: an object is expected, not {kind(value)}; {cure}")
    return value


def kind(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def writable(text: str) -> bool:
    """Whether it can be encoded: JSON's escapes can spell half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What an exception says, on one line; its type's name if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
