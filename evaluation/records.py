"""Append-only records on disk that survive `kill -9`, and the rank that writes them.

One JSON object per line, one file per process. A record is written with a single `write` and synced
before the next sample starts, so at most the last line of a file can be incomplete; it is cut off at
the next start and its sample redone. A later record replaces an earlier one of the same key, whoever wrote it:
which is later is told by the records' `time`, and within one file by their order.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import NoneType
from typing import Any

from .errors import AccelWarning, RecordError
from .textfiles import kind, parse_json

Record = dict[str, Any]

#: Names and types of what is read from a record; with `NoneType` it may be missing.
Shape = Mapping[str, tuple[type, ...]]
NUMBER = (int, float, NoneType)
_IMAGE: Shape = {"configuration": (str,), "prompt_id": (int,), "sample": (int,), "image_sha256": (str,)}
SAMPLE: Shape = {
    **_IMAGE,
    **dict.fromkeys(("configuration_hash", "prompt", "image"), (str,)),
    **dict.fromkeys(("seconds", "denoiser_seconds", "peak_bytes"), NUMBER),
    "image_bytes": (int,),
    "peak_kind": (str, NoneType),
    "session": (str, NoneType),
}
SCORE: Shape = {
    **_IMAGE,
    "metric": (str,),
    "higher_is_better": (bool,),
    "value": NUMBER,
    "reason": (str,),
    "tag": (str, NoneType),
}
FEATURE: Shape = {
    **_IMAGE,
    "file": (str,),
    "row": (int,),
    **dict.fromkeys(("configuration_hash", "source"), (str, NoneType)),
    "by_prompt": (bool, NoneType),
}
SESSION: Shape = {
    **dict.fromkeys(("session", "time", "python", "platform", "device"), (str,)),
    **dict.fromkeys(("git", "cuda", "dtype"), (str, NoneType)),
    **dict.fromkeys(("world", "threads"), (int,)),
    "cpus": (int, NoneType),
    "versions": (dict,),
    "command": (list,),
}

# (rank, world size, local rank) as set by torchrun and `accelerate launch`, Open MPI, Intel MPI/MPICH.
_RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def rank_and_world() -> tuple[int, int, int]:
    """This process's (rank, number of processes, rank on this machine); (0, 1, 0) when not launched.

    Read from the environment only: the stages need no process group, so a rank that dies does not
    make the others wait, and can be started again alone.
    """
    for rank, world, local in _RANK_VARIABLES:
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world]), int(os.environ.get(local, 0))
    return 0, 1, 0


class Appender:
    """Appends records to one file, which it locks against a second process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise RecordError(f"{path}: another process is writing here") from None
        _cut_incomplete_line(self._fd, path)

    def write(self, *records: Record) -> None:
        """Append records together: one write, then a sync."""
        data = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        while data:  # a short write is completed; if we are killed in between, the rest is cut off
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LaunchLock:
    """Held by every process of a start: no second start with another number of processes in one folder.

    Two starts with the same number meet at their first ranks' files, which `Appender` locks. They share the work
    out by rank and number; with two numbers at once, images would be made twice.
    """

    def __init__(self, folder: Path, world: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f".processes-{world:05d}.lock"
        self._fd = os.open(own, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(
            self._fd, fcntl.LOCK_SH
        )  # first ours, then the others': two starts at once cannot miss each other
        for other in sorted(folder.glob(".processes-*.lock")):
            if other != own and _is_held(other):
                os.close(self._fd)
                number = int(other.stem.rpartition("-")[2])
                raise RecordError(
                    f"{folder.parent}: a start with {number} process{'es' * (number > 1)} is running here, this one "
                    f"has {world}; let it finish or stop it"
                )

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> LaunchLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_held(lock: Path) -> bool:
    fd = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def now() -> str:
    """The time of a record: UTC to the microsecond, so that text order is time order on every machine."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def read_records(path: Path, shape: Shape | None = None, *, quiet: bool = False) -> Iterator[Record]:
    """Stream a file's records; one that is unreadable, or has not the `shape` that its readers rely on, is named in
    a warning (unless `quiet`) and left out."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line is cut off")
                record = parse_json(line)
                if not isinstance(record, dict):
                    raise ValueError(f"not a JSON object but {kind(record)}")
                _check(record, shape or {})
            except ValueError as error:
                if not quiet:
                    warnings.warn(
                        f"{path}, line {number}: unreadable record ({error}); its sample counts as not done",
                        AccelWarning,
                        stacklevel=1,
                    )
                continue
            yield record


def _check(record: Record, shape: Shape) -> None:
    for name, types in shape.items():
        value = record.get(name)
        # JSON's true is no number, although Python's is.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            what = kind(value) if name in record else "missing"
            raise ValueError(f"{name!r} is {what}")


def latest_records(
    paths: Iterable[Path], key: Callable[[Record], Hashable], shape: Shape | None = None
) -> Iterator[Record]:
    """Stream the records of several files, of each key only the last, in order of the files' names.

    Last is what was written last: an image made again by another process replaces the one before.
    Two passes: what is kept in memory per record is its key, its time and its place, not the record.
    """
    files = sorted(paths)
    place: dict[Hashable, tuple[str, int, int]] = {}
    for number, path in enumerate(files):
        stamp = ""
        for line, record in enumerate(read_records(path, shape)):
            # A clock that was set back does not make a later line an earlier one.
            stamp = max(stamp, str(record.get("time", "")))
            place[key(record)] = max(place.get(key(record), ("", 0, 0)), (stamp, number, line))
    for number, path in enumerate(files):
        for line, record in enumerate(read_records(path, shape, quiet=True)):  # the first pass has named them
            if place[key(record)][1:] == (number, line):
                yield record


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a whole file so that it is either the old one or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _cut_incomplete_line(fd: int, path: Path) -> None:
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        warnings.warn(
            f"{path}: the last record was cut off when its writer stopped; its sample is redone",
            AccelWarning,
            stacklevel=3,
        )
        os.ftruncate(fd, end)
