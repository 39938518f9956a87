"""What can be learnt for few tokens: changes of the model at reduced tokens, and a router; each a safetensors side-car.

The model's own changes (`Adapter`) are what pays: low-rank additions to its linear layers, on at reduced steps only, so
that dense steps stay exact, and a decoder behind it; `examples/upcycle_chunking.py` trains both. The router is DC-DiT's
(arXiv:2603.06351, section 3): light convolutions, a score per token in either of its two forms, and convolutions behind the tokens that
come back.

Shapes: B batch, N = H*W tokens, C channels, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.core import sidecar
from accel.core.plan import TokenPlan
from accel.core.run import Run
from accel.core.sidecar import SideCar
from accel.errors import UnsupportedError, WeightsError
from accel.methods import decoder

KIND = "chunking"
ROUTER_KIND = "chunking router"
Form = Literal["cosine", "predictability"]
_A, _B, _BIAS = "accel_low_rank_A", "accel_low_rank_B", "accel_low_rank_bias"


class Adapter:
    """A side-car's low-rank changes of a denoiser, on in calls that compute few enough of the tokens.

    Args:
        path: of the safetensors file.
        share: of the tokens that the running call computes; 1: all. A plain number, asked for in every changed layer.
        budgets: the shares of all steps.

    Attributes:
        most: the share of the tokens above which it is off, which the file says.
        decoding: its decoder, at work between steps; None: it has none.

    Raises:
        WeightsError: the file is missing, corrupt, or no side-car for chunking.
        UnsupportedError: it would never be on.
    """

    def __init__(self, path: str | Path, share: Callable[[], float], budgets: Sequence[float] = ()) -> None:
        self.car: SideCar = sidecar.read(path, KIND)
        self.share = share
        try:
            self.most = float(self.car.metadata.get("most", 1))
        except ValueError as error:
            raise WeightsError(f"{path}: most={self.car.metadata['most']!r} is no number") from error
        net = decoder.of(self.car)
        self.decoding = None if net is None else decoder.Decoding(net)
        reduced = [budget for budget in budgets if 0 < budget < 1]
        if reduced and not any(self.takes(budget) for budget in reduced):
            raise UnsupportedError(
                f"adapter={str(path)!r} is of use where at most {self.most:.0%} of the tokens are computed, and these settings "
                f"compute {min(reduced):.0%} at least. Compute fewer, or leave the adapter out"
            )

    def takes(self, share: float) -> bool:
        """Whether it is on where this share of the tokens is computed."""
        return 0 < share < 1 and share <= self.most

    def decodes(self, run: Run) -> decoder.Decoding | None:
        """The decoder, at steps at which it has something to add to."""
        return self.decoding if self.takes(run.phase.budget) and run.correct is not None else None

    def stepping(self, run: Run, plan: TokenPlan | None) -> None:
        """The scheduler is about to step with a prediction on this plan: the decoder's turn."""
        decoding = self.decodes(run)
        if decoding is None or plan is None or run.changed:
            return
        if all(other.computed for other in run.alongside()):  # else it is another handle's forecast
            decoding.step(run, plan)

    def attach(self, denoiser: nn.Module, stack: ExitStack) -> None:
        """Hook the changed layers; the undo actions go onto `stack`.

        Raises:
            WeightsError: it was trained for another model.
            UnsupportedError: the denoiser already has such changes.
        """
        self.car.check(denoiser)
        for path, (a, b) in self.car.layers.items():
            layer, weight = denoiser.get_submodule(path), denoiser.get_parameter(f"{path}.weight")
            # By the hook: a deep copy keeps the buffers, which are replaced below, and has no hooks of ours.
            hooks = vars(layer)["_forward_hooks"].values()
            if any(getattr(hook, "__func__", None) is Adapter._change for hook in hooks):
                raise UnsupportedError(
                    f"{path} already has a side-car's changes: remove() the other handle first"
                )
            bias = self.car.biases.get(path)
            for name, value in ((_A, a), (_B, b), (_BIAS, bias)):
                # A buffer moves with the module; not persistent, it is in no state dict.
                value = None if value is None else value.to(weight.device, weight.dtype)
                layer.register_buffer(name, value, persistent=False)
                stack.callback(delattr, layer, name)
            stack.callback(layer.register_forward_hook(self._change).remove)

    def _change(self, layer: Any, args: tuple, output: Tensor) -> Tensor | None:
        if not self.takes(self.share()):
            return None
        low = F.linear(args[0], getattr(layer, _A))
        return output + F.linear(low, getattr(layer, _B), getattr(layer, _BIAS))


