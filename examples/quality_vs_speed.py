"""Is an acceleration worth it for your model and prompts? Compare, and open one page.

    python examples/quality_vs_speed.py                                   # built-in model, 66 held-out prompts
    python examples/quality_vs_speed.py --model FOLDER_OR_HUB_ID --prompts my_prompts.txt
    python examples/quality_vs_speed.py --model my_pipeline.py:make --prompts my_prompts.txt

Compares the plain pipeline with token merging at two ratios and with two settings of fewer steps, which
is what every acceleration has to beat. Everything is resumable: stop it with Ctrl-C, start it again.
The same from the command line:

    accel evaluate all OUT -c merge30:merging,ratio=0.3 -c merge50:merging -c steps=12 -c steps=8 --limit 66
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from accel import configs
from accel.evaluation import extractors, judges, models, scorers, suites
from accel.evaluation.configurations import Configuration
from accel.evaluation.report import report
from accel.evaluation.run import Progress, run
from accel.evaluation.score import score
from accel.generation import default_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("accel-out/quality-vs-speed"))
    parser.add_argument(
        "--model",
        default="builtin",
        help="builtin, a diffusers folder, a hub id, or file.py:function that returns your pipeline",
    )
    parser.add_argument("--prompts", help="a text file, one prompt a line; default: the scenes suite")
    parser.add_argument("--limit", type=int, default=66, help="number of prompts")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.3, 0.5], help="share of tokens merged")
    parser.add_argument(
        "--steps", type=int, nargs="*", help="fewer-step settings; default: 0.6 and 0.4 of all"
    )
    parser.add_argument("--device", help="cuda or cpu")
    args = parser.parse_args()

    suite = suites.load(args.prompts or "scenes")
    pipe = models.load_pipeline(args.model, device=args.device)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)

    merging = configs.load("merging")
    configurations = [
        Configuration(f"merge-{ratio:g}", dataclasses.replace(merging, ratio=ratio)) for ratio in args.ratios
    ]
    all_steps = default_steps(pipe) or 20
    fewer = [round(0.6 * all_steps), round(0.4 * all_steps)] if args.steps is None else args.steps
    configurations += [Configuration(f"steps={steps}", steps=steps) for steps in fewer]

    def show(progress: Progress) -> None:
        print(f"\r{progress.done}/{progress.total} images", end="", flush=True)

    folder = run(args.out, suite, pipe, configurations, model=args.model, limit=args.limit, progress=show)

    # PSNR and SSIM compare with the plain pipeline's images. The scenes suite is judged by a detector as
    # well, and its images as a set are measured against ground truth. For your own prompts, a detector is
    # any function of images that returns `Detection`s: see `accel.evaluation.scorers.DetectionScorer`.
    wanted, features, truth, bounds = scorers.pixel_scorers(), [], None, None
    if suite.name == "scenes":
        judge = judges.scenes_judge()
        wanted, bounds = [judge.scorer, *wanted], judge.bounds
        features, truth = [extractors.load("scenes")], judges.write_ground_truth(folder)
    score(args.out, wanted, features, reference=truth, bounds=bounds)

    page = report(args.out)
    print(f"\n{page.with_name('report.md').read_text()}\n{page}")


if __name__ == "__main__":
    main()
