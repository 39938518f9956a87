"""What speculative decoding did: forwards, accepted runs, total variation.

Shapes: B images, N slots of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .step import State


@dataclass
class SpeculationStats:
    """Totals since `accelerate` (or `reset`), and maps of the last batch.

    `print(stats)` gives a summary, `as_dict()` the same for machines.

    Attributes:
        runs, images: batches and images decoded.
        plain_runs: batches that were decoded plainly, because windows would have been slower.
        forwards: forwards of the model after the prompt, over batches. NFE.
        plain_forwards: what plain decoding would have taken.
        needed: the same, summed over images until each was finished: images of a batch do not wait here.
        slots: slots filled by forwards (all but each image's first), over images: plain decoding's forwards.
        spent: total variation spent, summed over slots and images. Exactly 0 if lossless.
        seconds: wall clock inside the decoder, prompts not included, measuring windows included.
        window: of the last batch; 1 if decoded plainly.
        rounds_BN: int32, of the last batch: the forward that made each slot final, from 1; 0: the prompt.
        spent_BN: float32, of the last batch: total variation between the law that each token was drawn from
            and the model's.
        forwards_B: int64, of the last batch: forwards until each image was finished.
    """

    method: str = "speculative_decoding"
    runs: int = 0
    images: int = 0
    plain_runs: int = 0
    forwards: int = 0
    plain_forwards: int = 0
    needed: int = 0
    slots: int = 0
    spent: float = 0.0
    seconds: float = 0.0
    window: int | None = None
    rounds_BN: Tensor | None = field(default=None, repr=False)
    spent_BN: Tensor | None = field(default=None, repr=False)
    forwards_B: Tensor | None = field(default=None, repr=False)

    @property
    def tokens_per_forward(self) -> float:
        """Slots filled per forward, mean over images; 1 is plain decoding (and before the first run)."""
        return self.slots / self.needed if self.needed else 1.0

    @property
    def tv_per_token(self) -> float:
        """Total variation spent per slot, mean over all; 0 if lossless."""
        return self.spent / self.slots if self.slots else 0.0

    @property
    def runs_BN(self) -> Tensor | None:
        """int64, of the last batch: with how many others (itself included) each slot became final. A picture
        of it shows where drafts were right."""
        if self.rounds_BN is None:
            return None
        rounds_BN = self.rounds_BN.long()
        count = torch.zeros(rounds_BN.shape[0], int(rounds_BN.max()) + 1, dtype=torch.int64)
        count.scatter_add_(1, rounds_BN, torch.ones_like(rounds_BN))
        return count.gather(1, rounds_BN)

    def reset(self) -> None:
        """Start counting anew."""
        self.__init__(self.method)  # type: ignore[misc]

    def record(self, state: State, forwards: int, window: int, slots: int, seconds: float) -> None:
        """After a batch. Waits for the device."""
        self.rounds_BN = state.round_BS[:, :slots].cpu()
        self.spent_BN = state.spent_BS[:, :slots].cpu()
        self.forwards_B = state.forwards_B.cpu()
        images = self.rounds_BN.shape[0]
        self.needed += int(self.forwards_B.sum())
        self.spent += float(self.spent_BN.double().sum())
        self._count(images, forwards, window, slots, seconds)

    def record_plain(self, images: int, slots: int, seconds: float) -> None:
        """After a batch that was decoded plainly."""
        self.rounds_BN = torch.arange(slots, dtype=torch.int32).repeat(images, 1)
        self.spent_BN = torch.zeros(images, slots)
        self.forwards_B = torch.full((images,), slots - 1)
        self.plain_runs += 1
        self.needed += images * (slots - 1)
        self._count(images, slots - 1, 1, slots, seconds)

    def _count(self, images: int, forwards: int, window: int, slots: int, seconds: float) -> None:
        self.runs += 1
        self.images += images
        self.forwards += forwards
        self.plain_forwards += slots - 1
        self.slots += images * (slots - 1)
        self.seconds += seconds
        self.window = window

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        maps = {"runs_BN": self.runs_BN, "rounds_BN": self.rounds_BN, "spent_BN": self.spent_BN}
        maps["forwards_B"] = self.forwards_B
        return {
            **{k: v for k, v in vars(self).items() if k not in maps},
            **{k: None if v is None else v.tolist() for k, v in maps.items()},
            "tokens_per_forward": self.tokens_per_forward,
            "tv_per_token": self.tv_per_token,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.images} image{'s' if self.images != 1 else ''} in {self.runs} "
            f"run{'s' if self.runs != 1 else ''}, {self.tokens_per_forward:.2f} tokens per forward",
            f"  forwards        {self.forwards}, plain decoding takes {self.plain_forwards}",
            f"  window          {self.window or '-'}",
            f"  time            {self.seconds:.3f} s",
            f"  distance        {self.tv_per_token:.4f} total variation per token"
            + (" (lossless)" if self.spent == 0 else ""),
        ]
        if self.plain_runs:
            lines.append(f"  decoded plainly {self.plain_runs} of {self.runs} runs: windows would be slower")
        return "\n".join(lines)