class Router(nn.Module):
    """DC-DiT's router: how much each token is unlike what its neighbourhood says.

    "cosine" (its first form): (1 - cos(q_i, mean of k over the 3x3 around i)) / 2, with q and k linear and the identity
    at the start. "predictability" (its second): the residual of a 3x3 convolution that predicts each token from its
    eight neighbours, through a small scorer and a sigmoid; the mean of the neighbours at the start.

    As it starts, `encode` and `decode` change nothing, and the cosine form is the training-free router.

    Args:
        channels: C of the tokens.
        form: which of the two.
    """

    def __init__(self, channels: int, form: Form = "cosine") -> None:
        super().__init__()
        self.form = form
        self.encoder = nn.Sequential(_Light(channels), _Light(channels))
        self.decoder = nn.Sequential(_Light(channels), _Light(channels))
        if form == "cosine":
            self.query = nn.Linear(channels, channels, bias=False)
            self.key = nn.Linear(channels, channels, bias=False)
            nn.init.eye_(self.query.weight)
            nn.init.eye_(self.key.weight)
        else:
            self.predict = nn.Conv2d(channels, channels, 3, bias=False)
            with torch.no_grad():
                self.predict.weight.zero_()
                self.predict.weight[range(channels), range(channels)] = 1 / 8
                self.predict.weight[:, :, 1, 1] = 0  # never from the token itself
            # Trained on, too: the mask that keeps the middle out.
            mask = torch.ones(3, 3)
            mask[1, 1] = 0
            self.mask: Tensor
            self.register_buffer("mask", mask, persistent=False)
            self.scorer = nn.Linear(1, 1)
            nn.init.ones_(self.scorer.weight)
            nn.init.zeros_(self.scorer.bias)

    def encode(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens with what two light residual convolutions add, (B, N, C)."""
        return _on_map(self.encoder, x_BNC, grid)

    def decode(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """As `encode`, behind the tokens that were given back."""
        return _on_map(self.decoder, x_BNC, grid)

    def forward(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N): the score of every token, in [0, 1]; windows or tokens of low scores are given up first."""
        if self.form == "cosine":
            mean_BNC = _on_map(_mean, self.key(x_BNC), grid)
            return (1 - F.cosine_similarity(self.query(x_BNC), mean_BNC, dim=-1)) / 2
        x_BNC = F.layer_norm(x_BNC, x_BNC.shape[-1:])
        guess_BNC = _on_map(self._guess, x_BNC, grid)
        residual_BN1 = (x_BNC - guess_BNC).square().mean(-1, keepdim=True)
        score_BHW = torch.sigmoid(self.scorer(residual_BN1))[..., 0].clone().unflatten(1, grid)
        score_BHW[:, :: max(grid[0] - 1, 1), :: max(grid[1] - 1, 1)] = 1.0  # the corners are always kept
        return score_BHW.flatten(1)

    def _guess(self, map_BCHW: Tensor) -> Tensor:
        padded = F.pad(map_BCHW, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, self.predict.weight * self.mask)


def ratio_loss(score_BN: Tensor, keep_BN: Tensor, target: float) -> Tensor:
    """Loss that holds the share of kept tokens at 1/`target`: H-Net (arXiv:2507.07955), equation 10.

    N/(N - 1) ((N - 1) r p + (1 - r)(1 - p)) for N = `target`, r the share kept and p the mean score; 1 where both are
    1/N, which is its minimum in p for r above 1/N.
    """
    share, mean = keep_BN.float().mean(), score_BN.mean()
    return target / (target - 1) * ((target - 1) * share * mean + (1 - share) * (1 - mean))


def straight_through(y_BNC: Tensor, score_BN: Tensor, keep_BN: Tensor) -> Tensor:
    """`y` as it is, with a gradient to the score: each token is scaled by its confidence in the choice made, as H-Net
    does (arXiv:2507.07955, equation 7)."""
    confidence_BN = torch.where(keep_BN, score_BN, 1 - score_BN)
    return y_BNC * (1 + (confidence_BN - confidence_BN.detach()))[..., None]


class Learned:
    """A router from a file, called with the tokens at the span's entry."""

    needs_tokens = True

    def __init__(self, router: Router) -> None:
        self.router = router

    @torch.no_grad()
    def __call__(self, x0_BNC: Tensor, tokens_BNC: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """(B, N): high scores are to stay tokens of their own. `x0_BNC`, the picture predicted last, is not used."""
        assert tokens_BNC is not None
        router = self.router.to(tokens_BNC.device)
        x_BNC = tokens_BNC.float()
        return router(router.encode(x_BNC, grid), grid)


def load(path: str | Path, denoiser: nn.Module) -> Learned:
    """The learned router of a file.

    Raises:
        WeightsError: the file is missing, corrupt, no router, or one of another model.
    """
    car = sidecar.read(path, ROUTER_KIND)
    car.check(denoiser)
    tensors = dict(car.extra) | {f"{name}.bias": bias for name, bias in car.biases.items()}
    form: Form = "cosine" if "query.weight" in tensors else "predictability"
    width = tensors.get("decoder.0.point.weight")
    if width is None:
        raise WeightsError(f"{path}: no weights of a router in it. Train one, or use router='windows'")
    router = Router(width.shape[0], form)
    try:
        router.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: not all weights of a {form} router. Train one, or use router='windows'"
        ) from error
    return Learned(router.eval())


def save(path: Path, router: Router, denoiser: nn.Module) -> int:
    """Write a router's side-car for this model; returns its size in bytes."""
    return sidecar.write(path, ROUTER_KIND, [sidecar.fingerprint(denoiser)], router.state_dict())


class _Light(nn.Module):
    """x + pointwise(SiLU(depthwise 3x3(x))), the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.point.weight)
        assert self.point.bias is not None
        nn.init.zeros_(self.point.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.point(F.silu(self.depth(x_BCHW)))


def _mean(map_BCHW: Tensor) -> Tensor:
    """Over the 3x3 around each position, as far as it is inside."""
    return F.avg_pool2d(map_BCHW, 3, stride=1, padding=1, count_include_pad=False)


def _on_map(f: Callable[[Tensor], Tensor], x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    return f(x_BNC.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
