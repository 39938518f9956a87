"""Score images that exist already: folders in GenEval's layout, or flat folders of pictures."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configurations import Configuration
from .errors import AccelWarning, MetadataError, PictureError, RecordError
from .folder import RunFolder, sample_key
from .geneval.metadata import TASKS, Metadata, parse_line, read_place
from .geneval.scorer import Detection, Verdict, score
from .picture_files import left_out, load_picture, picture_files, picture_hash
from .records import Appender, LaunchLock, now, rank_and_world
from .suites import Prompt, Suite
from .textfiles import kind, parse_json, read_text, split_lines

Key = tuple[str, str]  # image folder in GenEval's layout (flat: empty), name of the picture


@dataclass(frozen=True)
class _Picture:
    file: Path
    text: str  # stands for the prompt where there is no metadata
    metadata: Metadata | None


def import_images(path: str | Path, folders: Mapping[str, str | Path]) -> RunFolder:
    """Make (or extend) run folder `path` from existing images, which stay where they are.

    `folders` maps configuration names to image folders; the first is the reference the others are
    paired with. GenEval's layout (`<id>/metadata.jsonl`, `<id>/samples/*.png`) brings prompts along
    and can be judged by a detector. Pictures are paired by their names (in that layout, by the numbers of folder
    and sample), whatever their order: what only one of two folders has is named and left out, as is what cannot be
    read. Imported images have no timings, so the report shows no speed for them.
    """
    if rank_and_world()[1] > 1:
        raise RecordError(
            "--images is for one process: import and score there, or `accel evaluate score OUT --images ...` "
            "once with nothing else, and launch `score OUT` without --images then"
        )
    listings = {name: _listing(Path(source).expanduser()) for name, source in folders.items()}
    plain = next(iter(listings))
    places = _places(listings[plain])
    suite = _suite(listings[plain], places)
    prompts = {prompt.id: prompt for prompt in suite.prompts}
    configurations = [
        Configuration(name, method=None if number == 0 else Imported(str(folders[name])))
        for number, name in enumerate(listings)
    ]
    for name, listing in listings.items():
        _check_pairs(plain, listings[plain], name, listing)
    folder, settings = RunFolder(path), {"model": "imported images"}
    folder.check(suite, settings, configurations)
    with (
        LaunchLock(folder.path / "sessions", 1),
        Appender(folder.path / "samples" / "rank-00000.jsonl") as records,
    ):
        folder.prepare(suite, settings, configurations)
        done = {sample_key(record): record["image_sha256"] for record in folder.samples()}
        for configuration in configurations:
            listing, readable = listings[configuration.name], 0
            for key in sorted(listing.keys() & places.keys(), key=lambda key: places[key]):
                prompt_id, sample = places[key]
                file = listing[key].file
                try:
                    digest = picture_hash(file)
                    if done.get((configuration.name, prompt_id, sample)) != digest:
                        load_picture(
                            file, digest
                        )  # what cannot be read has no record, and is named here, once
                        records.write(_record(configuration, prompts[prompt_id], sample, file, digest))
                    readable += 1
                except PictureError as error:
                    left_out(error)
            if not readable:
                raise RecordError(f"{folders[configuration.name]}: none of its pictures can be read")
    return folder


def _record(
    configuration: Configuration, prompt: Prompt, sample: int, file: Path, digest: str
) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "sample": sample,
        "prompt": prompt.text,
        "seed": None,
        "image": str(file.resolve()),
        "image_sha256": digest,
        "image_bytes": file.stat().st_size,
        "configuration": configuration.name,
        "configuration_hash": configuration.hash,
        "session": None,
        "time": now(),
    }


def _listing(folder: Path) -> dict[Key, _Picture]:
    """The folder's pictures by what they are paired by."""
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such image folder")
    found: dict[Key, _Picture] = {}
    in_layout = sorted(place.parent for place in folder.glob("[!.]*/samples") if place.is_dir())
    for place in in_layout:
        metadata = read_place(place) if (place / "metadata.jsonl").exists() else None
        for file in picture_files(place / "samples"):
            text = metadata.prompt if metadata else _composed(place.name)
            _add(found, (_number(place.name), _number(file.stem)), _Picture(file, text, metadata))
    if not in_layout:
        for file in picture_files(folder):
            _add(found, ("", _composed(file.stem)), _Picture(file, _composed(file.stem), None))
    if not found:
        raise RecordError(f"{folder}: no images, neither directly nor as <id>/samples/*.png")
    return found


def _add(found: dict[Key, _Picture], key: Key, picture: _Picture) -> None:
    if key in found:
        left_out(PictureError(f"{picture.file}: has the same name as {found[key].file.name}"))
    else:
        found[key] = picture


def _composed(name: str) -> str:
    """macOS writes ä as a and two dots, others as one character: the same name."""
    return unicodedata.normalize("NFC", name)


def _number(name: str) -> str:
    """00001 as 1: GenEval's own tool and ours write numbers with different widths."""
    return str(int(name)) if _is_number(name) else _composed(name)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _places(listing: Mapping[Key, _Picture]) -> dict[Key, tuple[int, int]]:
    """Prompt id and sample number of every picture, names that are numbers in their order.

    In GenEval's layout the folders' numbers are the ids, if all have one.
    """

    def order(name: str) -> tuple[int, int, str]:
        return (0, int(name), name) if _is_number(name) else (1, 0, name)

    flat = not any(place for place, _ in listing)
    numbered = not flat and all(_is_number(place) for place, _ in listing)
    places: dict[Key, tuple[int, int]] = {}
    ids: dict[str, int] = {}
    samples: dict[str, int] = {}
    for place, name in sorted(listing, key=lambda key: (order(key[0]), order(key[1]))):
        group = name if flat else place
        prompt_id = ids.setdefault(group, int(group) if numbered else len(ids))
        places[place, name] = prompt_id, samples.get(group, 0)
        samples[group] = samples.get(group, 0) + 1
    return places


