"""Which settings give the closest pictures for what they compute? Quality against cost, not against the clock.

    python examples/sweep_policies.py sweep.jsonl                                # accel's and the peers' settings
    python examples/sweep_policies.py sweep.jsonl --steps 5 --policies mine.yaml
    python examples/sweep_policies.py sweep.jsonl --policies mine.yaml --seed 2  # other prompts, other noise

`mine.yaml` maps names to configurations as in accel's presets (`prune: {method: token_pruning, budget: 0.3}`).
Cost is the denoiser's multiply-accumulates in steps of the plain pipeline: it is the same on a busy machine, and
it is not a speedup (`accel bench peers` measures that). PSNR is to the plain pictures, of the same noise. Every
result is a line of the file; a stopped sweep goes on where it was. Rows on the frontier of cost and the 10th
percentile of PSNR are marked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from accel import configs
from accel.evaluation import suites
from accel.evaluation.bench.macs import counted
from accel.evaluation.bench.peers import Peer, fewer_steps, ours, theirs
from accel.evaluation.configurations import PLAIN, Configuration
from accel.evaluation.metrics.pixel import psnr
from accel.evaluation.models import load_pipeline


def images(
    pipe: Any, item: Configuration, prompts: Sequence[str], batch: int, call: dict[str, Any], seed: int
) -> tuple[Tensor, int]:
    """Pictures (n, 3, H, W) of all prompts, and the denoiser's multiply-accumulates for them."""
    own = {} if item.steps is None else {"num_inference_steps": item.steps}
    if isinstance(item, Peer):  # theirs decide for a whole batch: one picture, as users run them
        batch = 1
    pictures, macs = [], 0
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        generators = [torch.Generator("cpu").manual_seed(1000 * seed + start + i) for i in range(len(some))]
        with item.attach(pipe), counted(pipe) as count:
            made = pipe(some, generator=generators, output_type="pt", **{**call, **own}).images
        pictures.append(made.float().cpu())
        macs += count.macs
    return torch.cat(pictures), macs


def table(results: Sequence[dict[str, Any]]) -> str:
    """Rows by cost; `*` where nothing cheaper or equally cheap has a better 10th percentile."""
    lines = [
        "|   | policy | cost, steps | speed bound | PSNR | p10 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    best = float("-inf")
    for row in sorted(results, key=lambda r: (r["cost"], -r["p10"])):
        mark, best = ("*", row["p10"]) if row["p10"] > best else ("", best)
        bound = row["steps"] / row["cost"]
        cells = [
            mark,
            row["name"],
            f"{row['cost']:.2f}",
            f"{bound:.2f}x",
            f"{row['psnr']:.2f}",
            f"{row['p10']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON lines, continued if it exists")
    parser.add_argument("--model", default="builtin", help="builtin, a diffusers folder or a hub id")
    parser.add_argument("--policies", type=Path, nargs="*", default=[], help="YAML: name -> configuration")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--limit", type=int, default=12, help="number of prompts, tasks in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts drawn and their noise")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--size", type=int, help="height and width; default: the pipeline's")
    parser.add_argument("--dtype", default=None, help="default: the model's on this device")
    parser.add_argument("--device", help="cuda or cpu")
    args = parser.parse_args()

    known: list[Configuration] = [*fewer_steps(args.steps), *ours(args.steps), *theirs(args.steps)]
    if args.policies:
        known = [
            Configuration(name, configs.load(settings))
            for path in args.policies
            for name, settings in yaml.safe_load(path.read_text(encoding="utf-8")).items()
        ]
    prompts = [prompt.text for prompt in suites.take(suites.scenes(seed=args.seed).prompts, args.limit)]
    call = {"num_inference_steps": args.steps} | (
        {"height": args.size, "width": args.size} if args.size else {}
    )
    setting = {"model": args.model, "limit": args.limit, "size": args.size, "dtype": args.dtype, **call}
    setting |= {"seed": args.seed} if args.seed else {}
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    results = [row for row in map(json.loads, lines) if row["setting"] == setting]
    done = {row["hash"] for row in results}

    todo = [item for item in known if item.hash not in done]
    for item in [item for item in todo if isinstance(item, Peer) and item.missing]:
        print(f"{item.name}: skipped, {item.package} is not installed")
        todo.remove(item)
    if todo:
        pipe = load_pipeline(args.model, device=args.device, dtype=args.dtype)
        pipe.set_progress_bar_config(disable=True)
        plain, macs = images(pipe, Configuration(PLAIN), prompts, args.batch, call, args.seed)
        for item in todo:
            made, own = images(pipe, item, prompts, args.batch, call, args.seed)
            values = psnr(made, plain)
            row = {
                **item.describe(),
                "name": item.name,
                "hash": item.hash,
                "cost": own / macs * args.steps,
                "steps": args.steps,
                "psnr": values.mean().item(),
                "p10": values.quantile(0.1).item(),
                "values": values.tolist(),
                "setting": setting,
            }
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            results.append(row)
            print(
                f"{row['name']}: cost {row['cost']:.2f}, PSNR {row['psnr']:.2f}, p10 {row['p10']:.2f}",
                flush=True,
            )
    print(table(results))


if __name__ == "__main__":
    main()
