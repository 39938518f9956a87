"""`accel bench ar`: ways to decode an autoregressive model, interleaved in one run.

transformers' own `generate`, plain decoding, speculative decoding lossless and relaxed. Images, times and scores
are `accel.evaluation`'s, so that a stopped bench continues where it was: the run folder itself holds calls of one
image, `batch-sizes/N` those of N images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from accel.configs import load
from accel.evaluation.configurations import PLAIN, Configuration
from accel.evaluation.errors import EvaluationError
from accel.evaluation.extractors import ScenesExtractor
from accel.evaluation.extractors.scenes import WEIGHTS
from accel.evaluation.folder import RunFolder
from accel.evaluation.judges import scenes_judge
from accel.evaluation.pictures import to_pil
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.suites import Suite, take
from accel.generation import Way, is_autoregressive
from accel.methods.speculation import SpeculativeDecodingConfig

TRANSFORMERS, AGAIN = "transformers", "plain-again"
#: The presets, as a user has them: they choose their window, or not to speculate.
AUTO = {"lossless-auto": "lossless", "grouped-auto": "grouped"}
#: Which ways are run at every batch size (of the groupings, the last), and calls of each.
_BY_BATCH_SIZE, REPEATS = re.compile(rf"{PLAIN}|{TRANSFORMERS}|lossless-(\d+|auto)|grouped-(\d+|auto)"), 3
_OTHER_SEEDS = 500_009  # what `plain-again` adds to every seed
_MATCHED = 4  # images on which the mixture's weight is found

Config = SpeculativeDecodingConfig


@dataclass(frozen=True)
class Transformers(Configuration):
    """transformers' own `generate`, for the families in `GENERATE`. Seeds give other images than plain's."""

    @property
    def is_plain(self) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        return {"method": {"type": "transformers.generate"}, "steps": None}

    @torch.no_grad()
    def generate(
        self, pipe: Any, prompts: list[str], generators: list[Any], arguments: dict[str, Any]
    ) -> list[Image.Image]:
        settings = {**vars(pipe.adapter.defaults()), **arguments}
        with torch.random.fork_rng([pipe.device] if pipe.device.type == "cuda" else []):
            torch.manual_seed(generators[0].initial_seed())  # it only draws from the global generator
            token_BT = GENERATE[pipe.adapter.name](pipe, prompts, **settings)
        image_B3HW = pipe.adapter.images(token_BT, pipe.adapter.layout(None, None))
        return [to_pil(image) for image in image_B3HW.float().cpu()]


def _janus(
    pipe: Any,
    prompts: list[str],
    guidance_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> torch.Tensor:
    """(B, T) tokens of `JanusForConditionalGeneration.generate`, which pads prompts on the left."""
    adapter = pipe.adapter
    text = [f"{prompt}{adapter.tokenizer.boi_token}" for prompt in prompts]
    inputs = adapter.tokenizer(text, padding=True, padding_side="left", return_tensors="pt").to(pipe.device)
    extra: dict[str, Any] = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    if temperature == 0:
        extra = {}
    if guidance_scale == 1:  # it runs both halves all the same, and leaves it to a processor to drop one
        extra["logits_processor"] = [lambda ids, scores: scores[: len(prompts)]]
    return adapter.model.generate(
        **inputs,
        generation_mode="image",
        do_sample=temperature > 0,
        guidance_scale=guidance_scale,
        num_return_sequences=1,  # transformers 5.0 reckons with its defaults for these two, which are None
        max_length=1,  # it takes the larger of this and what an image needs
        **extra,
    )


#: How each family's own `generate` is called: (pipeline, prompts, guidance and sampling) → tokens (B, T).
GENERATE: dict[str, Callable[..., torch.Tensor]] = {"Janus": _janus}


@dataclass(frozen=True)
class Again(Configuration):
    """Plain decoding from other seeds: what scores and distances are when nothing but chance differs."""

    @property
    def is_plain(self) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        return {"method": {"type": "other seeds"}, "steps": None}

    def generate(
        self, pipe: Any, prompts: list[str], generators: list[Any], arguments: dict[str, Any]
    ) -> list[Any]:
        others = [torch.Generator().manual_seed(g.initial_seed() + _OTHER_SEEDS) for g in generators]
        return super().generate(pipe, prompts, others, arguments)


def settings(
    *, window: int = 16, windows: Sequence[int] = (8, 16, 32, 64), groups: Sequence[int] = (4, 8, 16, 32)
) -> list[Configuration]:
    """What is compared, without the mixtures that `matched` adds. All but the presets decode speculatively whether
    it pays or not.

    Args:
        window: of everything but the sweep over windows.
        windows, groups: swept over, lossless and relaxed.
    """

    def way(name: str, **options: Any) -> Configuration:
        return Configuration(name, Config(**{"window": window, "auto_disable": False, **options}))

    published = {"drafting": "independent", "fresh": "uniform"}
    return [
        Configuration(PLAIN),
        Transformers(TRANSFORMERS),
        Again(AGAIN),
        way("sjd", **published),
        *(way(f"lossless-{size}", window=size) for size in dict.fromkeys((window, *windows))),
        *(Configuration(name, load(preset)) for name, preset in AUTO.items()),
        way("lossless-gumbel-ratio", drafting="gumbel", verification="ratio"),
        way("lossless-maximal", drafting="maximal"),
        *(way(f"gsd-{size}", group_size=size, **published) for size in groups),
        *(way(f"grouped-{size}", group_size=size) for size in groups),
        *(way(f"budget-group-{tv}", tv_budget=tv) for tv in (0.02, 0.1)),
        *(way(f"budget-mixture-{tv}", tv_budget=tv, relaxation="mixture") for tv in (0.02, 0.1)),
    ]


def refused(pipe: Any, configurations: Sequence[Configuration]) -> dict[str, str]:
    """Configurations that this model cannot run, with the reason."""
    found = {}
    for item in configurations:
        if isinstance(item, Transformers) and pipe.adapter.name not in GENERATE:
            found[item.name] = (
                f"transformers' generate is called here for {', '.join(GENERATE)} only, not {pipe.adapter.name}"
            )
        elif item.method is not None and item.method.group_size > pipe.adapter.vocabulary:
            found[item.name] = f"groups of more tokens than the vocabulary of {pipe.adapter.vocabulary}"
    return found


def matched(
    pipe: Any, grouped: Configuration, prompts: Sequence[str], call: dict[str, Any], known: RunFolder
) -> Configuration:
    """The mixture that spends as much total variation per token as a grouping, on a few images.

    Any rule needs at least as much distance for its acceptance as a mixture (`accel.methods.speculation.verify`),
    so this is what a grouping is to be compared with. A bench that is continued takes the weight that it was
    started with.
    """
    name = f"mixture-as-{grouped.name}"

    def mixture(weight: float) -> Configuration:
        config = Config(
            window=grouped.method.window, auto_disable=False, relaxation="mixture", mixture_weight=weight
        )
        return Configuration(name, config)

    started = known.settings["configurations"] if (known.path / "run.json").exists() else []
    for row in started:
        if row["name"] == name:
            return mixture(row["method"]["mixture_weight"])

    def spent(configuration: Configuration) -> float:
        with Way(pipe, configuration.attach).ready() as (called, handle):
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
            called(list(prompts), generator=generators, output_type="tokens", **call)
            return handle.stats.tv_per_token

    wanted, low, high = spent(grouped), 0.0, 1.0  # nothing is spent at a weight of 1, most near 0
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(mixture(middle)) > wanted else (low, middle)
    return mixture(round((low + high) / 2, 4))


def bench(
    path: str | Path,
    pipe: Any,
    suite: Suite,
    configurations: Sequence[Configuration],
    *,
    call: dict[str, Any] | None = None,
    model: str | None = None,
    limit: int = 60,
    samples: int = 1,
    seed: int = 0,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    repeats: int = REPEATS,
    match: bool = True,
    progress: Callable[[Any], None] | None = None,
) -> Path:
    """Run, score, and write `report/autoregressive.md`, `.json`, `.csv` and plots; returns the Markdown.

    Args:
        path: run folder; continued if it exists.
        pipe: an `AutoregressivePipeline`.
        configurations: from `settings`; those that the model cannot run are left out, and named in the report.
        call: arguments of every pipeline call (guidance_scale, temperature, ...).
        limit, samples, seed: prompts, images of each, and the first seed.
        batch_sizes: images per call; 1 is always run, and all quality is measured there.
        repeats: calls at each larger batch size.
        match: add the mixtures at equal total variation.

    Raises:
        EvaluationError: not an autoregressive pipeline, or more prompts asked for than there are.
    """
    from .autoregressive_report import write

    if not is_autoregressive(pipe):
        raise EvaluationError(f"accel bench ar is for autoregressive models, not a {type(pipe).__name__}")
    largest = max(batch_sizes)
    if largest * repeats > len(suite.prompts):
        raise EvaluationError(
            f"{repeats} batches of {largest} images need more prompts than the suite's {len(suite.prompts)}"
        )
    pipe.set_progress_bar_config(disable=True)
    call, folder = call or {}, RunFolder(path)
    problems = refused(pipe, configurations)
    chosen = [item for item in configurations if item.name not in problems]
    if match:
        texts = [prompt.text for prompt in take(suite.prompts, _MATCHED)]
        chosen += [matched(pipe, c, texts, call, folder) for c in chosen if _grouping(c)]

    def generate(target: Path, ways: Sequence[Configuration], prompts: int, batch_size: int) -> None:
        run(
            target,
            suite,
            pipe,
            ways,
            model=model,
            samples_per_prompt=samples if batch_size == 1 else 1,
            limit=prompts,
            base_seed=seed,
            batch_size=batch_size,
            call=call,
            progress=progress,
        )

    generate(folder.path, chosen, limit, 1)
    groupings = [item for item in chosen if _grouping(item)]
    ways = [c for c in chosen if _BY_BATCH_SIZE.fullmatch(c.name) and c not in groupings[:-1]]
    sizes = sorted({int(size) for size in batch_sizes} - {1})
    for size in sizes:
        generate(batch_folder(folder, size), ways, size * repeats, size)
    if suite.name == "scenes":
        judge = scenes_judge()
        extractors = [ScenesExtractor(device=pipe.device)] if WEIGHTS.is_file() else []
        score(folder.path, [judge.scorer], extractors, bounds=judge.bounds)
    return write(folder, {size: RunFolder(batch_folder(folder, size)) for size in sizes}, problems)


def _grouping(item: Configuration) -> bool:
    return item.name.startswith("grouped-") and item.name not in AUTO


def batch_folder(folder: RunFolder, size: int) -> Path:
    """The run folder of calls of `size` images."""
    return folder.path / "batch-sizes" / f"{size:03d}"
