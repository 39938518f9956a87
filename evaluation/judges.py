"""Which detector judges which suite, with its ceiling and floor, and the check that it sees at all."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import EvaluationError, SanityError
from .folder import RunFolder
from .geneval.metadata import Metadata, ObjectSpec, read_place
from .geneval.scorer import Verdict, aggregate, score
from .picture_files import load_pictures, picture_files
from .records import write_atomically
from .score import GROUND_TRUTH
from .scorers import DetectionScorer, Detector
from .suites import Prompt

_BATCH = 16


@dataclass(frozen=True)
class Judge:
    """A suite's scorer and, where the suite can draw its own ground truth, ceiling and floor."""

    scorer: DetectionScorer
    bounds: Callable[[Sequence[Prompt]], dict[str, Any]] | None = None


def scenes_judge(size: int = 256) -> Judge:
    """The built-in detector, checked on pictures drawn from the prompts before anything is judged."""
    from . import scenes

    def detect(images: torch.Tensor, metadata: Sequence[Metadata]) -> list:
        return scenes.detect(images, [scenes.scale_of(line.prompt) for line in metadata])

    def draw(metadata: Sequence[Metadata]) -> torch.Tensor:
        return draw_scenes(metadata, size, seed=0)

    def bounds(prompts: Sequence[Prompt]) -> dict[str, Any]:
        return ceiling_and_floor([p.metadata for p in prompts if p.metadata], draw, detect)

    check = scenes.prompts("test", 1, 0)
    sanity(detect, list(zip(draw(check), check, strict=True)))
    return Judge(DetectionScorer("scenes", detect), bounds)


def draw_scenes(metadata: Sequence[Metadata], size: int, *, seed: int | Sequence[int]) -> torch.Tensor:
    """Ground truth: one picture of each line of the scenes suites, (B, 3, size, size) uint8. Lines with a word of
    scale are of the textured world."""
    from . import scenes

    world = "textured" if any(scenes.scale_of(line.prompt) for line in metadata) else "flat"
    drawn = scenes.render(scenes.sample_scenes(list(metadata), np.random.default_rng(seed), world), size)
    return (drawn * 255).round().to(torch.uint8)


def write_ground_truth(folder: RunFolder, size: int = 256) -> Path:
    """Draw a picture of every prompt and sample of a scenes run, as a reference to measure distances to.

    Returns their folder. Pictures that exist are kept; one prompt's do not depend on which others there are.
    """
    target, prompts = folder.path / GROUND_TRUTH, folder.prompts()
    for record in folder.known_samples(prompts):
        file = target / f"{record['prompt_id']:05d}-{record['sample']:04d}.png"
        metadata = prompts[record["prompt_id"]].metadata
        if record["configuration"] != folder.plain or metadata is None or file.exists():
            continue
        (image,) = draw_scenes([metadata], size, seed=[record["prompt_id"], record["sample"]])
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png")
        write_atomically(file, buffer.getvalue())
    return target


def geneval_judge(
    detector: str, clip: str, *, sanity_images: str | Path | None = None, device: str | torch.device = "cpu"
) -> Judge:
    """GenEval (transformers port): Mask2Former at `detector`, CLIP ViT-L/14 at `clip` (folders or hub ids).

    Checked first on `sanity_images` (a folder in GenEval's layout whose pictures are known to be
    right) or, without one, on the photographs that scikit-image brings along.
    """
    from .geneval.detector import Mask2FormerDetector

    detect = Mask2FormerDetector(detector, clip, device=device)
    sanity(detect, _known_pictures(sanity_images))
    return Judge(DetectionScorer("geneval (transformers port)", detect))


def sanity(detect: Detector, known: Sequence[tuple[torch.Tensor, Metadata]]) -> float:
    """Share of known pictures judged correct. `SanityError` if the detector sees none of the objects
    that are certainly there: a detector that is loaded wrongly gives a silent zero for every image."""
    right, seen = 0, []
    for image, metadata in known:
        detections = detect(image[None], [metadata])[0]
        verdict = score(detections, metadata)
        right += verdict.correct
        seen += [f"{metadata.prompt!r}: {', '.join(d.label for d in verdict.counted) or 'nothing'}"]
    if not right:
        raise SanityError(
            f"the detector is right about none of {len(known)} pictures with known content "
            f"(it saw {'; '.join(seen)}); check its weights and labels before believing any score"
        )
    return right / len(known)


def ceiling_and_floor(
    metadata: Sequence[Metadata],
    draw: Callable[[Sequence[Metadata]], torch.Tensor],
    detect: Detector,
) -> dict[str, Any]:
    """Ceiling: ground-truth pictures judged by their prompts. Floor: the same pictures judged by
    another prompt of the same task that asks for something else."""
    right: list[Verdict] = []
    wrong: list[Verdict] = []
    others = mismatched(metadata)
    for start in range(0, len(metadata), _BATCH):
        own = metadata[start : start + _BATCH]
        for line, other, detections in zip(
            own, others[start : start + _BATCH], detect(draw(own), own), strict=True
        ):
            right.append(score(detections, line))
            if other is not None:
                wrong.append(score(detections, other))
    bounds = {"ceiling": aggregate(right).to_dict()}
    return bounds | ({"floor": aggregate(wrong).to_dict()} if wrong else {"floor": None})


def mismatched(metadata: Sequence[Metadata]) -> list[Metadata | None]:
    """For each prompt the next one of its task that asks for something else; None if all ask the same."""
    tasks: dict[str, list[int]] = {}
    for number, line in enumerate(metadata):
        tasks.setdefault(line.tag, []).append(number)
    result: list[Metadata | None] = [None] * len(metadata)
    for members in tasks.values():
        for place, number in enumerate(members):
            following = members[place + 1 :] + members[:place]
            result[number] = next(
                (metadata[i] for i in following if metadata[i].include != metadata[number].include), None
            )
    return result


def _known_pictures(folder: str | Path | None) -> list[tuple[torch.Tensor, Metadata]]:
    if folder is not None:
        known = [
            (image, read_place(path.parent))
            for path in sorted(Path(folder).glob("*/metadata.jsonl"))
            for _, image in load_pictures(picture_files(path.parent / "samples"))
        ]
        if not known:
            raise EvaluationError(
                f"{folder}: no sanity images that can be read (<id>/metadata.jsonl, <id>/samples/*.png)"
            )
        return known
    try:
        from skimage import data
    except ImportError as error:
        raise EvaluationError(
            "no sanity images: give a folder of known pictures in GenEval's layout, or "
            "pip install scikit-image, which brings some photographs"
        ) from error
    # Shipped inside scikit-image's wheel; nothing is downloaded.
    pictures = {"person": data.astronaut(), "cat": data.chelsea(), "cup": data.coffee()}
    return [
        (
            torch.from_numpy(np.array(picture)).permute(2, 0, 1),
            Metadata("single_object", (ObjectSpec(label),), f"a photo of a {label}"),
        )
        for label, picture in pictures.items()
    ]
