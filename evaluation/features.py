"""Feature rows on disk, one file per extractor and process, and the set distances taken from them.

Rows are appended to a flat float32 file, then named in an append-only index: a row that was written
but not named is overwritten at the next start. Reading is by memory map, so 30 000 images a side
need no memory that grows with them (FID) or only blocks of it (KID, CMMD, precision and recall).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.evaluation.errors import EvaluationError, IncomparableError, RecordError
from accel.evaluation.metrics import (
    FrechetDistance,
    Moments,
    cmmd,
    kernel_inception_distance,
    precision_recall,
)
from accel.evaluation.records import Appender, Record, latest_records, read_records, write_atomically

Key = tuple[str, int, int]  # configuration (or "reference"), prompt id, sample
_READ = 4096


def store_path(folder: Path, extractor: str) -> Path:
    return folder / "features" / re.sub(r"[^A-Za-z0-9.@_-]+", "_", extractor)


class FeatureWriter:
    """Appends features of one extractor for one process."""

    def __init__(self, folder: Path, extractor: str, dim: int, rank: int) -> None:
        path = store_path(folder, extractor)
        write_atomically(path / "extractor.json", json.dumps({"name": extractor, "dim": dim}) + "\n")
        self._index = Appender(path / f"rank-{rank:05d}.jsonl")
        self.rows = 1 + max((record["row"] for record in read_records(self._index.path)), default=-1)
        self._fd = os.open(path / f"rank-{rank:05d}.f32", os.O_RDWR | os.O_CREAT, 0o644)
        self._dim = dim
        if os.fstat(self._fd).st_size < self.rows * dim * 4:
            raise RecordError(f"{path}: feature rows are missing; delete this folder and score again")

    def write(self, records: list[Record], features_ND: torch.Tensor) -> None:
        """`records` name the rows: configuration, prompt_id, sample, image_sha256."""
        if features_ND.shape != (len(records), self._dim):
            raise ValueError(f"features must be ({len(records)}, {self._dim}): {tuple(features_ND.shape)}")
        data = features_ND.float().contiguous().numpy().tobytes()
        os.pwrite(self._fd, data, self.rows * self._dim * 4)
        os.fsync(self._fd)
        place = {"file": self._index.path.with_suffix(".f32").name}
        self._index.write(*({**record, **place, "row": self.rows + i} for i, record in enumerate(records)))
        self.rows += len(records)

    def close(self) -> None:
        os.close(self._fd)
        self._index.close()


class FeatureSet:
    """Features of one configuration (or the reference images) from one extractor."""

    def __init__(
        self, store: Path, configuration: str, keys: Collection[tuple[int, int]] | None = None
    ) -> None:
        header = json.loads((store / "extractor.json").read_text())
        self.extractor, self._dim = header["name"], header["dim"]
        self.configuration = configuration
        self._rows: dict[Path, list[int]] = {}
        hashes = set()
        for record in index_records(store):
            if record["configuration"] != configuration:
                continue
            if keys is not None and (record["prompt_id"], record["sample"]) not in keys:
                continue
            hashes.add(record.get("configuration_hash"))
            self._rows.setdefault(store / record["file"], []).append(record["row"])
        if len(hashes) > 1:
            raise IncomparableError(
                f"{store}: features of {configuration!r} come from {len(hashes)} configurations"
            )
        self.n = sum(map(len, self._rows.values()))

    def batches(self) -> Iterator[torch.Tensor]:
        for path, rows in self._rows.items():
            features = np.memmap(path, np.float32, "r").reshape(-1, self._dim)
            for start in range(0, len(rows), _READ):
                yield torch.from_numpy(np.array(features[rows[start : start + _READ]]))

    def array(self, scratch: Path) -> np.ndarray:
        """All rows as one memory-mapped array, gathered into a scratch file."""
        with open(scratch, "wb") as file:
            for batch in self.batches():
                file.write(batch.numpy().tobytes())
        return np.memmap(scratch, np.float32, "r").reshape(-1, self._dim)

    def moments(self) -> Moments:
        moments = Moments()
        for batch in self.batches():
            moments.update(batch)
        return moments


def distances(reference: FeatureSet, samples: FeatureSet, scratch: Path) -> dict[str, Any]:
    """FID, KID, precision, recall (and CMMD for CLIP features) of `samples` against `reference`.

    A value that cannot be given is None, with the reason under `<name>_reason`. Raises
    `IncomparableError` for features of two extractors or sets of unequal size.
    """
    if reference.extractor != samples.extractor:
        raise IncomparableError(
            f"features of {reference.extractor} and of {samples.extractor} in one distance"
        )
    if reference.n != samples.n:
        raise IncomparableError(
            f"{reference.configuration!r} has {reference.n} images, {samples.configuration!r} {samples.n}: "
            "such distances depend on n, compare equal numbers"
        )
    scratch.mkdir(parents=True, exist_ok=True)
    a, b = reference.array(scratch / "a.f32"), samples.array(scratch / "b.f32")

    def fid() -> dict[str, float]:
        metric = FrechetDistance()
        metric.reference, metric.samples = reference.moments(), samples.moments()
        return {"fid": metric.compute()}

    metrics: dict[str, Callable[[], dict[str, float]]] = {
        "fid": fid,
        "kid": lambda: {"kid": kernel_inception_distance(a, b).value},
        "precision": lambda: precision_recall(a, b)._asdict(),
    }
    if reference.extractor.startswith("clip:"):
        metrics["cmmd"] = lambda: {"cmmd": cmmd(a, b)}
    result: dict[str, Any] = {"extractor": reference.extractor, "n": reference.n}
    for name, metric in metrics.items():
        try:
            result |= metric()
        except (EvaluationError, ValueError) as error:
            result |= {name: None, f"{name}_reason": str(error)}
    return result


def index_records(store: Path) -> Iterator[Record]:
    """Index records of all processes, of each image the last; `file` and `row` say where it lies."""
    keys = ("configuration", "prompt_id", "sample")
    return latest_records(store.glob("rank-*.jsonl"), lambda record: tuple(record[key] for key in keys))
