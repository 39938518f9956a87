"""The similarity of tokens to destinations, in plain operations.

Shapes: G plan rows, B batch, N tokens, D destinations, C channels.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def features(x_BNC: Tensor, rows: int) -> Tensor:
    """(B, N, C) -> (rows, N, B/rows * C), whose inner product is the mean cosine similarity in a row."""
    x = F.normalize(x_BNC.float(), dim=-1)
    copies = x.shape[0] // rows
    x = x.unflatten(0, (copies, rows)).permute(1, 2, 0, 3).flatten(2)
    return x / math.sqrt(copies)


def match(x_BNC: Tensor, dst_GD: Tensor, exempt_GN: Tensor | None) -> tuple[Tensor, Tensor]:
    unit_GNC = features(x_BNC, dst_GD.shape[0])
    dst_GDC = unit_GNC.gather(1, dst_GD[..., None].expand(-1, -1, unit_GNC.shape[2]))
    best_GN, arg_GN = (unit_GNC @ dst_GDC.transpose(1, 2)).max(dim=2)
    best_GN = best_GN.scatter(1, dst_GD, -math.inf)
    if exempt_GN is not None:
        best_GN = best_GN.masked_fill(exempt_GN, -math.inf)
    return best_GN, dst_GD.gather(1, arg_GN)
