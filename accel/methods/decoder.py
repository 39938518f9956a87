"""A learned decoder: how the tokens of a window differ from each other, told anew at every reduced step.

A reduced step computes the mean of each window. How a token deviates from it is carried on from the steps before, while
the picture becomes sharper. The decoder is a few convolutions behind the model that see the picture of the step before,
the one that was carried, and the prediction, and say what the deviations lack; the means stay as they were computed.

DC-DiT (arXiv:2603.06351) has light convolutions behind its tokens, trained along with the model. These see predictions
alone, and train along with the model's low-rank changes (`examples/upcycle_chunking.py`), in whose side-car they are.

Shapes: B images, N = H*W tokens, c channels of a prediction.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.core.plan import TokenPlan
from accel.core.run import Run
from accel.core.sidecar import SideCar
from accel.errors import WeightsError
from accel.methods import windows

#: Its tensors' names in a side-car begin so.
PREFIX = "decoder."

NOTHING_CARRIED = "the side-car's decoder is off: it adds to deviations that are carried, and none are"


class Decoder(nn.Module):
    """What to add to a carried prediction; nothing, as it starts.

    Args:
        channels: c.
        width: channels in between.
        depth: residual blocks of two 3x3 convolutions.
    """

    def __init__(self, channels: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3 * channels + 2, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.exit = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.exit.weight)
        assert self.exit.bias is not None
        nn.init.zeros_(self.exit.bias)

    def forward(
        self,
        last_BNc: Tensor,
        now_BNc: Tensor,
        carried_BNc: Tensor,
        plan: TokenPlan,
        noise: float,
        grid: tuple[int, int],
    ) -> Tensor:
        """(B, N, c), zero for tokens that were computed alone, and of mean zero in every window.

        Args:
            last_BNc, now_BNc: the pictures that the step before predicted, and this one as carried.
            carried_BNc: this step's prediction, as the model makes them.
            noise: its share of the sample, in (0, 1).
        """
        size_BN = plan.size.gather(1, plan.owner).expand(len(last_BNc), -1)
        known_BNc = torch.cat([last_BNc, now_BNc, carried_BNc], 2)
        place_BN2 = torch.stack([size_BN.log(), torch.full_like(size_BN, noise)], 2)
        x_BCHW = torch.cat([known_BNc, place_BN2.to(known_BNc.dtype)], 2).transpose(1, 2).unflatten(2, grid)
        x_BCHW = self.entry(x_BCHW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        change_BNc = self.exit(F.silu(x_BCHW)).flatten(2).transpose(1, 2)
        change_BNc = change_BNc - plan.expand(plan.reduce(change_BNc))
        return change_BNc * (size_BN > 1)[..., None]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.second(F.silu(self.first(F.silu(x_BCHW))))


class Decoding:
    """A decoder at work on one denoiser.

    Attributes:
        last_BNc: the picture that the step before predicted, put here between steps.
    """

    def __init__(self, net: Decoder) -> None:
        self.net = net
        self.last_BNc: Tensor | None = None

    @torch.no_grad()
    def step(self, run: Run, plan: TokenPlan) -> None:
        """The scheduler is about to step with a carried prediction: add to it, and to what each call of the step put
        out, from which the next steps carry on. The scheduler is taken to get the calls' outputs, or guidance's sum of
        them with weights that add up to one, as on FLUX: what is added to each is then added to their sum. Pipelines that
        turn the sign or rescale what they hand on would need this known; a decoder is trained for one model.

        Raises:
            WeightsError: it is for predictions of another number of channels.
        """
        clock, grid, denoiser = run.clock, run.grid, run.target.denoiser
        assert run.target.adapter.tokens is not None
        assert grid is not None
        assert self.last_BNc is not None
        tokens, output = run.target.adapter.tokens, clock.model_output
        now_BNc, carried_BNc = windows.picture(run, clock.step), tokens.of(denoiser, output, grid)
        dtype = (
            torch.bfloat16 if carried_BNc.is_cuda or carried_BNc.dtype == torch.bfloat16 else torch.float32
        )
        net = self.net.to(carried_BNc.device, dtype)
        if net.exit.out_channels != carried_BNc.shape[2]:
            raise WeightsError(
                f"the side-car's decoder is for {net.exit.out_channels} channels a token, and this model predicts "
                f"{carried_BNc.shape[2]}. Use the side-car of this model, or none"
            )
        inputs = (t.to(dtype) for t in (self.last_BNc, now_BNc, carried_BNc))
        noise = 1 / (1 + math.exp(run.time))
        change_BNc = net(*inputs, plan.of_images(len(carried_BNc)), noise, grid)

        def changed(prediction: Tensor) -> Tensor:
            of_BNc = tokens.of(denoiser, prediction, grid)
            more_BNc = change_BNc.repeat(len(of_BNc) // len(change_BNc), 1, 1)
            return tokens.put(denoiser, prediction, of_BNc + more_BNc.to(of_BNc.dtype), grid)

        clock.model_output = changed(output)
        run.outputs = tuple(changed(made) for made in run.outputs)


def of(car: SideCar) -> Decoder | None:
    """The decoder in a side-car; None: it has none.

    Raises:
        WeightsError: not all of its weights are there.
    """
    biases = {f"{name}.bias": bias for name, bias in car.biases.items() if name not in car.layers}
    tensors = dict(car.extra) | biases
    tensors = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    if not tensors:
        return None
    last = tensors.get("exit.weight")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    try:
        if last is None or last.ndim != 4:
            raise RuntimeError("no exit")
        net = Decoder(last.shape[0], last.shape[1], depth)
        net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise WeightsError(
            f"{car.path}: not all weights of its decoder. Download or make it again"
        ) from error
    return net.eval().requires_grad_(False)


def named(net: Decoder) -> dict[str, Tensor]:
    """Its tensors by the names that side-cars give them."""
    return {PREFIX + name: tensor for name, tensor in net.state_dict().items()}
