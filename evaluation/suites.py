"""Suites: a named set of prompts. What judges their images is looked up by the suite's name in `score`."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from .errors import AccelWarning, EvaluationError, MetadataError
from .geneval.metadata import Metadata, parse_line, read_metadata
from .textfiles import kind, parse_json, read_text, split_lines, writable


@dataclass(frozen=True)
class Prompt:
    """One prompt; `id` is its line in the suite, and stays the same under `--limit`."""

    id: int
    text: str
    metadata: Metadata | None = None

    def to_json(self) -> str:
        metadata = self.metadata.to_dict() if self.metadata else None
        return json.dumps({"id": self.id, "prompt": self.text, "metadata": metadata})

    @classmethod
    def from_json(cls, text: str, source: str, line: int) -> Prompt:
        """`ValueError` for what `to_json` has not written."""
        data = parse_json(text)
        if not isinstance(data, dict):
            raise ValueError(f"an object is expected, not {kind(data)}")
        number, prompt, metadata = data.get("id"), data.get("prompt"), data.get("metadata")
        if type(number) is not int or not isinstance(prompt, str):
            raise ValueError("'id' must be an integer and 'prompt' a string")
        parsed = parse_line(json.dumps(metadata), source, line) if metadata else None
        return cls(number, prompt, parsed)


@dataclass(frozen=True)
class Suite:
    """`name` (scenes, geneval or prompts), the options it was made with, and its prompts."""

    name: str
    prompts: Sequence[Prompt]
    options: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256("".join(prompt.to_json() for prompt in self.prompts).encode()).hexdigest()
        return {"name": self.name, **self.options, "prompts": len(self.prompts), "sha256": digest[:16]}


def scenes(split: str = "test", per_task: int = 36, seed: int = 0) -> Suite:
    """The built-in world's prompts: six tasks, `split="test"` are combinations no training has seen."""
    from . import scenes as world

    lines = world.prompts(split, per_task, seed)
    return Suite("scenes", _numbered(lines), {"split": split, "per_task": per_task, "seed": seed})


def geneval(path: str | Path) -> Suite:
    """GenEval's prompts from its metadata file (not shipped; github.com/djghosh13/geneval, `prompts/`)."""
    return Suite("geneval", _numbered(read_metadata(path)), {"file": Path(path).name})


def prompt_file(path: str | Path) -> Suite:
    """Your own prompts: a text file, one a line, or JSON lines that all are objects with "prompt".

    Judged by comparison with the plain pipeline only.
    """
    lines = [(i, line.strip()) for i, line in enumerate(split_lines(read_text(path)), 1) if line.strip()]
    if not lines:
        raise MetadataError(f"{path}: no prompts in the file")
    texts = _prompts_of_objects(path, lines) or [line for _, line in lines]
    prompts = [Prompt(number, text) for number, text in enumerate(texts)]
    return Suite("prompts", prompts, {"file": Path(path).name})


def _prompts_of_objects(path: str | Path, lines: Sequence[tuple[int, str]]) -> list[str] | None:
    """Prompts of JSON lines; None if it is plain text. What is neither all one nor all the other is refused."""
    texts, problem, unused = [], "", dict[str, None]()
    for number, line in lines:
        try:
            value = parse_json(line)
            text = value["prompt"] if isinstance(value, dict) else None
            reason = 'not an object with a string "prompt"'
        except (ValueError, KeyError) as error:
            text, reason = None, f'not an object with a string "prompt" ({error})'
        if isinstance(text, str) and text.strip() and writable(text):
            texts.append(text.strip())
            unused |= dict.fromkeys(key for key in value if key != "prompt")
        elif not problem:
            problem = f"{path}, line {number}: {reason}"
    if problem and (texts or Path(path).suffix.lower() in (".jsonl", ".ndjson", ".json")):
        raise MetadataError(f"{problem}; in a prompt file every line is one, or none")
    if unused and not problem:
        warnings.warn(
            f'{path}: only "prompt" is used of its lines, not {", ".join(map(repr, unused))} (for GenEval\'s '
            "metadata: --suite geneval --metadata FILE)",
            AccelWarning,
            stacklevel=3,
        )
    return None if problem else texts


def load(spec: str, *, metadata: str | Path | None = None, per_task: int = 36, seed: int = 0) -> Suite:
    """`scenes`, `geneval` (needs `metadata`) or the path of a prompt file."""
    if spec == "scenes":
        return scenes(per_task=per_task, seed=seed)
    if spec == "geneval":
        if metadata is None:
            raise EvaluationError(
                "the geneval suite needs --metadata PATH: evaluation_metadata.jsonl from "
                "github.com/djghosh13/geneval (folder prompts/); it is not ours to ship"
            )
        return geneval(metadata)
    if Path(spec).is_file():
        return prompt_file(spec)
    raise EvaluationError(f"unknown suite {spec!r}: neither scenes nor geneval nor a prompt file that exists")


def take(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts, tasks in turn, so that a small limit still holds every task.

    A larger limit begins with a smaller one, so a run can be extended and its batches stay the same.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be at least 1, not {limit}")
    tasks: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.metadata.tag if prompt.metadata else "", []).append(prompt)
    in_turn = (prompt for row in zip_longest(*tasks.values()) for prompt in row if prompt is not None)
    return list(islice(in_turn, limit))


def _numbered(lines: Sequence[Metadata]) -> list[Prompt]:
    return [Prompt(number, line.prompt, line) for number, line in enumerate(lines)]
