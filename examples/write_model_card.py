"""Write the model card of a trained model: recipe, seed, loss curve and scores, into its pipeline folder.

    python examples/write_model_card.py runs/scenes-flux runs/scenes-eval     # training folder, evaluation folder

The training folder is what train_scenes_diffusion.py wrote; the evaluation folder is what `accel evaluate all`
wrote for this model. Every number of the card comes from these two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [scenes, flux, text-to-image]
---

# Scenes FLUX

The built-in diffusion model of [accel](../../../README.md): {parameters:.1f} M parameters in the transformer, in
`FluxPipeline` format (2 dual-stream and 6 single-stream blocks of width 256, rotary positions, flow matching), with
its own small T5 and CLIP text encoders and `AutoencoderKL` (4x4 pixels to 4 channels, so 8 px a token). It draws
what Scenes contains: one to four of {shapes}, in ten colours, at 256 px. It knows no other words.

## Scores

Scenes, held-out combinations: {images} images of {prompts} prompts, {call}; judged by GenEval's rules with the
Scenes detector. 95 % intervals by bootstrap over prompts.

| task | score | interval | detector on ground truth | on mismatched prompts |
|---|---|---|---|---|
{scores}

## Recipe

`examples/train_scenes_diffusion.py`, seed {seed}, {device}, {minutes:.0f} minutes for the flow stage.

- Text side: {text_steps} batches of 192 captions; learns to say of every noun the sum of its shape's, colour's,
  number's and relation's vectors, then stays frozen. It reads captions of held-out combinations, too; images of
  them are never rendered.
- Autoencoder: {vae_samples} renders of 64 px or their equal in pixels; PSNR at 256 px {vae_psnr:.1f} dB.
- Flow: {stages}; batches of {batches}; Muon for the blocks' matrices, AdamW for the rest, rate {lr}, falling to zero
  over the last {decay:.0%} of the run; bfloat16; 10 % captions dropped; a training-only head that predicts each
  token's shape and colour (weight 0.2); a moving average of the weights, started afresh at each size.
{history}
![Loss](loss.png)
"""


def stages(plan: list[list[int]]) -> str:
    return ", then ".join(f"{samples:,} samples at {size} px" for size, samples in plan)


def draw_curve(curve: list[list[float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for size in sorted({row[0] for row in curve}):
        rows = [row for row in curve if row[0] == size]
        axes.plot([row[4] / 60 for row in rows], [row[2] for row in rows], label=f"{size} px")
    axes.set(xlabel="minutes", ylabel="velocity loss (one batch)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=80)


def score_rows(report: dict) -> str:
    """Lines of a table: task, score, interval, score of true renders, score of mismatched prompts."""
    plain = next(row for row in report["configurations"] if row["name"] == report["plain"])
    metric = plain["metrics"][report["suite_metric"]]
    bounds = report["bounds"]

    def row(name: str, entry: dict, ceiling: dict, floor: dict) -> str:
        interval = f"{entry['low']:.2f} to {entry['high']:.2f}"
        return (
            f"| {name} | {entry['value']:.3f} | {interval} | {ceiling['value']:.2f} | {floor['value']:.2f} |"
        )

    rows = [
        row(task, entry, bounds["ceiling"]["tasks"][task], bounds["floor"]["tasks"][task])
        for task, entry in metric["tasks"].items()
    ]
    rows.append(row("**overall**", metric["mean"], bounds["ceiling"]["overall"], bounds["floor"]["overall"]))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("training", type=Path)
    parser.add_argument("evaluation", type=Path)
    args = parser.parse_args()
    recipe = json.loads((args.training / "recipe.json").read_text())
    report = json.loads((args.evaluation / "report" / "report.json").read_text())
    call = ", ".join(f"{key} {value}" for key, value in report["run"]["call"].items())
    pipeline = args.training / "pipeline"
    draw_curve(recipe["curve"], pipeline / "loss.png")
    card = CARD.format(
        **{
            key: recipe[key]
            for key in ("seed", "device", "lr", "decay", "text_steps", "vae_samples", "vae_psnr")
        },
        parameters=recipe["parameters"] / 1e6,
        minutes=recipe["seconds"] / 60,
        stages=stages(recipe["plan"]),
        batches=", ".join(map(str, recipe["batches"])),
        history=f"\n{recipe['history']}\n" if "history" in recipe else "",
        shapes="circles, squares, triangles, stars, hearts, crosses, rings and moons",
        images=report["images"],
        prompts=report["prompts"],
        call=call or "the pipeline's defaults",
        scores=score_rows(report),
    )
    (pipeline / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
