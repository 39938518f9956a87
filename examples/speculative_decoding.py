"""Fewer forwards for an autoregressive model, and a picture of where they were saved.

    python examples/speculative_decoding.py                                       # the built-in model
    python examples/speculative_decoding.py --model deepseek-community/Janus-Pro-1B --prompt "a cat on a sofa"
    python examples/speculative_decoding.py --preset grouped                      # faster, not lossless

Needs matplotlib. Below each image stands how many of its tokens became final in the same forward, token by token: long runs where
the model is sure, short ones where the picture is decided.
"""

import argparse
from pathlib import Path

import torch

import accel
from accel.generation import load_pipeline


def heat_map(images: list, run_BT: torch.Tensor, path: Path) -> None:
    """Images above the lengths of their accepted runs, over the grid of tokens (matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(images) + 0.8, 5), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, image in enumerate(images):
        axes[0, column].imshow(image)
        shown = axes[1, column].imshow(run_BT[column], cmap="magma", vmin=1, vmax=int(run_BT.max()))
    for one in axes.flat:
        one.set_axis_off()
    figure.colorbar(shown, ax=axes[1].tolist(), label="tokens in the same forward")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin-ar", help="builtin-ar, a folder or a hub id")
    parser.add_argument("--prompt", default="a photo of a red circle left of a blue square")
    parser.add_argument("--preset", default="lossless", help="lossless, grouped, or a YAML file")
    parser.add_argument("--num", type=int, default=4, help="images, decoded together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("accel-out/accepted-runs.png"))
    args = parser.parse_args()

    pipe = load_pipeline(args.model)
    handle = accel.accelerate(pipe, args.preset)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num)]
    images = pipe([args.prompt] * args.num, generator=generators).images
    print(handle.stats)

    layout = pipe.adapter.layout(None, None)
    run_BT = layout.finished(handle.stats.runs_BN)  # without forced tokens, row by row
    heat_map(images, run_BT.view(-1, layout.rows, layout.columns), args.out)
    print(f"saved: {args.out}")

    handle.remove()  # plain decoding again
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num)]
    plain = pipe([args.prompt] * args.num, generator=generators).images
    same = sum(a.tobytes() == b.tobytes() for a, b in zip(images, plain, strict=True))
    print(f"{same} of {args.num} images are plain decoding's, pixel for pixel")


if __name__ == "__main__":
    main()
