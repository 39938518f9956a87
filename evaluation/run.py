"""Stage `run`: generate prompts x samples x configurations, measure, and record. Resumable.

For every batch of prompts all configurations are run one after another in rotating order, so that
what slows the machine down meets all of them alike, and a speed ratio is taken between neighbours.
Processes share the batches out among themselves; all configurations of one batch stay on one device.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from accel.generation import Decoding, Way, default_steps, is_autoregressive
from accel.pipelines.timing import is_compiled, measure

from .configurations import Configuration, resolve
from .environment import changes, environment
from .errors import AccelWarning, EvaluationError
from .folder import RunFolder, sample_key
from .identity import dtype, identity
from .records import Appender, LaunchLock, Record, now, rank_and_world, read_records, write_atomically
from .suites import Prompt, Suite, take

# Prompts of one sample number differ in seed, samples of one prompt too; a prime keeps them apart
# for every suite below a million prompts.
_SEED_STRIDE = 1_000_003


class Progress(NamedTuple):
    """Passed to `progress` after every image batch: images done (or given up) and to do, in this process."""

    done: int
    total: int
    configuration: str


class Unit(NamedTuple):
    prompt: Prompt
    sample: int


def run(
    path: str | Path,
    suite: Suite,
    pipe: Any,
    configurations: Sequence[Configuration | str],
    *,
    model: str | None = None,
    samples_per_prompt: int = 1,
    limit: int | None = None,
    base_seed: int = 0,
    batch_size: int = 1,
    call: dict[str, Any] | None = None,
    warmup: int = 1,
    verify: bool = False,
    tolerate: Callable[[Configuration, Sequence[Prompt], Exception], bool] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> RunFolder:
    """Generate what is missing in run folder `path`, which is made if absent.

    Args:
        suite: prompts, from `accel.evaluation.suites`.
        pipe: a diffusers text-to-image pipeline, an `AutoregressivePipeline`, or anything called like one
            (`pipe(prompts, generator=[...], output_type="pil").images`).
        configurations: `Configuration`s or specs (`accel.evaluation.configurations.parse`). The plain
            pipeline is added if it is not among them.
        model: name for the record; default the pipeline's class.
        limit: number of prompts, tasks in turn.
        base_seed: image `k` of prompt `i` starts from seed `base_seed + 1000003 k + i` in every
            configuration: pairs have the same initial noise.
        call: further arguments of every pipeline call (height, guidance_scale, ...).
        warmup: untimed images per configuration and start of the process.
        verify: compare the hashes of the images that exist, not only their lengths.
        tolerate: asked when a configuration fails on prompts: True gives this configuration up and goes on with
            the others. Without it, every error is raised.

    Raises:
        RecordError: the folder was started with other settings, or another process writes there.
    """
    if warmup < 0:
        raise EvaluationError(f"warmup must be at least 0, not {warmup}")
    ways = {item.name: Way(pipe, item.attach) for item in resolve(configurations)}
    for way in ways.values():  # a method that this pipeline cannot have is refused before a folder is made
        with way.ready():
            pass
    folder, settings, resolved = check(
        path,
        suite,
        pipe,
        configurations,
        model=model,
        samples_per_prompt=samples_per_prompt,
        limit=limit,
        base_seed=base_seed,
        batch_size=batch_size,
        call=call,
    )
    rank, world, _ = rank_and_world()
    with ExitStack() as held:
        held.enter_context(LaunchLock(folder.path / "sessions", world))
        sessions, records = (
            held.enter_context(Appender(folder.path / name / f"rank-{rank:05d}.jsonl"))
            for name in ("sessions", "samples")
        )
        folder.prepare(suite, settings, resolved)
        done = _done(folder, verify)
        todo = [
            (number, batch, [c for c in _rotated(resolved, number) if not done.issuperset(_keys(c, batch))])
            for number, batch in enumerate(
                _batches(take(suite.prompts, limit), samples_per_prompt, batch_size)
            )
            if number % world == rank
        ]
        total = sum(len(batch) * len(missing) for _, batch, missing in todo)
        if not total:
            return folder
        session = f"{rank}.{sum(1 for _ in read_records(sessions.path))}"
        start = {"session": session, "rank": rank, "world": world, "time": now(), "dtype": dtype(pipe)}
        start |= environment()
        _say_changes(folder, start)
        sessions.write(start)
        runner = _Runner(folder, pipe, ways, call or {}, base_seed, session, warmup)
        finished = 0
        given_up: set[str] = set()
        for _, batch, missing in todo:
            for configuration in missing:
                if configuration.name not in given_up:
                    try:
                        images, common = runner.generate(configuration, batch)
                    except Exception as error:
                        if not (tolerate and tolerate(configuration, [unit.prompt for unit in batch], error)):
                            raise
                        given_up.add(configuration.name)
                    else:
                        # A batch is always generated whole (pictures may depend on what shares their batch), but
                        # what is recorded is kept: it may have come from another batch, and its hash with it.
                        keep = [key in done for key in _keys(configuration, batch)]
                        made = zip(batch, images, keep, strict=True)
                        records.write(*(runner.save(unit, img, common) for unit, img, old in made if not old))
                finished += len(batch)
                if progress:
                    progress(Progress(finished, total, configuration.name))
    return folder


def check(
    path: str | Path,
    suite: Suite,
    pipe: Any,
    configurations: Sequence[Configuration | str],
    *,
    model: str | None = None,
    samples_per_prompt: int = 1,
    limit: int | None = None,
    base_seed: int = 0,
    batch_size: int = 1,
    call: dict[str, Any] | None = None,
) -> tuple[RunFolder, dict[str, Any], list[Configuration]]:
    """Refuse what `run` would refuse about the folder, which is made but not written to; arguments are `run`'s.

    Returns the folder, the settings that decide its images, and the configurations, the plain one first.
    """
    if samples_per_prompt < 1 or batch_size < 1:
        raise EvaluationError("samples_per_prompt and batch_size must be at least 1")
    resolved = resolve(configurations)
    settings: dict[str, Any] = {
        "model": model or type(pipe).__name__,
        "limit": limit,
        "samples_per_prompt": samples_per_prompt,
        "base_seed": base_seed,
        "batch_size": batch_size,
        "call": call or {},
        **identity(pipe),
    }
    _check_seeds(base_seed, samples_per_prompt, suite)
    if is_autoregressive(pipe):
        if any(c.steps for c in resolved) or "num_inference_steps" in settings["call"]:
            raise EvaluationError("steps are for diffusion models; this one draws every token of an image")
        settings["sampled"] = True
    folder = RunFolder(path)
    folder.check(suite, settings, resolved)
    return folder, settings, resolved


def _check_seeds(base_seed: int, samples: int, suite: Suite) -> None:
    last = base_seed + _SEED_STRIDE * (samples - 1) + max((prompt.id for prompt in suite.prompts), default=0)
    if base_seed < 0 or last >= 1 << 63:
        raise EvaluationError(
            f"base_seed must be from 0 to {(1 << 63) - 1 - last + base_seed}, not {base_seed}"
        )


class _Runner:
    def __init__(
        self,
        folder: RunFolder,
        pipe: Any,
        ways: dict[str, Way],
        call: dict[str, Any],
        base_seed: int,
        session: str,
        warmup: int,
    ) -> None:
        self.folder, self._ways, self.call = folder, ways, call
        self.base_seed, self.session, self.warmup = base_seed, session, warmup
        self._warm: set[str] = set()
        self._draws = is_autoregressive(pipe)
        # Attaching to a compiled pipeline makes it compile anew, so then every attachment is warmed.
        self._always_warm = is_compiled(pipe)

    def generate(
        self, configuration: Configuration, batch: Sequence[Unit]
    ) -> tuple[list[Image.Image], Record]:
        """The images of a batch, and what their records have in common."""
        with self._ways[configuration.name].ready() as (pipe, handle):
            if self._always_warm or configuration.name not in self._warm:
                for _ in range(max(self.warmup, int(self._always_warm))):
                    self._call(pipe, configuration, batch)
                self._warm.add(configuration.name)
            stats = handle.stats if self._draws and handle is not None else None
            if stats is not None:
                stats.reset()
            with measure(pipe) as measured:
                images = self._call(pipe, configuration, batch)
            # Captured and compiled forwards cannot be counted; plain decoding has one per token.
            decoding = Decoding.of(stats, measured.calls or default_steps(pipe)) if self._draws else None
        if len(images) != len(batch):
            raise EvaluationError(f"the pipeline returned {len(images)} images for {len(batch)} prompts")
        common = {
            "configuration": configuration.name,
            "configuration_hash": configuration.hash,
            "seconds": measured.seconds / len(batch),
            "denoiser_seconds": measured.denoiser_seconds and measured.denoiser_seconds / len(batch),
            "peak_bytes": measured.peak_bytes,
            "peak_kind": measured.peak_kind,
            "batch": len(batch),
            "session": self.session,
            "time": now(),
            **(asdict(decoding) if decoding else {}),
        }
        return images, common

    def _call(self, pipe: Any, configuration: Configuration, batch: Sequence[Unit]) -> list[Image.Image]:
        steps = {} if configuration.steps is None else {"num_inference_steps": configuration.steps}
        # Generators on the CPU: the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(self._seed(unit)) for unit in batch]
        prompts = [unit.prompt.text for unit in batch]
        return configuration.generate(pipe, prompts, generators, {**self.call, **steps})

    def _seed(self, unit: Unit) -> int:
        return self.base_seed + _SEED_STRIDE * unit.sample + unit.prompt.id

    def save(self, unit: Unit, image: Image.Image, common: Record) -> Record:
        place = self.folder.image_folder(common["configuration"], unit.prompt.id)
        metadata = place / "metadata.jsonl"
        if unit.prompt.metadata and not metadata.exists():
            write_atomically(metadata, unit.prompt.metadata.to_json() + "\n")
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "png", compress_level=1)
        file = place / "samples" / f"{unit.sample:04d}.png"
        write_atomically(file, buffer.getvalue())
        return {
            "prompt_id": unit.prompt.id,
            "sample": unit.sample,
            "prompt": unit.prompt.text,
            "seed": self._seed(unit),
            "image": file.relative_to(self.folder.path).as_posix(),
            "image_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            "image_bytes": len(buffer.getvalue()),
            **common,
        }


def _done(folder: RunFolder, verify: bool) -> set[tuple[str, int, int]]:
    done = set()
    for record in folder.samples():
        if verify:
            content = (folder.path / record["image"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != record["image_sha256"]:
                continue
        done.add(sample_key(record))
    return done


def _batches(prompts: Sequence[Prompt], samples: int, size: int) -> Iterator[list[Unit]]:
    """Batches that do not change when the run is extended by prompts or samples of a full batch."""
    for sample in range(samples):
        for start in range(0, len(prompts), size):
            yield [Unit(prompt, sample) for prompt in prompts[start : start + size]]


def _say_changes(folder: RunFolder, start: Record) -> None:
    """Warn if the images that exist were made with other versions, or on another device."""
    used = {record["session"] for record in folder.samples()}
    before = [record for record in folder.sessions() if record["session"] in used]
    if before and (changed := changes([*before, start])):
        warnings.warn(
            f"{folder.path}: was started with other versions ({'; '.join(changed)}); images of both are compared "
            "in one table, and the report says so",
            AccelWarning,
            stacklevel=3,
        )


def _rotated(configurations: list[Configuration], by: int) -> list[Configuration]:
    shift = by % len(configurations)
    return configurations[shift:] + configurations[:shift]


def _keys(configuration: Configuration, batch: Sequence[Unit]) -> list[tuple[str, int, int]]:
    return [(configuration.name, unit.prompt.id, unit.sample) for unit in batch]
