"""Write the model card of a trained autoregressive model: recipe, seed, loss curve and scores, into its folder.

    python examples/write_model_card_ar.py runs/scenes-janus runs/scenes-eval     # training, evaluation

The training folder is what train_scenes_ar.py wrote; the evaluation folder is what
`accel evaluate all --model runs/scenes-janus/model` wrote. Every number of the card comes from these two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from write_model_card import score_rows

from accel.pipelines.builtin.janus_architecture import CODE_DIM, CODES, HEADS, LAYERS, WIDTH

BAR = 0.75

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
tags: [scenes, janus, text-to-image]
---

# Scenes Janus

The built-in autoregressive model of [accel](../../../README.md), in `JanusForConditionalGeneration` +
`JanusProcessor` format: a Llama of {layers} layers, width {width} and {heads} heads ({llama:.1f} M parameters) and a VQ
model ({vq:.1f} M) that turns 128 px into 16 x 16 tokens of {codes} codes. It draws what Scenes contains: one to
four of circles, squares, triangles, stars, hearts, crosses, rings and moons, in ten colours. It knows no other words.
{verdict}
## Scores

Scenes, held-out combinations: {images} images of {prompts} prompts, plain decoding with the folder's own sampling
(guidance {guidance_scale:g}, temperature {temperature:g}, {top_k}); judged by GenEval's rules with the Scenes
detector. 95% intervals by bootstrap over prompts.

| task | score | interval | detector on ground truth | on mismatched prompts |
|---|---|---|---|---|
{scores}

Tokenizer alone, 192 renders of training captions: {reconstructions:.1%} of the reconstructions show what the caption
asks for (renders themselves {renders:.1%}), PSNR {psnr:.1f} dB.

## Recipe

`examples/train_scenes_ar.py`, seed {seed}, {device}, {minutes:.0f} minutes for the token stage.

- Codes: k-means centres of 8x8 px patches, 16 of the {codes} for plain ground, laid out on the unit sphere in
  {code_dim} dimensions so that patches that look alike are close.
- VQ model: encoder and decoder learn to name and to paint these codes, {vq_samples:,} crops of 64 px or their equal
  in pixels. The encoder names {encoder_agrees:.1%} of an image's tokens exactly as k-means does.
- Tokens: {samples:,} samples in batches of {batch}, each render used {reuse}x; Muon for the layers' matrices,
  AdamW for the rest, rate {lr}, falling to zero over the last {decay:.0%} of the run; bfloat16; 10% captions
  dropped; {wrong:.0%} of the tokens that the model reads are wrong; training-only heads that say what the caption
  asks for and which shape and colour the next tokens belong to (weight {heads_weight}).

![Loss](loss.png)

## Limits

- Grounds are plain: textures of Scenes' grounds share 16 codes.
- The vision tower, which Janus reads given images with, is in the format but untrained: text to image only.
- Captions in lower case, as Scenes words them; letters are tokens, too, so that other words do not fail, but they
  mean nothing.
"""


def draw_curve(curve: list[list[float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot([row[0] / 1000 for row in curve], [row[1] for row in curve])
    axes.set(xlabel="thousand samples", ylabel="cross-entropy per token (one batch)", yscale="log")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("training", type=Path)
    parser.add_argument("evaluation", type=Path)
    args = parser.parse_args()
    recipe = json.loads((args.training / "recipe.json").read_text())
    report = json.loads((args.evaluation / "report" / "report.json").read_text())
    plain = next(row for row in report["configurations"] if row["name"] == report["plain"])
    score = plain["metrics"][report["suite_metric"]]["mean"]["value"]
    verdict = ""
    if score < BAR:
        verdict = (
            f"\nA stepping stone: its score of {score:.2f} is below the {BAR} that a longer training, on a GPU, is to "
            "reach with the same command.\n"
        )
    folder = args.training / "model"
    draw_curve(recipe["curve"], folder / "loss.png")
    names = ("seed", "device", "samples", "batch", "reuse", "lr", "decay", "wrong", "vq_samples")
    card = CARD.format(
        **{name: recipe[name] for name in (*names, "guidance_scale", "temperature")},
        **recipe["vq"],
        top_k=f"top-k {recipe['top_k']}" if recipe["top_k"] else "no top-k",
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        codes=CODES,
        code_dim=CODE_DIM,
        llama=recipe["parameters"]["language_model"] / 1e6,
        vq=recipe["parameters"]["vqmodel"] / 1e6,
        heads_weight=recipe["heads"],
        minutes=recipe["seconds"] / 60,
        verdict=verdict,
        images=report["images"],
        prompts=report["prompts"],
        scores=score_rows(report),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
