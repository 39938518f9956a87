"""Feature rows on disk, one file per extractor and process, and the set distances taken from them.

Rows are appended to a flat float32 file, then named in an append-only index: a row that was written
but not named is overwritten at the next start. Reading is by memory map, so 30 000 images a side
need no memory that grows with them (FID) or only blocks of it (KID, CMMD, precision and recall).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .bootstrap import jackknife_interval
from .errors import EvaluationError, IncomparableError, RecordError
from .metrics import FrechetDistance, Moments, cmmd, kernel_inception_distance, precision_recall
from .records import FEATURE, Appender, Record, latest_records, now, read_records, write_atomically
from .textfiles import read_json

Key = tuple[str, int, int]  # configuration (or "reference"), prompt id, sample
_READ = 4096
_FILE = re.compile(r"rank-\d+\.f32")
_AGAIN = "delete this folder and score again"
_GROUPS = 10  # of prompts (or as many as there are), left out in turn for an interval
_QUICK = 4e9  # multiplications of one matrix of distances; ten times as many take about a minute
_RANGE = {
    "fid": (0.0, math.inf),
    "kid": (-math.inf, math.inf),
    "cmmd": (0.0, math.inf),
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
}


def store_path(folder: Path, extractor: str) -> Path:
    return folder / "features" / re.sub(r"[^A-Za-z0-9.@_-]+", "_", extractor)


class FeatureWriter:
    """Appends features of one extractor for one process."""

    def __init__(self, folder: Path, extractor: str, dim: int, rank: int) -> None:
        path = store_path(folder, extractor)
        write_atomically(path / "extractor.json", json.dumps({"name": extractor, "dim": dim}) + "\n")
        self._index = Appender(path / f"rank-{rank:05d}.jsonl")
        self.rows = 1 + max((r["row"] for r in read_records(self._index.path, FEATURE)), default=-1)
        self._fd = os.open(path / f"rank-{rank:05d}.f32", os.O_RDWR | os.O_CREAT, 0o644)
        self._dim = dim
        if os.fstat(self._fd).st_size < self.rows * dim * 4:
            raise RecordError(f"{path}: feature rows are missing; {_AGAIN}")

    def write(self, records: list[Record], features_ND: torch.Tensor) -> None:
        """`records` name the rows: configuration, prompt_id, sample, image_sha256."""
        if features_ND.shape != (len(records), self._dim):
            raise ValueError(f"features must be ({len(records)}, {self._dim}): {tuple(features_ND.shape)}")
        data = features_ND.float().contiguous().numpy().tobytes()
        os.pwrite(self._fd, data, self.rows * self._dim * 4)
        os.fsync(self._fd)
        place = {"file": self._index.path.with_suffix(".f32").name, "time": now()}
        self._index.write(*({**record, **place, "row": self.rows + i} for i, record in enumerate(records)))
        self.rows += len(records)

    def close(self) -> None:
        os.close(self._fd)
        self._index.close()


class FeatureSet:
    """Features of one configuration (or the reference images) from one extractor, in order of their keys."""

    def __init__(
        self, store: Path, configuration: str, keys: Collection[tuple[int, int]] | None = None
    ) -> None:
        header = read_json(store / "extractor.json", RecordError, _AGAIN)
        name, dim = header.get("name"), header.get("dim")
        if not isinstance(name, str) or type(dim) is not int or not 0 < dim < 1 << 20:
            raise RecordError(f"{store / 'extractor.json'}: damaged: no name and dim in it; {_AGAIN}")
        self.extractor, self.dim = name, dim
        self.configuration = configuration
        places: list[tuple[tuple[int, int], str, int]] = []
        hashes = set()
        self.source: str | None = None  # of reference images, the folder's name ...
        self.by_prompt = False  # ... and whether their keys are prompts and samples, or only numbers
        for record in index_records(store):
            key = record["prompt_id"], record["sample"]
            if record["configuration"] == configuration and (keys is None or key in keys):
                hashes.add(record.get("configuration_hash"))
                places.append((key, record["file"], record["row"]))
                self.source, self.by_prompt = record.get("source"), record.get("by_prompt", False)
        if len(hashes) > 1:
            raise IncomparableError(
                f"{store}: features of {configuration!r} come from {len(hashes)} sources; {_AGAIN}"
            )
        if odd := next((place for place in places if not _FILE.fullmatch(place[1]) or place[2] < 0), None):
            raise RecordError(f"{store}: its index names row {odd[2]} of {odd[1]!r}; {_AGAIN}")
        places.sort()
        self.keys = [key for key, _, _ in places]
        self.n = len(places)
        self._paths = [store / name for name in sorted({file for _, file, _ in places})]
        number = {path.name: i for i, path in enumerate(self._paths)}
        self._file = np.array([number[file] for _, file, _ in places], np.int32)
        self._row = np.array([row for _, _, row in places], np.int64)
        for place, path in enumerate(self._paths):
            size = path.stat().st_size if path.is_file() else 0
            if size < (1 + int(self._row[self._file == place].max())) * self.dim * 4:
                raise RecordError(f"{path}: feature rows are missing; {_AGAIN}")

    @property
    def prompts(self) -> int:
        return len({prompt for prompt, _ in self.keys})

    def groups(self, count: int) -> np.ndarray:
        """A group number (N,) below `count` for every row; the images of a prompt share one. None is empty if
        there are at least `count` prompts."""
        prompts, index = np.unique([prompt for prompt, _ in self.keys], return_inverse=True)
        return np.random.default_rng(0).permutation(len(prompts))[index] % count

    def batches(self) -> Iterator[torch.Tensor]:
        maps = [self._map(path) for path in self._paths]
        for start in range(0, self.n, _READ):
            files, rows = self._file[start : start + _READ], self._row[start : start + _READ]
            features = np.empty((len(files), self.dim), np.float32)
            for number in np.unique(files):
                features[files == number] = maps[number][rows[files == number]]
            yield torch.from_numpy(features)

    def _map(self, path: Path) -> np.ndarray:
        whole = path.stat().st_size // (
            self.dim * 4
        )  # a row whose writing was interrupted is named by nobody
        return np.memmap(path, np.float32, "r", shape=(whole, self.dim))

    def array(self, scratch: Path) -> np.ndarray:
        """All rows as one memory-mapped array, gathered into a scratch file."""
        with open(scratch, "wb") as file:
            for batch in self.batches():
                file.write(batch.numpy().tobytes())
        return np.memmap(scratch, np.float32, "r").reshape(-1, self.dim)

    def moments(self, group_N: np.ndarray, count: int) -> list[Moments]:
        """Moments of every group, from one pass."""
        moments = [Moments() for _ in range(count)]
        start = 0
        for batch in self.batches():
            own = group_N[start : start + len(batch)]
            for number in np.unique(own):
                moments[number].update(batch[torch.from_numpy(own == number)])
            start += len(batch)
        return moments


def distances(
    reference: FeatureSet, samples: FeatureSet, scratch: Path, *, paired: bool = False
) -> dict[str, Any]:
    """FID, KID, precision, recall (and CMMD for CLIP features) of `samples` against `reference`.

    `intervals` holds (low, high) by name, from leaving out a tenth of the prompts at a time; None where
    that is not possible, or would take long. `paired`: images of one key come from one prompt.
    A value that cannot be given is None, with the reason under `<name>_reason`. Raises
    `IncomparableError` for features of two extractors, sets of unequal size, or pairs that are none.
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
    if paired and reference.keys != samples.keys:
        raise IncomparableError(
            f"{reference.configuration!r} and {samples.configuration!r} have images of other prompts"
        )
    scratch.mkdir(parents=True, exist_ok=True)
    a, b = reference.array(scratch / "a.f32"), samples.array(scratch / "b.f32")
    # An empty group's replicate would be the value itself: no error where there is one.
    count = max(1, min(_GROUPS, reference.prompts, samples.prompts))
    group_a, group_b = reference.groups(count), samples.groups(count)
    parts_a, parts_b = reference.moments(group_a, count), samples.moments(group_b, count)

    def fid(without: int | None) -> dict[str, float]:
        metric = FrechetDistance()
        for total, parts in ((metric.reference, parts_a), (metric.samples, parts_b)):
            for number, part in enumerate(parts):
                if number != without:
                    total.merge(part)
        return {"fid": metric.compute()}

    def on_sets(
        function: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    ) -> Callable[[int | None], dict[str, float]]:
        def metric(without: int | None) -> dict[str, float]:
            if without is None:
                return function(a, b)
            return function(a[group_a != without], b[group_b != without])

        return metric

    metrics: dict[str, Callable[[int | None], dict[str, float]]] = {
        "fid": fid,
        "kid": on_sets(lambda x, y: {"kid": kernel_inception_distance(x, y, paired=paired).value}),
        "precision": on_sets(lambda x, y: precision_recall(x, y)._asdict()),
    }
    if reference.extractor.startswith("clip:"):
        metrics["cmmd"] = on_sets(lambda x, y: {"cmmd": cmmd(x, y)})
    result: dict[str, Any] = {"extractor": reference.extractor, "n": reference.n, "intervals": {}}
    for name, metric in metrics.items():
        try:
            values = metric(None)
        except (EvaluationError, ValueError) as error:
            for part in ("precision", "recall") if name == "precision" else (name,):
                result |= {part: None, f"{part}_reason": str(error)}
            continue
        result |= values
        quick = name == "fid" or reference.n**2 * reference.dim <= _QUICK
        try:
            left_out = [metric(number) for number in range(count)] if quick and count > 1 else []
        except (EvaluationError, ValueError):
            left_out = []  # enough images for the value, too few for it without a tenth of them
        for key, value in values.items():
            replicates = [part[key] for part in left_out]
            # All alike they say nothing of how far the value is from the next sample's: no certainty.
            varied = bool(replicates) and not np.allclose(replicates, replicates[0], rtol=1e-6, atol=1e-9)
            result["intervals"][key] = (
                jackknife_interval(value, replicates, bounds=_RANGE[key]) if varied else None
            )
    return result


def index_records(store: Path) -> Iterator[Record]:
    """Index records of all processes, of each image the last; `file` and `row` say where it lies."""
    keys = ("configuration", "prompt_id", "sample")
    return latest_records(
        store.glob("rank-*.jsonl"), lambda record: tuple(record[key] for key in keys), FEATURE
    )
