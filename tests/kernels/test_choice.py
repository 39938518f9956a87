"""Which implementation runs, where kernels cannot."""

import subprocess
import sys

import pytest
import torch

from accel import kernels
from accel.errors import ConfigError, UnsupportedError
from accel.kernels import dispatch
from accel.kernels.merge import merge
from accel.kernels.plan import segments

without = pytest.mark.skipif(dispatch.MISSING is None, reason="kernels run here")


@without
def test_the_reference_runs_on_the_cpu(monkeypatch):
    owner, x = torch.tensor([[0, 1, 1]]), torch.tensor([[[1.0], [2.0], [4.0]]])
    size, lists = segments(owner, 2)
    monkeypatch.setattr(dispatch.OPS["merge"], "node", None)  # must not be called
    assert merge(x, owner, size, lists).tolist() == [[[1.0], [3.0]]]
    active, why = kernels.status()
    assert not active
    assert dispatch.MISSING in why


@without
def test_kernels_where_there_can_be_none():
    with pytest.raises(UnsupportedError, match="cannot run here"):
        kernels.use("triton")
    with pytest.raises(ConfigError, match="expected one of auto, triton, reference"):
        kernels.use("cuda")
    code = "import accel.kernels.dispatch"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"ACCEL_KERNELS": "tritn"}, capture_output=True, text=True
    )
    assert "ConfigError: kernels 'tritn': expected one of" in run.stderr


def test_a_choice_ends_with_its_block():
    before = kernels.status()
    with kernels.use("reference"):
        with kernels.use("auto"):
            assert kernels.status() == before
        assert "asked for" in kernels.status()[1]
    assert kernels.status() == before


def test_indices_are_checked_on_demand():
    owner = torch.tensor([[0, 1, 5]])
    size, lists = segments(torch.tensor([[0, 1, 1]]), 2)
    with (
        kernels.use("auto", check=True),
        pytest.raises(ConfigError, match="merge: indices from 0 to 5 where -1 to 1"),
    ):
        merge(torch.ones(1, 3, 2), owner, size, lists)


def test_a_kernel_is_imported_with_its_operation_but_not_triton():
    code = "import sys, accel.kernels.merge, accel.kernels.match; print('triton' in sys.modules)"
    assert (
        dispatch.MISSING is None
        or subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
    )
