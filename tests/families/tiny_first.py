"""The families that most other tests use, too (`conftest`)."""

from __future__ import annotations

import torch
from case import Case
from conftest import flux_call, make_flux, make_pixart, pixart_call


def sized(call):
    def arguments(steps, wide, dtype):
        options = call(steps=steps, batch=2, guidance=3.0, height=32, width=96 if wide else 48)
        return {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in options.items()
        }

    return arguments


CASES = {
    "FLUX": Case(make_flux, sized(flux_call), tokens=96),
    "PixArt": Case(make_pixart, sized(pixart_call), tokens=96, positions="added"),
}
