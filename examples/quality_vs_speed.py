"""Is an acceleration worth it for your model and prompts? Compare, and open one page.

    python examples/quality_vs_speed.py                                   # built-in model, 66 held-out prompts
    python examples/quality_vs_speed.py --model FOLDER_OR_HUB_ID --prompts my_prompts.txt

Compares the plain pipeline with token merging at two ratios and with two settings of fewer steps, which
is what every acceleration has to beat. Everything is resumable: stop it with Ctrl-C, start it again.
The same from the command line:

    accel evaluate all OUT -c merge30:balanced,ratio=0.3 -c merge50:balanced,ratio=0.5 -c steps=12 -c steps=8
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from accel import configs
from accel.evaluation import judges, models, scorers, suites
from accel.evaluation.configurations import Configuration
from accel.evaluation.report import report
from accel.evaluation.run import Progress, run
from accel.evaluation.score import score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("accel-out/quality-vs-speed"))
    parser.add_argument("--model", default="builtin", help="builtin, a diffusers folder or a hub id")
    parser.add_argument("--prompts", help="a text file, one prompt a line; default: the scenes suite")
    parser.add_argument("--limit", type=int, default=66, help="number of prompts")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.3, 0.5], help="share of tokens merged")
    parser.add_argument("--steps", type=int, nargs="*", default=[12, 8], help="fewer-step settings")
    parser.add_argument("--device", help="cuda or cpu")
    args = parser.parse_args()

    suite = suites.load(args.prompts or "scenes")
    pipe = models.load_pipeline(args.model, device=args.device)
    pipe.set_progress_bar_config(disable=True)

    merging = configs.load("balanced")
    configurations = [
        Configuration(f"merge-{ratio:g}", dataclasses.replace(merging, ratio=ratio)) for ratio in args.ratios
    ]
    configurations += [Configuration(f"steps={steps}", steps=steps) for steps in args.steps]

    def show(progress: Progress) -> None:
        print(f"\r{progress.done}/{progress.total} images", end="", flush=True)

    run(args.out, suite, pipe, configurations, model=args.model, limit=args.limit, progress=show)

    # With your own prompts there is no detector: the images are compared with the plain pipeline's.
    judge = judges.scenes_judge() if suite.name == "scenes" else None
    wanted = [*([judge.scorer] if judge else []), *scorers.pixel_scorers()]
    score(args.out, wanted, bounds=judge.bounds if judge else None)
    print(f"\n{report(args.out)}")


if __name__ == "__main__":
    main()
