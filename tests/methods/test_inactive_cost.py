"""A method that is attached and has nothing to do must cost next to nothing."""

import time

import pytest
import torch

import accel
from accel.generation import load_pipeline

DENSE = {"schedule": accel.Schedule(dense_first=1000)}  # every step is
STEPS = 2

METHODS = {
    "forecasts": accel.ForecastConfig(**DENSE),
    "merging in each block": accel.TokenMergingConfig(scope="block", **DENSE),
    "pruning": accel.TokenPruningConfig(**DENSE),
}


def seconds(pipe, side):
    """This thread's, a step, of a whole call of the pipeline."""
    call = {"num_inference_steps": STEPS, "height": side, "width": side, "output_type": "latent"}
    start = time.thread_time()
    pipe("a photo of three stars", generator=torch.Generator().manual_seed(0), **call)
    return (time.thread_time() - start) / STEPS


@pytest.mark.filterwarnings("ignore:all .* steps are dense")
def test_nothing_to_do_takes_a_hundredth_of_a_step_at_most():
    """Of the built-in model at 256 px; what hooks and the clock take does not depend on the size, and is told best beside
    the little that a step at 32 px takes: the least of several, by turns."""
    pipe, threads = load_pipeline("builtin"), torch.get_num_threads()
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)  # this thread's time is all the time there is
    try:
        seconds(pipe, 256)
        step = min(seconds(pipe, 256) for _ in range(2))
        plain, attached = [], {name: [] for name in METHODS}
        for _ in range(5):
            plain.append(seconds(pipe, 32))
            for name, config in METHODS.items():
                with accel.accelerate(pipe, config) as handle:
                    attached[name].append(seconds(pipe, 32))
                assert handle.stats.share == 1
    finally:
        torch.set_num_threads(threads)
    for name, times in attached.items():
        cost = (min(times) - min(plain)) / step
        print(f"{name}: {cost:.2%} of a step")
        assert cost < 0.02