def _suite(listing: Mapping[Key, _Picture], places: Mapping[Key, tuple[int, int]]) -> Suite:
    by_id: dict[int, Prompt] = {}
    for key, (prompt_id, _) in places.items():
        by_id.setdefault(prompt_id, Prompt(prompt_id, listing[key].text, listing[key].metadata))
    prompts: Sequence[Prompt] = [by_id[number] for number in sorted(by_id)]
    described = all(prompt.metadata for prompt in prompts)
    return Suite(
        "geneval" if described else "prompts", prompts, {"imported": True, "named_by_file": not described}
    )


def _check_pairs(
    plain: str, reference: Mapping[Key, _Picture], name: str, listing: Mapping[Key, _Picture]
) -> None:
    """Name what has no partner; `RecordError` if nothing has, or if partners are of different prompts."""
    common = reference.keys() & listing.keys()
    if not common:
        mine, theirs = (next(iter(pictures.values())).file.name for pictures in (listing, reference))
        raise RecordError(
            f"no picture of {name!r} has the name of one of {plain!r} ({mine}, {theirs}): nothing to compare; "
            "rename them alike, or give one folder as --reference"
        )
    for key in sorted(common):
        own, other = listing[key].metadata, reference[key].metadata
        if own and other and own != other:
            raise RecordError(f"{listing[key].file}: {name!r} has another prompt here than {plain!r}")
    missing = [picture.file.name for key, picture in sorted(reference.items()) if key not in common]
    extra = [picture.file.name for key, picture in sorted(listing.items()) if key not in common]
    said = [f"lacks {_some(missing)} of {plain!r}"] if missing else []
    said += [f"has {_some(extra)} that {plain!r} has not"] if extra else []
    if said:
        warnings.warn(
            f"{name!r} {' and '.join(said)}; left out, the other {len(common)} are paired by name",
            AccelWarning,
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    """`5 pictures (a.png, b.png, c.png, ...)`"""
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} picture{'s' * (len(names) > 1)} ({first})"


@dataclass(frozen=True)
class Imported:
    """Stands for "whatever made these images" where a method's config would be."""

    folder: str


def official_results(path: str | Path) -> Iterator[Verdict]:
    """Stream the verdicts in the official GenEval tool's results file (one JSON object per image)."""
    for number, row in _official_rows(path):
        reason, tag, prompt = row.get("reason", ""), row.get("tag"), row.get("prompt")
        if not (isinstance(reason, str) and isinstance(tag, str) and isinstance(prompt, str)):
            raise _not_official(path, number, "'tag', 'prompt' and 'reason' must be strings")
        if tag not in TASKS:
            raise _not_official(path, number, f"tag {tag!r} is none of {', '.join(TASKS)}")
        yield Verdict(_correct(path, number, row), reason, tag, prompt)


def same_rules(path: str | Path) -> dict[str, Any]:
    """Judge the official detector's boxes, where the results file holds them, by our rules.

    Returns how many `images` could be judged, how many verdicts `agree`, and the files where they do
    not. Prompts with colours are left out: the file does not hold what colour the tool saw.
    """
    images, differing = 0, []
    for number, row in _official_rows(path):
        if "details" not in row or "metadata" not in row:
            continue
        if not isinstance(row["metadata"], str) or not isinstance(row["details"], str):
            raise _not_official(path, number, "'metadata' and 'details' must be strings that hold JSON")
        metadata = parse_line(row["metadata"], str(path), number)
        try:
            detections = list(_detections(parse_json(row["details"])))
        except ValueError as error:
            raise _not_official(path, number, str(error)) from None
        if any(spec.color for spec in metadata.include):
            continue
        images += 1
        if score(detections, metadata).correct != _correct(path, number, row):
            differing.append(str(row.get("filename", f"line {number}")))
    return {"images": images, "agree": images - len(differing), "differing": differing}


def _detections(details: Any) -> Iterator[Detection]:
    """From `{class: [[x0, y0, x1, y1, confidence], ...]}`."""
    if not isinstance(details, dict) or not all(isinstance(boxes, list) for boxes in details.values()):
        raise ValueError("'details' must hold a list of boxes by class")
    for label, boxes in details.items():
        for box in boxes:
            numbers = isinstance(box, list) and all(type(edge) in (int, float) for edge in box)
            if not numbers or len(box) != 5:
                raise ValueError(f"a box of {label!r} is not five numbers: {box!r}")
            x0, y0, x1, y1, confidence = map(float, box)
            yield Detection(label, confidence, (x0, y0, x1, y1))


def _official_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(split_lines(read_text(path)), 1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise _not_official(path, number, str(error)) from None
        if not isinstance(row, dict):
            raise _not_official(path, number, f"an object is expected, not {kind(row)}")
        yield number, row


def _correct(path: str | Path, number: int, row: dict[str, Any]) -> bool:
    if row.get("correct") not in (True, False):  # numpy writes 0 and 1, which are equal to these
        raise _not_official(path, number, f"'correct' must be true or false, not {row.get('correct')!r}")
    return bool(row["correct"])


def _not_official(path: str | Path, number: int, reason: str) -> MetadataError:
    return MetadataError(f"{path}, line {number}: not a line of GenEval's results: {reason}")
