"""Where a scheduler's steps are: the log signal-to-noise ratio of each, which forecasts run along, and how far
each goes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: Pure noise and no noise are infinitely far away; this far from either they are taken to be.
_END = 1e-5


def log_snr(scheduler: Any) -> tuple[float, ...]:
    """log(signal / noise) at each of the scheduler's timesteps, rising; read from the device once.

    The lambda of DPM-Solver (arXiv:2206.00927), in which predictions are smoother than in timesteps: near pure
    noise they change within a few timesteps, which are far apart in it. On the built-in model, 24 steps, every
    third computed, continued to order 1: 8 dB nearer to the plain latents than along timesteps.

    A scheduler that has neither noise levels nor `alphas_cumprod` gives its timesteps, negative, as they are.
    """
    timesteps = [float(t) for t in scheduler.timesteps.tolist()]
    shares = _noise_shares(scheduler, timesteps)
    if shares is None:
        return tuple(-t for t in timesteps)
    # Shrunk, not clamped: at equal times a forecast would divide by zero.
    inner = [_END + (1 - 2 * _END) * share for share in shares]
    return tuple(math.log((1 - share) / share) for share in inner)


def _noise_shares(scheduler: Any, timesteps: list[float]) -> list[float] | None:
    """noise / (signal + noise), from 1 (pure noise) to 0."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) in (len(timesteps), len(timesteps) + 1):
        levels = [float(s) for s in sigmas.tolist()][: len(timesteps)]
        # Flow matching mixes signal and noise to one, and says how much is noise; others how much is added.
        return levels if max(levels) <= 1 else [s / (1 + s) for s in levels]
    if scheduler.config.get("prediction_type") == "trigflow":  # on a quarter of a circle
        return [math.sin(t) / (math.sin(t) + math.cos(t)) for t in timesteps]
    if hasattr(scheduler, "_alpha_cumprod"):  # Wuerstchen's, of times from 1 to 0
        kept = scheduler._alpha_cumprod(scheduler.timesteps, scheduler.timesteps.device).tolist()
    elif (alphas := getattr(scheduler, "alphas_cumprod", None)) is not None:
        known = alphas.tolist()
        kept = [known[min(max(round(t), 0), len(known) - 1)] for t in timesteps]
    else:
        return None
    return [(1 - a) ** 0.5 / (a**0.5 + (1 - a) ** 0.5) for a in kept]


def step_lengths(scheduler: Any) -> tuple[float, ...] | None:
    """What each step multiplies the prediction with before it adds it to the sample; None: not known to be that
    simple. Read from the device once.

    Known for Euler steps without added noise: flow matching, and predictions of the noise.
    """
    config, name = scheduler.config, type(scheduler).__name__
    flow = name == "FlowMatchEulerDiscreteScheduler" and not config.get("stochastic_sampling")
    noise = name == "EulerDiscreteScheduler" and config.get("prediction_type") == "epsilon"
    if not (flow or noise) or len(scheduler.sigmas) != len(scheduler.timesteps) + 1:
        return None
    return tuple(later - now for now, later in pairwise(scheduler.sigmas.tolist()))


def clean(scheduler: Any, prediction: Tensor, sample: Tensor, log_snr: float) -> Tensor | None:
    """The picture that a step's prediction says the sample is made of; None: not known.

    Args:
        prediction, sample: as the scheduler's `step` gets them.
        log_snr: at that step (`log_snr`).
    """
    shares = picture_shares(scheduler, log_snr)
    return None if shares is None else shares[0] * sample + shares[1] * prediction


def picture_shares(scheduler: Any, log_snr: float) -> tuple[float, float] | None:
    """(a, b): the picture is a times the sample plus b times the prediction; None: not known. Arguments as `clean`'s."""
    config, ratio = getattr(scheduler, "config", {}), math.exp(-log_snr)  # noise / signal
    kind, root = config.get("prediction_type"), math.sqrt(1 + ratio**2)
    if hasattr(scheduler, "precondition_outputs"):  # EDM: the model works on scaled values
        one, zero = torch.ones(()), torch.zeros(())
        skip, out = (scheduler.precondition_outputs(*pair, ratio) for pair in ((one, zero), (zero, one)))
        return float(skip), float(out)
    if hasattr(scheduler, "get_scalings_for_boundary_condition"):  # consistency models
        skip, out = scheduler.get_scalings_for_boundary_condition(torch.tensor(ratio))
        return float(skip), float(out)
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas") or kind == "flow_prediction":
        # Mixed with the picture, or (Cosmos, which says up to how much) added to it.
        added = float(config.get("sigma_max") or 1) > 1
        return 1.0, -(ratio if added else ratio / (1 + ratio))
    # Noise is added to a picture of full size, or the two are mixed so that their squares sum to one.
    added = float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1.5
    if kind == "epsilon" or hasattr(scheduler, "_alpha_cumprod"):
        return (1.0 if added else root), -ratio
    if kind in ("v_prediction", "trigflow"):
        return (1 / root**2 if added else 1 / root), -ratio / root
    codes = type(scheduler).__name__ == "VQDiffusionScheduler"  # how likely each is in the picture
    return (0.0, 1.0) if kind == "sample" or codes else None
