"""Generate many images from a script: batches, own seeds, plain against accelerated.

python examples/generate_from_script.py --num 4 --out images
"""

import argparse
from pathlib import Path

from accel import configs
from accel.evaluation.metrics.pixel import psnr
from accel.evaluation.pictures import Column, side_by_side
from accel.generation import Job, Settings, batches, load_pipeline, timed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="builtin")
parser.add_argument("--prompt", default="a photo of a purple heart and a yellow ring")
parser.add_argument("--preset", default="balanced")
parser.add_argument("--num", type=int, default=4)
parser.add_argument("--steps", type=int, default=None)
parser.add_argument("--out", type=Path, default=Path("accel-out/script"))
args = parser.parse_args()


pipe = load_pipeline(args.model)
settings, config = Settings(steps=args.steps), configs.load(args.preset)
jobs = [Job(args.prompt, seed) for seed in range(args.num)]
for number, group in enumerate(batches(jobs, 2)):
    plain = timed(pipe, group, settings)
    fast = timed(pipe, group, settings, config)
    columns = [
        Column("plain", f"{plain.seconds:.1f} s", plain.images),
        Column(args.preset, f"{fast.seconds:.1f} s", fast.images),
    ]
    side_by_side([job.prompt for job in group], columns, args.out / f"batch-{number}.png")
    print(
        f"batch {number}: {plain.seconds / fast.seconds:.2f}x, PSNR {psnr(plain.images, fast.images).mean():.1f} dB"
    )
