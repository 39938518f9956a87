"""A run folder: settings, prompts, images in GenEval's layout, and the records of every stage.

run.json                                   what decides the images: call, seeds, prompts, the weights' hash, dtype, ...
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
from types import NoneType
from typing import Any

from .configurations import Configuration
from .errors import AccelWarning, RecordError
from .records import SAMPLE, SCORE, SESSION, Record, latest_records, write_atomically
from .suites import Prompt, Suite
from .textfiles import kind, read_json, read_text, split_lines

FORMAT = 2
PROBLEMS = "problems.json"
_GROWING = ("configurations", "limit", "samples_per_prompt")  # may be extended; the rest decides images
_SCHEDULER = "scheduler"
_IDENTITY: dict[str, type | tuple[type, ...]] = {  # as `identity.identity` gives it
    "pipeline": str,
    **dict.fromkeys(("dtype", "device", "model_weights"), (str, NoneType)),
    _SCHEDULER: (dict, NoneType),
}
_NEW = "restore it, or start a new folder"
_ANEW = "the command that started this folder writes the file anew and keeps the images"


class RunFolder:
    """Paths and readers of a run folder. What is damaged in it is named by every reader: `RecordError`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def settings(self) -> dict[str, Any]:
        """Content of run.json; `RecordError` if this is no run folder, or one of another format."""
        file = self.path / "run.json"
        if not file.exists():
            raise RecordError(f"{self.path}: not a run folder (no run.json); start with `accel evaluate run`")
        found = read_json(file, RecordError, _NEW)
        if found.get("format") != FORMAT:
            raise RecordError(
                f"{file}: a run folder of format {found.get('format')!r}, this accel has {FORMAT}: finish it with "
                "the accel that started it, or start a new folder"
            )
        if problem := _settings_problem(found):
            raise RecordError(f"{file}: damaged: {problem}; {_NEW}")
        return found

    def check(
        self, suite: Suite, settings: dict[str, Any], configurations: Sequence[Configuration]
    ) -> dict[str, Any]:
        """What run.json will hold. The folder is made, nothing is written.

        Raises:
            RecordError: it cannot be made, is no run folder, or was started with other settings.
        """
        rows = [{"name": item.name, "hash": item.hash, **item.describe()} for item in configurations]
        wanted = {"format": FORMAT, "suite": suite.describe(), **settings, "configurations": rows}
        wanted = json.loads(json.dumps(wanted, default=str))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(
                f"{self.path}: cannot be a run folder ({error.strerror}); name another one"
            ) from None
        if (self.path / "run.json").exists():
            old = self.settings
            # Without an image nothing could be mixed: what was only tried may be tried otherwise.
            if self._holds_images():
                wanted["configurations"] = self._merge(old, wanted)
        elif self._holds_other_files():
            raise RecordError(f"{self.path}: exists and is not a run folder; name an empty or new one")
        return wanted

    def prepare(
        self, suite: Suite, settings: dict[str, Any], configurations: Sequence[Configuration]
    ) -> None:
        """Write run.json and prompts.jsonl, or check that a started run has the same settings.

        Every process calls this with the same arguments and writes the same content, after it has locked its
        records: a start that is refused because another one is running must not touch that one's settings.
        """
        wanted = self.check(suite, settings, configurations)
        write_atomically(
            self.path / "prompts.jsonl", "".join(prompt.to_json() + "\n" for prompt in suite.prompts)
        )
        write_atomically(self.path / "run.json", json.dumps(wanted, indent=2) + "\n")

    def _holds_images(self) -> bool:
        return any(file.stat().st_size for file in (self.path / "samples").glob("rank-*.jsonl"))

    def _holds_other_files(self) -> bool:
        items = [item for item in self.path.iterdir() if not item.name.startswith(".")]
        # What a start makes before run.json; one that was killed there may be started again.
        ours = [item for item in items if item.name == "prompts.jsonl" or _is_records(item)]
        # Looked at last: another process may have been starting the same run in the meantime.
        return len(items) > len(ours) and not (self.path / "run.json").exists()

    def _merge(self, old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
        for key in dict.fromkeys([*new, *old]):
            found = None if key in _GROWING else _difference(key, old.get(key), new.get(key))
            if found:
                name, before, now = found
                raise RecordError(
                    f"{self.path}: was started with {name} = {before!r}, now it is {now!r}; "
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
        try:
            lines = split_lines(read_text(file, RecordError))
        except RecordError as error:
            raise RecordError(f"{error}; {_ANEW}") from None
        for number, line in enumerate(lines, 1):
            try:
                prompts.append(Prompt.from_json(line, str(file), number))
            except ValueError as error:
                raise RecordError(f"{file}, line {number}: unreadable ({error}); {_ANEW}") from None
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
        file, cure = self.path / PROBLEMS, "delete it: the next start of the bench writes it anew"
        found = read_json(file, RecordError, cure) if file.exists() else {}
        if wrong := next((name for name, why in found.items() if not isinstance(why, str)), None):
            raise RecordError(f"{file}: damaged: {wrong!r} is {kind(found[wrong])}; {cure}")
        return found

    @property
    def bounds(self) -> dict[str, Any] | None:
        """Ceiling and floor of the suite's score, if there are any."""
        file, cure = self.path / "scores" / "bounds.json", "delete it: `accel evaluate score` writes it anew"
        if not file.exists():
            return None
        found = read_json(file, RecordError, cure)
        for name in ("ceiling", "floor"):
            bound = found.get(name)
            if bound is not None and not _is_aggregate(bound):
                raise RecordError(f"{file}: damaged: {name!r} is no aggregate of verdicts; {cure}")
        return found

    def image_folder(self, configuration: str, prompt_id: int) -> Path:
        return self.path / "images" / configuration / f"{prompt_id:05d}"

    def samples(self) -> Iterator[Record]:
        """Records of finished images, of each sample the last, in the order they were made.

        One whose image is missing or has not the recorded length is named and left out.
        """
        for record in latest_records((self.path / "samples").glob("rank-*.jsonl"), sample_key, SAMPLE):
            problem = image_problem(self.path, record)
            if problem:
                warnings.warn(
                    f"{self.path / record['image']}: {problem}; this sample counts as not done, "
                    "`accel evaluate run` (of existing images, `score --images`) makes up for it",
                    AccelWarning,
                    stacklevel=1,  # said from one place, whoever reads: "once" is once a module
                )
            else:
                yield record

    def scores(self) -> Iterator[Record]:
        """Score records, of each sample and metric the last."""
        files = (self.path / "scores").glob("rank-*.jsonl")
        return latest_records(files, lambda r: (*sample_key(r), r["metric"]), SCORE)

    def sessions(self) -> Iterator[Record]:
        """Records of all starts."""
        return latest_records((self.path / "sessions").glob("rank-*.jsonl"), lambda r: r["session"], SESSION)

    def known_samples(self, prompts: dict[int, Prompt]) -> Iterator[Record]:
        """`samples()`; `RecordError` if one is of a prompt or a configuration that the folder's files do not name."""
        names = self.configurations
        for record in self.samples():
            if record["prompt_id"] not in prompts:
                raise RecordError(
                    f"{self.path / 'prompts.jsonl'}: has no prompt {record['prompt_id']}, of which there are images; "
                    f"{_ANEW}"
                )
            if record["configuration"] not in names:
                raise RecordError(
                    f"{self.path / 'run.json'}: names no configuration {record['configuration']!r}, of which there "
                    f"are images; {_NEW}"
                )
            yield record


def _is_records(folder: Path) -> bool:
    return folder.name in ("samples", "sessions") and all(
        item.name.startswith(".") or item.match("rank-*.jsonl") for item in folder.iterdir()
    )


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first setting that differs, by its full name, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (name, old, new)
    for key in dict.fromkeys([*new, *old]):
        if name == _SCHEDULER and not (key in old and key in new):
            continue  # another version of diffusers may have more settings, at what was fixed before
        if found := _difference(f"{name}.{key}", old.get(key), new.get(key)):
            return found
    return None


def _settings_problem(settings: dict[str, Any]) -> str | None:
    """What the readers of run.json rely on and is not there."""
    suite, rows = settings.get("suite"), settings.get("configurations")
    if not isinstance(settings.get("model"), str):
        return f"'model' is {kind(settings.get('model'))}"
    if not isinstance(suite, dict) or not isinstance(suite.get("name"), str):
        return "'suite' is no object with a name"
    if _IDENTITY.keys() & settings.keys() or "base_seed" in settings:  # generated, not imported
        for name, types in _IDENTITY.items():
            if name not in settings or not isinstance(settings[name], types):
                return f"{name!r} is {kind(settings[name]) if name in settings else 'missing'}"
    if not isinstance(settings.get("call", {}), dict):
        return f"'call' is {kind(settings['call'])}"
    if not isinstance(rows, list) or not rows:
        return "'configurations' is no list of objects"
    for row in rows:
        named = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("name", "hash"))
        if not named or not {"method", "steps"} <= row.keys():
            return "'configurations' holds what is none"
    return None


def _is_aggregate(bound: Any) -> bool:
    def is_interval(value: Any) -> bool:
        return isinstance(value, dict) and {"value", "low", "high", "n"} <= value.keys()

    tasks = bound.get("tasks") if isinstance(bound, dict) else None
    return isinstance(tasks, dict) and all(map(is_interval, [*tasks.values(), bound.get("overall")]))


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
