"""A run folder: settings, prompts, images in GenEval's layout, and the records of every stage.

run.json                                   what was asked (settings that decide the images)
prompts.jsonl                              the suite's prompts with their ids
sessions/rank-00000.jsonl                  environment of every start of every process
images/<configuration>/<prompt id>/        metadata.jsonl and samples/0000.png: GenEval's own layout
samples/rank-00000.jsonl                   stage `run`: seed, hashes, timings per image
scores/rank-00000.jsonl, bounds.json       stage `score`: values and reasons per image
features/<extractor>/                      stage `score`: one row of features per image
report/                                    stage `report`
problems.json                              configurations that failed, and why; reports leave them out
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .configurations import Configuration
from .errors import AccelWarning, RecordError
from .records import Record, latest_records, write_atomically
from .suites import Prompt, Suite

PROBLEMS = "problems.json"
_GROWING = ("configurations", "limit", "samples_per_prompt")  # may be extended; the rest decides images


class RunFolder:
    """Paths and readers of a run folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def settings(self) -> dict[str, Any]:
        """Content of run.json; `RecordError` if this is not a run folder."""
        file = self.path / "run.json"
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            raise RecordError(
                f"{self.path}: not a run folder (no run.json); start with `accel evaluate run`"
            ) from None
        except json.JSONDecodeError as error:
            raise RecordError(f"{file}: unreadable: {error}") from None

    def check(
        self, suite: Suite, settings: dict[str, Any], configurations: Sequence[Configuration]
    ) -> dict[str, Any]:
        """What run.json will hold. The folder is made, nothing is written.

        Raises:
            RecordError: it cannot be made, is no run folder, or was started with other settings.
        """
        rows = [{"name": item.name, "hash": item.hash, **item.describe()} for item in configurations]
        wanted = {"format": 1, "suite": suite.describe(), **settings, "configurations": rows}
        wanted = json.loads(json.dumps(wanted, default=str))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(
                f"{self.path}: cannot be a run folder ({error.strerror}); name another one"
            ) from None
        # Without an image nothing could be mixed: what was only tried may be tried otherwise.
        if (self.path / "run.json").exists() and self._holds_images():
            wanted["configurations"] = self._merge(self.settings, wanted)
        elif self._holds_other_files():
            raise RecordError(f"{self.path}: exists and is not a run folder; name an empty or new one")
        return wanted

    def prepare(
        self, suite: Suite, settings: dict[str, Any], configurations: Sequence[Configuration]
    ) -> None:
        """Write run.json and prompts.jsonl, or check that a started run has the same settings.

        Every process calls this with the same arguments and writes the same content.
        """
        wanted = self.check(suite, settings, configurations)
        write_atomically(
            self.path / "prompts.jsonl", "".join(prompt.to_json() + "\n" for prompt in suite.prompts)
        )
        write_atomically(self.path / "run.json", json.dumps(wanted, indent=2) + "\n")

    def _holds_images(self) -> bool:
        return any(file.stat().st_size for file in (self.path / "samples").glob("rank-*.jsonl"))

    def _holds_other_files(self) -> bool:
        names = {item.name for item in self.path.iterdir() if not item.name.startswith(".")}
        # Looked at last: another process may have been starting the same run in the meantime.
        return bool(names - {"prompts.jsonl"}) and not (self.path / "run.json").exists()

    def _merge(self, old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
        for key in sorted(old.keys() | new.keys()):
            if key not in _GROWING and old.get(key) != new.get(key):
                raise RecordError(
                    f"{self.path}: was started with {key} = {old.get(key)!r}, now it is {new.get(key)!r}; "
                    "images of both would be mixed: use another folder"
                )
        hashes = {row["name"]: row["hash"] for row in old["configurations"]}
        for row in new["configurations"]:
            if hashes.get(row["name"], row["hash"]) != row["hash"]:
                raise RecordError(
                    f"{self.path}: configuration {row['name']!r} was started with other settings; "
                    "give the new ones another name (NAME:...) or use another folder"
                )
        return old["configurations"] + [r for r in new["configurations"] if r["name"] not in hashes]

    def prompts(self) -> dict[int, Prompt]:
        """The suite's prompts by id."""
        file = self.path / "prompts.jsonl"
        prompts = []
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    prompts.append(Prompt.from_json(line, str(file), number))
                except (ValueError, KeyError, TypeError) as error:
                    raise RecordError(
                        f"{file}, line {number}: unreadable ({error}); the command that started this folder "
                        "writes the file anew and keeps the images"
                    ) from None
        return {prompt.id: prompt for prompt in prompts}

    @property
    def configurations(self) -> dict[str, str]:
        """Hash of every configuration by name, the plain one first."""
        return {row["name"]: row["hash"] for row in self.settings["configurations"]}

    @property
    def plain(self) -> str:
        """Name of the unaccelerated configuration."""
        rows = self.settings["configurations"]
        return next((row["name"] for row in rows if not row["method"] and not row["steps"]), rows[0]["name"])

    @property
    def problems(self) -> dict[str, str]:
        """Why configurations failed, by name."""
        file = self.path / PROBLEMS
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def image_folder(self, configuration: str, prompt_id: int) -> Path:
        return self.path / "images" / configuration / f"{prompt_id:05d}"

    def samples(self) -> Iterator[Record]:
        """Records of finished images, of each sample the last, in the order they were made.

        One whose image is missing or has not the recorded length is named and left out.
        """
        for record in latest_records((self.path / "samples").glob("rank-*.jsonl"), sample_key):
            problem = image_problem(self.path, record)
            if problem:
                warnings.warn(
                    f"{self.path / record['image']}: {problem}; this sample counts as not done, "
                    "`accel evaluate run` (of existing images, `score --images`) makes up for it",
                    AccelWarning,
                    stacklevel=2,
                )
            else:
                yield record

    def scores(self) -> Iterator[Record]:
        """Score records, of each sample and metric the last."""
        files = (self.path / "scores").glob("rank-*.jsonl")
        return latest_records(files, lambda r: (*sample_key(r), r["metric"]))

    def sessions(self) -> Iterator[Record]:
        return latest_records((self.path / "sessions").glob("rank-*.jsonl"), lambda r: r["session"])


def sample_key(record: Record) -> tuple[str, int, int]:
    """What identifies a sample: configuration, prompt id, number of the image of that prompt."""
    return record["configuration"], record["prompt_id"], record["sample"]


def image_problem(folder: Path, record: Record) -> str | None:
    """Why the recorded image cannot be used, from its length alone; the hash is checked when scored."""
    try:
        size = (folder / record["image"]).stat().st_size
    except OSError as error:
        return f"image cannot be read ({error.strerror})"
    if size != record["image_bytes"]:
        return f"image is truncated or changed ({size} bytes, recorded {record['image_bytes']})"
    return None
