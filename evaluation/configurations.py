"""What is compared: the plain pipeline, fewer steps, and accelerated pipelines, each with a name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import yaml
from PIL import Image

from accel.errors import ConfigError

from .errors import EvaluationError
from .textfiles import first_line

PLAIN = "plain"
_LONGEST = 1000  # letters of a setting; YAML takes seconds for thousands of brackets
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")


@dataclass(frozen=True)
class Configuration:
    """One row of the comparison.

    `method` is a config dataclass for `accel.accelerate` (None: the pipeline as it is), `steps` the
    number of denoising steps (None: the run's or the pipeline's default).
    """

    name: str
    method: Any = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise EvaluationError(f"configuration name {self.name!r}: letters, digits and . _ = , + - only")
        if self.steps is not None and self.steps < 1:
            raise EvaluationError(f"configuration {self.name!r}: steps must be at least 1, not {self.steps}")

    @property
    def is_plain(self) -> bool:
        return self.method is None and self.steps is None

    def describe(self) -> dict[str, Any]:
        """What makes this configuration, as plain data; the hash is taken over it."""
        method = None
        if self.method is not None:
            method = {"type": type(self.method).__name__, **dataclasses.asdict(self.method)}
        return {"method": method, "steps": self.steps}

    @property
    def hash(self) -> str:
        text = json.dumps(self.describe(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def attach(self, pipe: Any) -> AbstractContextManager[Any]:
        """Accelerate `pipe` for the duration of a `with` block; the plain pipeline is left alone."""
        if self.method is None:
            return nullcontext()
        import accel

        return accel.accelerate(pipe, self.method)

    def generate(
        self, pipe: Any, prompts: list[str], generators: list[Any], arguments: dict[str, Any]
    ) -> list[Any]:
        """PIL images of the prompts, from the pipeline that `attach` has changed."""
        result = pipe(prompts, generator=generators, output_type="pil", **arguments)
        images = getattr(result, "images", None)
        if not isinstance(images, (list, tuple)) or not all(isinstance(i, Image.Image) for i in images):
            raise EvaluationError(
                f"{type(pipe).__name__} returned a {type(result).__name__} whose `images` are no list of PIL images, "
                'although output_type="pil" was asked for'
            )
        return list(images)


def parse(spec: str) -> Configuration:
    """Parse `[NAME:]PART[,KEY=VALUE...]`.

    PART is `plain`, a preset, a YAML file or `steps=N`; `steps=N` may follow a preset, and any other
    KEY=VALUE replaces a setting of it, KEY=schedule.dense_last one of its schedule: `plain`, `steps=8`, `balanced`,
    `mild:merging,ratio=0.3`, `mine.yaml,steps=12`.
    """
    match = re.match(r"([A-Za-z0-9][\w.+-]*):(?=.)", spec)
    name, rest = (match[1], spec[match.end() :]) if match else (None, spec)
    source: str | None = None
    settings: dict[str, Any] = {}
    for index, part in enumerate(_parts(rest)):
        key, equals, value = part.partition("=")
        if equals and key in settings:
            raise EvaluationError(f"configuration {spec!r}: {key} is given twice")
        if equals:
            settings[key] = _value(spec, key, value)
        elif index == 0 and part:
            source = None if part == PLAIN else part
        else:
            raise EvaluationError(f"configuration {spec!r}: {part!r} is not KEY=VALUE")
    steps = settings.pop("steps", None)
    if steps is not None and type(steps) is not int:  # a bool is an int to Python
        raise EvaluationError(f"configuration {spec!r}: steps must be an integer, not {steps!r}")
    method = None
    if source is not None:
        method = _load(source, settings, spec)
    elif settings:
        raise EvaluationError(
            f"configuration {spec!r}: {next(iter(settings))!r} needs a preset or file before it"
        )
    return Configuration(
        name or re.sub(r"[^A-Za-z0-9._=,+-]", "_", _stem(rest)).lstrip("._-=,+"), method, steps
    )


def _parts(text: str) -> list[str]:
    """Split at the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def resolve(configurations: Iterable[Configuration | str]) -> list[Configuration]:
    """Parse what is text, put the plain pipeline first (adding it if absent), refuse doubles.

    The plain pipeline is always run: without it in the same run there is no ratio and no pair.
    """
    parsed = [parse(item) if isinstance(item, str) else item for item in configurations]
    plain = [item for item in parsed if item.is_plain] or [Configuration(PLAIN)]
    ordered = plain + [item for item in parsed if not item.is_plain]
    for attribute in ("name", "hash"):
        seen: dict[str, str] = {}
        for item in ordered:
            value = getattr(item, attribute)
            if value in seen:
                raise EvaluationError(
                    f"configurations {seen[value]!r} and {item.name!r} have the same {attribute}"
                )
            seen[value] = item.name
    return ordered


def _load(source: str, settings: dict[str, Any], spec: str) -> Any:
    from accel import configs

    method = configs.load(source)
    try:
        return configs.change(method, settings)
    except ConfigError as error:
        raise EvaluationError(f"configuration {spec!r}: {error}") from None
    except TypeError as error:  # compared with numbers and found to be none
        raise EvaluationError(f"configuration {spec!r}: a setting has the wrong type ({error})") from None


def _value(spec: str, key: str, text: str) -> Any:
    """A number, a word, true, false or a list: as YAML reads it, without its references and tags."""
    if len(text) > _LONGEST:
        raise EvaluationError(
            f"configuration: {key}={text[:20]}... is no value: longer than {_LONGEST} letters"
        )
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise EvaluationError(f"configuration {spec!r}: {key} refers to something else ({text!r})")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(
            f"configuration {spec!r}: {key}={text} is no value: {first_line(error)}"
        ) from None


def _stem(text: str) -> str:
    first, *others = text.split(",")
    return ",".join([re.sub(r"\.ya?ml$", "", first).rsplit("/", 1)[-1], *others])
