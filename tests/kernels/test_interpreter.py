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


FILES = ["numerics.py", "choosing.py"]
files = pytest.mark.parametrize("file", FILES)


def start(file, *options, **environment):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(HERE / file)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **environment}, **pipes)


def passed(process):
    said, _ = process.communicate()
    assert process.returncode == 0, said[-6000:]
    assert " passed" in said


@pytest.fixture(scope="module")
def interpreting():
    """Both at once: each takes half a minute of one core."""
    settings = {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCEL_KERNELS": "auto",
        "OMP_NUM_THREADS": "1",
    }
    return {file: start(file, **settings) for file in FILES}


@files
def test_in_the_interpreter(file, interpreting):
    passed(interpreting[file])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@files
def test_on_the_gpu(file):
    # Most of the time is the compiler's, with one kernel per type and number of channels.
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    passed(start(file, *parallel, TRITON_INTERPRET="0", ACCEL_KERNELS="auto"))
