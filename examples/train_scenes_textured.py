"""Fine-tune the built-in diffusion model for the textured world of Scenes: low-rank changes in one side-car of 4 MB.

    python examples/train_scenes_textured.py --out runs/textured --seconds 400 --start examples/scenes_letters.safetensors

Runs on CPU or GPU; called again, it goes on. `--start` takes the letters, and the layers if there are any, of a side-car;
without it the letters are trained first.

Base weights stay as they are. The side-car holds low-rank changes of the transformer's layers (trained by flow matching
as the model itself was, see train_scenes_diffusion.py) and the text encoders' rows for three more words
(scenes_letters.py). The autoencoder needs no change: it gives textured renders back at 33.0 dB, flat ones at 40.1
(24 renders each).

Every 20 seconds a checkpoint and the side-car of the moving average are written, each at once, so that a run that is
stopped can go on and what it has is of use.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from batched_muon import BatchedMuon
from low_rank import LowRank, exact_times, parameters, safe_backends, velocity
from scenes_latents import Latents, Workers
from scenes_letters import train_letters
from train_scenes_diffusion import image_ids

from accel.core import sidecar
from accel.evaluation.scenes import detail, scale_of
from accel.pipelines import builtin
from accel.pipelines.builtin import textured
from accel.pipelines.builtin.architecture import TEXT_TOKENS, shift_for

LIMIT = 4_000_000  # bytes
EVERY = 20  # seconds between checkpoints


def rank_of(path: str) -> int:
    """Modulations (a third of the model's weights) hardly differ between the worlds."""
    return 12 if path.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")) else 64


class Run:
    """The state of a training run, and its files in `out`."""

    def __init__(self, out: Path, pipe, rate: float, letters: dict[str, torch.Tensor]):
        self.out, self.pipe, self.rate, self.letters = out, pipe, rate, letters
        self.fits = [sidecar.fingerprint(pipe.transformer)]
        torch.manual_seed(0)
        self.low = LowRank(pipe.transformer, rank_of)
        # Muon for A and B: 150 steps of 16 pictures of 128 px end at a loss of 0.383, AdamW's at 0.407 and, at a rate of
        # 4e-3, at 0.395.
        named = self.low.named()
        biases = [p for name, p in named.items() if name.endswith(".bias")]
        matrices = [p for name, p in named.items() if not name.endswith(".bias")]
        self.optimizers = {
            5.0: BatchedMuon(matrices, rate, weight_decay=0.0),  # whose updates are a fifth of the rate
            1.0: torch.optim.AdamW(biases, rate, (0.9, 0.97), weight_decay=0.0),
        }
        self.average = [p.detach().clone() for p in self.low.parameters()]
        self.step, self.seconds = 0, 0.0

    def start(self, file: Path | None) -> None:
        """Go on from a checkpoint of this run or, without one, from a side-car."""
        if (self.out / "flow.pt").exists():
            saved = torch.load(self.out / "flow.pt", weights_only=True)
            self.low.load_state_dict(saved["low"])
            for optimizer, state in zip(self.optimizers.values(), saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            for mean, value in zip(self.average, saved["average"], strict=True):
                mean.copy_(value)
            self.step, self.seconds = saved["step"], saved["seconds"]
            print(f"resumed at step {self.step}, {self.seconds:.0f} s", flush=True)
        elif file is not None and (car := sidecar.read(file, textured.KIND)).layers:
            tensors = {f"{path}.bias": bias for path, bias in car.biases.items()}
            for path, (a, b) in car.layers.items():
                tensors |= {f"{path}.A": a, f"{path}.B": b}
            self.low.load(tensors)
            for mean, p in zip(self.average, self.low.parameters(), strict=True):
                mean.copy_(p)
            print(f"starts from {file}", flush=True)

    def update(self, loss: torch.Tensor, progress: float) -> None:
        """One optimizer step: a short warm-up, then the rate falls linearly to a twentieth."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.low.parameters(), 1.0, foreach=True)
        for scale, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = scale * self.rate * min(1, (self.step + 1) / 20) * (1.05 - min(1, progress))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.99, self.step / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.low.parameters()], 1 - keep)

    def save(self) -> int:
        part = self.out / "flow.part"
        state = {
            "low": self.low.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.values()],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, part)
        part.replace(self.out / "flow.pt")
        named = dict(zip(self.low.named(), self.average, strict=True))
        size = sidecar.write(
            self.out / textured.FILE.name, textured.KIND, self.fits, {**named, **self.letters}, int8=True
        )
        assert size <= LIMIT, f"{size} bytes: lower the ranks"
        return size


def train(run: Run, workers: Workers, args: argparse.Namespace) -> None:
    pipe, model = run.pipe, run.pipe.transformer
    device = model.device
    base, set_times = parameters(model), exact_times(model)
    text_ids = torch.zeros(TEXT_TOKENS, 3, device=device)
    predict = torch.compile(velocity, dynamic=False) if args.compile else velocity
    print(f"{sum(p.numel() for p in run.low.parameters()) / 1e6:.2f} M parameters", flush=True)
    stages = [(size, share) for size, share in zip(args.sizes, args.shares, strict=True)]
    saved_at, ended = time.time(), 0.0
    for (size, share), batch in zip(stages, args.batches, strict=True):
        ended += share * args.seconds
        if run.seconds >= ended:
            continue
        data = Latents(workers, pipe, "textured", run.step, args.count, args.reuse)
        ids, last, losses = image_ids(size // 8, str(device)), time.time(), []
        for latents, tokens, pooled in data.batches(size, batch):
            times = torch.sigmoid(torch.randn(len(latents), device=device) + shift_for(size))
            noise = torch.randn_like(latents)
            noisy = latents + times[:, None, None] * (noise - latents)
            set_times(times)
            inputs = {
                "hidden_states": noisy.to(model.dtype),
                "encoder_hidden_states": tokens.to(model.dtype),
                "pooled_projections": pooled.to(model.dtype),
                "timestep": times,
                "img_ids": ids,
                "txt_ids": text_ids,
                "return_dict": False,
            }
            predicted = predict(model, run.low.changed(base), inputs)
            if run.step == 0 and device.type == "cuda":
                torch.cuda.synchronize()
                print("first forward done", flush=True)
            loss = (predicted - (noise - latents)).square().mean()
            run.update(loss, run.seconds / args.seconds)
            losses.append(loss.detach())
            if run.step % args.log == 0:
                mean = torch.stack(losses).mean().item()  # the one wait for the device
                now = time.time()
                rate = len(losses) * batch / (now - last)
                run.seconds, last, losses = run.seconds + now - last, now, []
                print(
                    f"flow {size} px step {run.step} loss {mean:.4f} {rate:.0f}/s {run.seconds:.0f} s",
                    flush=True,
                )
                if now - saved_at > EVERY:
                    run.save()
                    saved_at = time.time()
                if run.seconds >= ended:
                    break
    print(f"side-car: {run.save()} bytes", flush=True)


@torch.no_grad()
def evaluate(run: Run, folder: Path, count: int, steps: int) -> None:
    """A contact sheet of fresh prompts, and how many the detector takes for right."""
    from PIL import Image

    from accel.evaluation import judges, suites

    pipe = builtin.load_pipeline(str(run.pipe.device), world="flat")
    textured.add_to(pipe, run.out / textured.FILE.name)
    lines = suites.take(suites.scenes(per_task=-(-count // 6), seed=5).prompts, count)
    small = [line for scale in detail("test", -(-count // 24), 5).values() for line in scale]
    lines += [suites.Prompt(i, line.prompt, line) for i, line in enumerate(small, len(lines))]
    images = []
    for start in range(0, len(lines), 32):
        texts = [line.text for line in lines[start : start + 32]]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(texts))]
        out = pipe(texts, num_inference_steps=steps, generator=generators, output_type="pt").images
        images.append(out.float().cpu())
    pictures = torch.cat(images)
    found = judges.scenes_judge().scorer(pictures, None, lines)
    tasks: dict[str, list[float]] = {}
    for line, row in zip(lines, found, strict=True):
        name = scale_of(line.text) or line.metadata.tag
        tasks.setdefault(name, []).append(row["value"])
    print({task: f"{sum(v):.0f}/{len(v)}" for task, v in tasks.items()}, flush=True)
    columns = 12
    rows = -(-len(pictures) // columns)
    sheet = torch.ones(rows * columns, 3, 128, 128)
    sheet[: len(pictures)] = torch.nn.functional.avg_pool2d(pictures, 2)
    sheet = sheet.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray((sheet * 255).byte().numpy()).save(folder / "textured.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint, side-car and pictures"
    )
    parser.add_argument("--start", type=Path, help="a side-car to go on from; its letters are kept")
    parser.add_argument("--seconds", type=float, required=True, help="of training, all calls together")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="pixels, stage by stage")
    parser.add_argument("--shares", type=float, nargs="+", default=[1], help="of the time, by stage")
    parser.add_argument(
        "--batches", type=int, nargs="+", help="stage by stage; default: 96 on a GPU, 8 on CPU"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="the model; it took 40 s on an H200; default: on a GPU",
    )
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--letters", type=int, default=500, help="steps for the new words' letters")
    parser.add_argument("--count", type=int, help="scenes encoded at once; default 2048 on a GPU, 64 on CPU")
    parser.add_argument("--reuse", type=int, default=4, help="how often each of them is used")
    parser.add_argument("--workers", type=int, default=2, help="threads that draw scenes")
    parser.add_argument("--plain", action="store_true", help="float32 (TF32) and attention as two matmuls")
    parser.add_argument("--log", type=int, default=10, help="steps between lines")
    parser.add_argument("--evaluate", type=int, default=48, help="prompts drawn at the end; 0: none")
    parser.add_argument("--steps", type=int, default=16, help="of those pictures")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    args.batches = args.batches or [96 if gpu else 8] * len(args.sizes)
    args.count = args.count or (2048 if gpu else 64)
    workers = Workers(args.workers)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = builtin.load_pipeline(dtype=safe_backends(args.plain))
    pipe.vae.requires_grad_(False)
    letters = sidecar.read(args.start, textured.KIND).extra if args.start else None
    letters_file = args.out / "letters.safetensors"
    if not letters and letters_file.exists():
        letters = sidecar.read(letters_file, textured.KIND).extra
    if not letters:
        letters = train_letters(builtin.load_pipeline(), 0, args.letters)
        sidecar.write(letters_file, textured.KIND, [], letters)
    textured.spell(pipe, letters)
    run = Run(args.out, pipe, args.rate, dict(letters))
    run.start(args.start)
    train(run, workers, args)
    workers.close()
    if args.evaluate:
        evaluate(run, args.out, args.evaluate, args.steps)


if __name__ == "__main__":
    main()
