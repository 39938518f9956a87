"""A denoiser whose answer is known, for every kind of scheduler: data are independent Gaussian numbers.

If x0 ~ N(MEAN, SPREAD^2), the best prediction of the noise, the sample or the velocity from a noisy sample is linear in
it, and a deterministic sampler takes the noise z to MEAN + SPREAD z, in the limit of many steps.
"""

from __future__ import annotations

import inspect

import torch

MEAN, SPREAD = 0.2, 0.15


class Gaussian(torch.nn.Module):
    """Predicts what the scheduler wants, from the noise level that the loop writes down before each call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.level = None  # (signal, noise, wanted)

    def forward(self, sample):
        signal, noise, wanted = self.level
        variance = signal**2 * SPREAD**2 + noise**2
        x0 = MEAN + signal * SPREAD**2 / variance * (sample - signal * MEAN)
        epsilon = (sample - signal * x0) / noise
        if callable(wanted):
            return (wanted(x0),)
        return ({"epsilon": epsilon, "sample": x0, "flow": epsilon - x0}[wanted],)


class Pipeline:
    """What `accelerate` takes: a denoiser, a scheduler, and a loop of its own (`sample`)."""

    def __init__(self, scheduler):
        self.transformer, self.scheduler = Gaussian(), scheduler


def levels(scheduler, x, t, index):
    """(input of the model, its level): of flow matching, of noise added (scaled or preconditioned by the scheduler), of
    mixtures by alphas_cumprod."""
    config = scheduler.config
    kind = config.get("prediction_type", "epsilon")
    sigmas = getattr(scheduler, "sigmas", None)
    flow = sigmas is not None and not hasattr(scheduler, "alphas_cumprod")
    if (
        (flow and not hasattr(scheduler, "precondition_inputs"))
        or config.get("use_flow_sigmas")
        or kind == "flow_prediction"
    ):
        sigma = float(sigmas[index])
        return x, (1 - sigma, sigma, "flow")
    if hasattr(scheduler, "precondition_inputs"):  # EDM: the model predicts F in x0 = c_skip x + c_out F
        sigma = sigmas[index]
        model_input = scheduler.scale_model_input(x, t)
        scale = float(scheduler.precondition_inputs(torch.ones(()), sigma))

        def wanted(x0):
            zero = scheduler.precondition_outputs(x, torch.zeros_like(x), sigma)
            one = scheduler.precondition_outputs(x, torch.ones_like(x), sigma)
            return (x0 - zero) / (one - zero)

        return model_input, (scale, scale * float(sigma), wanted)
    scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    if not torch.equal(scaled, x):  # x = x0 + sigma e, scaled to variance one
        sigma = float(sigmas[index])
        norm = (sigma**2 + 1) ** 0.5
        return scaled, (1 / norm, sigma / norm, kind)
    if sigmas is not None and hasattr(scheduler, "alpha_t"):  # DPM-Solver and its like
        sigma = float(sigmas[index])
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return x, (alpha, sigma * alpha, kind)
    kept = float(scheduler.alphas_cumprod[min(int(t), len(scheduler.alphas_cumprod) - 1)])
    return x, (kept**0.5, (1 - kept) ** 0.5, kind)


def sample(pipe, steps, seed=0, noise_seed=1, **step_arguments):
    """(what the loop gives, what is right)."""
    scheduler, model = pipe.scheduler, pipe.transformer
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    wants = inspect.signature(scheduler.set_timesteps).parameters
    scheduler.set_timesteps(
        steps, **({"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") and "mu" in wants else {})
    )
    x = z * float(getattr(scheduler, "init_noise_sigma", 1.0))
    accepted = inspect.signature(scheduler.step).parameters
    if "generator" in accepted:
        step_arguments["generator"] = torch.Generator().manual_seed(noise_seed)
    for index, t in enumerate(scheduler.timesteps):
        model_input, model.level = levels(scheduler, x, t, index)
        prediction = model(model_input)[0]
        x = scheduler.step(prediction, t, x, return_dict=False, **step_arguments)[0]
    return x, MEAN + SPREAD * z
