"""What a tuning run has measured so far, in a folder, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from accel.evaluation.errors import EvaluationError
from accel.evaluation.pictures import load_pngs, save_pngs
from accel.evaluation.records import write_atomically
from accel.evaluation.textfiles import read_json

#: Of the measured values: folders of another version are not continued.
VERSION = 1
_FILE, _ENDS = "state.json", "ends.safetensors"


class State:
    """A folder of measurements that were made in one way.

    Args:
        made: what all measurements depend on, as plain data.

    Raises:
        EvaluationError: the folder holds measurements of another version, or made in another way; what differs.
    """

    def __init__(self, folder: Path, made: Mapping[str, Any]) -> None:
        self.folder = folder
        self.known: dict[str, Any] = {"version": VERSION, "made": json.loads(json.dumps(made)), "tried": []}
        file = folder / _FILE
        if not file.exists():
            return
        cure = f"delete {folder}, or choose another --out"
        found = read_json(file, EvaluationError, cure)
        if found.get("version") != VERSION:
            raise EvaluationError(
                f"{file} is an interrupted run of another version ({found.get('version')!r}, this is {VERSION}): {cure}"
            )
        for key, value in self.known["made"].items():
            other = found.get("made", {}).get(key)
            if other != value:
                short = f"{str(other)[:60]} there, {str(value)[:60]} here"
                raise EvaluationError(
                    f"{file} is an interrupted run of other settings: {key} is {short}; {cure}"
                )
        self.known = found

    def __getitem__(self, key: str) -> Any:
        return self.known.get(key)

    def keep(self, **values: Any) -> None:
        """Take over values and write everything."""
        self.known |= values
        write_atomically(self.folder / _FILE, json.dumps(self.known) + "\n")

    def tried(self, split: str, name: str, metric: str, settings: str = "") -> dict[str, Any] | None:
        """What is known of a mask, or of a configuration with these settings, on a part of the prompts, if by this metric."""
        wanted = (split, name, settings)
        for row in self.known["tried"]:
            if (row["split"], row["name"], row.get("settings", "")) == wanted and metric in row["values"]:
                return row
        return None

    def add(self, row: Mapping[str, Any]) -> None:
        self.keep(tried=[*self.known["tried"], dict(row)])

    def keep_pictures(self, split: str, pictures: Tensor) -> None:
        save_pngs(self.folder / split, pictures)

    def pictures(self, split: str, count: int) -> Tensor | None:
        """Plain pictures of a part of the prompts; None: not all are there."""
        return load_pngs(self.folder / split, count)

    def keep_ends(self, ends_PL: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{_ENDS}.part"
        save_file({"ends": ends_PL.contiguous()}, part)
        part.replace(self.folder / _ENDS)

    def ends(self) -> Tensor | None:
        file = self.folder / _ENDS
        return load_file(file)["ends"] if file.exists() else None


def rounded(values: Iterable[float], digits: int = 7) -> list[float]:
    """For JSON: as many digits as were measured."""
    return [float(f"{value:.{digits}g}") for value in values]
