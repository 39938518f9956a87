"""Stage `score`: judge every recorded image, append value and reason per image. Resumable.

A score is tied to the hashes of the images it was taken from: an image that was made again is
scored again, everything else is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import EvaluationError, PictureError, RecordError
from .extractors import Extractor
from .features import FeatureWriter, index_records, store_path
from .folder import RunFolder, sample_key
from .picture_files import SUFFIXES, left_out, load_picture, picture_files, picture_hash
from .records import Appender, Record, now, rank_and_world, write_atomically
from .scorers import Scorer
from .suites import Prompt

GROUND_TRUTH = "ground-truth"  # folder in a run's: a drawn picture of every prompt and sample
REFERENCE = "reference"  # stands where a configuration's name would: the images of a reference folder


def score(
    path: str | Path,
    scorers: Sequence[Scorer],
    extractors: Sequence[Extractor] = (),
    *,
    reference: str | Path | None = None,
    bounds: Callable[[Sequence[Prompt]], dict[str, Any]] | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> RunFolder:
    """Score what is not scored yet in run folder `path`.

    Args:
        scorers: per-image metrics (`accel.evaluation.scorers`).
        extractors: features for FID, KID, CMMD, precision and recall.
        reference: folder of reference images for those distances, besides the plain configuration.
        bounds: gives ceiling and floor of the suite's score for the run's prompts.
        progress: called with (images done, images to do) of this process.
    """
    folder = RunFolder(path)
    plain, prompts = folder.plain, folder.prompts()
    if folder.settings.get("sampled"):
        # Drawn tokens: the same seed may give another image that is as good. A distance between the two says
        # nothing; sets of images can be compared.
        scorers = [scorer for scorer in scorers if not scorer.paired]
    rank, world, _ = rank_and_world()
    if not (folder.path / "samples").is_dir():
        raise RecordError(f"{folder.path}: nothing to score yet; `accel evaluate run` comes first")
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1, not {batch_size}")
    references = reference_images(Path(reference)) if reference is not None else []
    plain_images, total = {}, 0
    for record in folder.known_samples(prompts):
        total += 1
        if record["configuration"] == plain:
            key = record["prompt_id"], record["sample"]
            plain_images[key] = record["image"], record["image_sha256"]
    done = {(*sample_key(r), r["metric"]): (r["image_sha256"], r.get("against")) for r in folder.scores()}
    with Appender(folder.path / "scores" / f"rank-{rank:05d}.jsonl") as scores:
        if bounds and rank == 0:
            write_bounds(folder, bounds)
        writers = [_Features(folder.path, extractor, rank) for extractor in extractors]
        try:
            seen = 0
            images = -(-total // world) + len(references[rank::world]) * len(writers)
            for batch in _batches(folder, rank, world, batch_size):
                todo = [_missing(batch, scorer, plain, plain_images, done) for scorer in scorers]
                _score_batch(folder, batch, todo, scorers, writers, prompts, plain_images, scores)
                seen += len(batch)
                if progress:
                    progress(seen, images)
            drawn = (
                reference is not None and Path(reference).resolve() == folder.path.resolve() / GROUND_TRUTH
            )
            mine = list(enumerate(references))[rank::world]
            for writer in writers:
                usable = 0
                for start in range(0, len(mine), batch_size):
                    part = mine[start : start + batch_size]
                    usable += writer.add_reference(Path(reference or ""), part, by_prompt=drawn)
                    seen += len(part)
                    if progress:
                        progress(seen, images)
                if mine and not usable:
                    raise RecordError(f"{reference}: none of {len(mine)} reference images can be read")
        finally:
            for writer in writers:
                writer.close()
    return folder


def write_bounds(folder: RunFolder, bounds: Callable[[Sequence[Prompt]], dict[str, Any]]) -> None:
    """Ceiling and floor over the prompts that were run, kept as long as those stay the same."""
    used = {record["prompt_id"] for record in folder.samples()}
    prompts = [prompt for number, prompt in sorted(folder.prompts().items()) if number in used]
    identity = hashlib.sha256("".join(prompt.to_json() for prompt in prompts).encode()).hexdigest()
    if (folder.bounds or {}).get("prompts_sha256") == identity:
        return
    content = json.dumps({**bounds(prompts), "prompts_sha256": identity}, indent=2, allow_nan=False)
    write_atomically(folder.path / "scores" / "bounds.json", content + "\n")


def reference_images(source: Path) -> list[Path]:
    """Reference images; `RecordError` before anything is scored if there are none."""
    files = picture_files(source, deep=True)
    if not files:
        raise RecordError(f"{source}: no reference images (a folder with pictures: {', '.join(SUFFIXES)})")
    return files


def _batches(folder: RunFolder, rank: int, world: int, size: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for number, record in enumerate(folder.samples()):
        if number // size % world == rank:
            batch.append(record)
        if batch and (number + 1) % size == 0:
            yield batch
            batch = []
    if batch:
        yield batch


def _missing(
    batch: Sequence[Record], scorer: Scorer, plain: str, plain_images: dict, done: dict
) -> set[tuple[str, int, int]]:
    """Keys of the batch that `scorer` has still to judge."""
    missing = set()
    for record in batch:
        against = plain_images.get((record["prompt_id"], record["sample"]), (None, None))[1]
        if scorer.paired and (record["configuration"] == plain or against is None):
            continue
        expected = (record["image_sha256"], against if scorer.paired else None)
        if done.get((*sample_key(record), scorer.metric)) != expected:
            missing.add(sample_key(record))
    return missing


def _score_batch(
    folder: RunFolder,
    batch: Sequence[Record],
    todo: Sequence[set[tuple[str, int, int]]],
    scorers: Sequence[Scorer],
    writers: Sequence[_Features],
    prompts: dict[int, Prompt],
    plain_images: dict[tuple[int, int], tuple[str, str]],
    scores: Appender,
) -> None:
    wanted = [
        r for r in batch if any(sample_key(r) in keys for keys in todo) or any(w.wants(r) for w in writers)
    ]
    images: dict[tuple[str, int, int], torch.Tensor] = {}
    for record in wanted:
        image = _image_or_warning(folder.path / record["image"], record["image_sha256"])
        if image is not None:
            images[sample_key(record)] = image
    for scorer, keys in zip(scorers, todo, strict=True):
        groups: dict[tuple[int, ...], list[tuple[Record, torch.Tensor | None]]] = {}
        for record in wanted:
            if sample_key(record) not in keys or sample_key(record) not in images:
                continue
            plain = None
            if scorer.paired:
                file, sha256 = plain_images[record["prompt_id"], record["sample"]]
                plain = _image_or_warning(folder.path / file, sha256)
                if plain is None:
                    continue
            shape = (*images[sample_key(record)].shape, *(plain.shape if plain is not None else ()))
            groups.setdefault(shape, []).append((record, plain))
        for members in groups.values():
            stacked = torch.stack([images[sample_key(record)] for record, _ in members])
            plains = [plain for _, plain in members if plain is not None]
            texts = [prompts[record["prompt_id"]] for record, _ in members]
            parts = scorer(stacked, torch.stack(plains) if scorer.paired else None, texts)
            scores.write(
                *(
                    _score_record(r, scorer, part, plain_images)
                    for (r, _), part in zip(members, parts, strict=True)
                )
            )
    for writer in writers:
        writer.add([record for record in wanted if writer.wants(record)], images)


def _score_record(record: Record, scorer: Scorer, part: dict[str, Any], plain_images: dict) -> Record:
    names = ("configuration", "configuration_hash", "prompt_id", "sample", "prompt", "image_sha256")
    against = {}
    if scorer.paired:
        against = {"against": plain_images[record["prompt_id"], record["sample"]][1]}
    direction = {"higher_is_better": scorer.higher_is_better}
    about = {name: record[name] for name in names}
    return {**about, "metric": scorer.metric, **direction, **against, **part, "time": now()}


def _image_or_warning(file: Path, sha256: str) -> torch.Tensor | None:
    try:
        return load_picture(file, sha256)
    except PictureError as error:
        left_out(error, ". `accel evaluate run --verify` makes it again, `score --images` reads it anew")
        return None


class _Features:
    """One extractor's missing rows of this process."""

    def __init__(self, folder: Path, extractor: Extractor, rank: int) -> None:
        self._extractor = extractor
        store = store_path(folder, extractor.name)
        self._done = {(*sample_key(r), r["image_sha256"]) for r in index_records(store)}
        self._writer = FeatureWriter(folder, extractor.name, extractor.dim, rank)

    def wants(self, record: Record) -> bool:
        return (*sample_key(record), record["image_sha256"]) not in self._done

    def add(self, records: Sequence[Record], images: dict[tuple[str, int, int], torch.Tensor]) -> None:
        by_shape: dict[tuple[int, ...], list[Record]] = {}
        for record in records:
            if sample_key(record) in images:
                by_shape.setdefault(images[sample_key(record)].shape, []).append(record)
        names = ["configuration", "configuration_hash", "prompt_id", "sample", "image_sha256"]
        names += ["source", "by_prompt"]  # of reference images only
        for members in by_shape.values():
            features = self._extractor(torch.stack([images[sample_key(record)] for record in members]))
            rows = [{name: record[name] for name in names if name in record} for record in members]
            self._writer.write(rows, features)

    def add_reference(self, source: Path, files: Sequence[tuple[int, Path]], *, by_prompt: bool) -> int:
        """How many have features now; what cannot be read is named and left out.

        `by_prompt`: the files are named by the prompt and sample they are a picture of.
        """
        # Ground truth lies in the run folder, which may be moved: it stays the same source.
        identity = GROUND_TRUTH if by_prompt else str(source.resolve())
        records, images, usable = [], {}, 0
        for number, file in files:
            prompt_id, sample = map(int, file.stem.split("-")) if by_prompt else (number, 0)
            record: Record = {
                "configuration": REFERENCE,
                "configuration_hash": hashlib.sha256(identity.encode()).hexdigest()[:12],
                "prompt_id": prompt_id,
                "sample": sample,
                "by_prompt": by_prompt,
                "source": source.name,
            }
            try:
                record["image_sha256"] = picture_hash(file)
                if self.wants(record):
                    images[sample_key(record)] = load_picture(file, record["image_sha256"])
                    records.append(record)
                usable += 1
            except PictureError as error:
                left_out(error)
        self.add(records, images)
        return usable

    def close(self) -> None:
        self._writer.close()
