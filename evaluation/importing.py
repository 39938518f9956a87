"""Score images that exist already: folders in GenEval's layout, or flat folders of pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configurations import Configuration
from .errors import MetadataError, RecordError
from .folder import RunFolder, sample_key
from .geneval.metadata import parse_line
from .geneval.scorer import Detection, Verdict, score
from .records import Appender, rank_and_world
from .suites import Prompt, Suite

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def import_images(path: str | Path, folders: Mapping[str, str | Path]) -> RunFolder:
    """Make (or extend) run folder `path` from existing images, which stay where they are.

    `folders` maps configuration names to image folders; the first is the reference the others are
    paired with. GenEval's layout (`<id>/metadata.jsonl`, `<id>/samples/*.png`) brings prompts along
    and can be judged by a detector; images without metadata, or in a flat folder, are paired by their
    names. Imported images have no timings, so the report shows no speed for them.
    """
    if rank_and_world()[1] > 1:
        raise RecordError(
            "--images is for one process: import and score there, or `accel evaluate score OUT --images ...` "
            "once with nothing else, and launch `score OUT` without --images then"
        )
    listings = {name: list(_listing(Path(source))) for name, source in folders.items()}
    first = next(iter(listings.values()))
    prompts = list({prompt.id: prompt for prompt, _, _ in first}.values())
    described = all(prompt.metadata for prompt in prompts)
    suite = Suite(
        "geneval" if described else "prompts", prompts, {"imported": True, "named_by_file": not described}
    )
    known = {prompt.id: prompt for prompt in suite.prompts}
    for name, listing in listings.items():
        for prompt, _, file in listing:
            if known.get(prompt.id) != prompt:
                raise RecordError(
                    f"{file}: configuration {name!r} has another prompt here than {next(iter(listings))!r}"
                )
    configurations = [
        Configuration(name, method=None if number == 0 else Imported(str(folders[name])))
        for number, name in enumerate(listings)
    ]
    folder = RunFolder(path)
    folder.prepare(suite, {"model": "imported images"}, configurations)
    done = {sample_key(record): record["image_sha256"] for record in folder.samples()}
    with Appender(folder.path / "samples" / "rank-00000.jsonl") as records:
        for configuration in configurations:
            for prompt, sample, file in listings[configuration.name]:
                content = file.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                if done.get((configuration.name, prompt.id, sample)) == digest:
                    continue
                records.write(
                    {
                        "prompt_id": prompt.id,
                        "sample": sample,
                        "prompt": prompt.text,
                        "seed": None,
                        "image": str(file.resolve()),
                        "image_sha256": digest,
                        "image_bytes": len(content),
                        "configuration": configuration.name,
                        "configuration_hash": configuration.hash,
                        "session": None,
                    }
                )
    return folder


def _listing(folder: Path) -> Iterator[tuple[Prompt, int, Path]]:
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such image folder")
    in_layout = sorted(samples.parent for samples in folder.glob("*/samples"))
    found = False
    for number, place in enumerate(in_layout):
        metadata, parsed = place / "metadata.jsonl", None
        if metadata.exists():
            parsed = parse_line(metadata.read_text(encoding="utf-8").strip(), str(metadata), 1)
        prompt_id = int(place.name) if place.name.isdigit() else number
        prompt = Prompt(prompt_id, parsed.prompt if parsed else place.name, parsed)
        for sample, file in enumerate(_pictures(place / "samples")):
            found = True
            yield prompt, sample, file
    if not in_layout:
        for number, file in enumerate(_pictures(folder)):
            found = True
            yield Prompt(number, file.stem), 0, file
    if not found:
        raise RecordError(f"{folder}: no images, neither directly nor as <id>/samples/*.png")


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)


@dataclass(frozen=True)
class Imported:
    """Stands for "whatever made these images" where a method's config would be."""

    folder: str


def official_results(path: str | Path) -> Iterator[Verdict]:
    """Stream the verdicts in the official GenEval tool's results file (one JSON object per image)."""
    for number, row in _official_rows(path):
        try:
            yield Verdict(bool(row["correct"]), row.get("reason", ""), row["tag"], row["prompt"])
        except KeyError as error:
            raise _not_official(path, number, error) from None


def same_rules(path: str | Path) -> dict[str, Any]:
    """Judge the official detector's boxes, where the results file holds them, by our rules.

    Returns how many `images` could be judged, how many verdicts `agree`, and the files where they do
    not. Prompts with colours are left out: the file does not hold what colour the tool saw.
    """
    images, differing = 0, []
    for number, row in _official_rows(path):
        if "details" not in row or "metadata" not in row:
            continue
        try:
            metadata = parse_line(row["metadata"], str(path), number)
            detections = [
                Detection(label, box[4], tuple(box[:4]))
                for label, boxes in json.loads(row["details"]).items()
                for box in boxes
            ]
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise _not_official(path, number, error) from None
        if any(spec.color for spec in metadata.include):
            continue
        images += 1
        if score(detections, metadata).correct != bool(row["correct"]):
            differing.append(row.get("filename", f"line {number}"))
    return {"images": images, "agree": images - len(differing), "differing": differing}


def _official_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError("not a JSON object")
                yield number, row
    except OSError as error:
        raise MetadataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise _not_official(path, number, error) from None


def _not_official(path: str | Path, number: int, error: Exception) -> MetadataError:
    return MetadataError(f"{path}, line {number}: not a line of GenEval's results: {error!r}")
