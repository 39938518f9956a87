"""Kernels at small sizes, in Triton's interpreter and on a GPU. Triton looks at its environment when it is imported:
a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


files = pytest.mark.parametrize("file", ["numerics.py", "choosing.py"])


def run(file, *options, **environment):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(HERE / file)]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
    assert " passed" in run.stdout


@files
def test_in_the_interpreter(file):
    run(file, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", ACCEL_KERNELS="auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@files
def test_on_the_gpu(file):
    # Most of the time is the compiler's, with one kernel per type and number of channels.
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    run(file, *parallel, TRITON_INTERPRET="0", ACCEL_KERNELS="auto")
