"""The learned decoder: what it may change, and what comes back from a file."""

import pytest
import torch

from accel.core import sidecar
from accel.errors import WeightsError
from accel.methods import decoder, learned, windows

GRID = (8, 12)


def random_net():
    torch.manual_seed(0)
    net = decoder.Decoder(4, width=8, depth=2)
    for p in net.parameters():
        p.data = (p.data + 0.1 * torch.randn_like(p)).bfloat16().float()  # what a file keeps
    return net


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    plan = windows.plan(torch.rand(2, 96), GRID, windows.counts(GRID, 0.4))
    return *torch.randn(3, 2, 96, 4), plan, 0.6, GRID


def test_it_changes_how_tokens_of_a_window_differ_and_nothing_else(inputs):
    *pictures, plan, noise, grid = inputs
    assert torch.equal(decoder.Decoder(4)(*inputs), torch.zeros(2, 96, 4))  # as it starts
    with torch.no_grad():
        change = random_net()(*inputs)
    size = plan.size.gather(1, plan.owner)
    assert {1.0, 4.0} <= set(size.unique().tolist())
    assert not change[size == 1].any()
    assert change[size > 1].abs().mean() > 0.01
    assert plan.reduce(change).abs().max() < 1e-6
    shared = windows.plan(torch.rand(1, 96), grid, windows.counts(grid, 0.4))
    with torch.no_grad():  # a plan for all images is the same as one each
        assert torch.allclose(
            random_net()(*pictures, shared, noise, grid),
            random_net()(*pictures, shared.repeat(2), noise, grid),
            atol=1e-6,
        )


def test_it_comes_back_from_a_side_car_beside_the_models_changes(inputs, tmp_path):
    net, file = random_net(), tmp_path / "c.safetensors"
    low = {"layer.A": torch.randn(2, 6), "layer.B": torch.randn(6, 2), "layer.bias": torch.randn(6)}
    sidecar.write(file, learned.KIND, [], low | decoder.named(net), int8=True)
    again = decoder.of(sidecar.read(file, learned.KIND))
    with torch.no_grad():
        assert torch.equal(again(*inputs), net(*inputs))
    sidecar.write(file, learned.KIND, [], low)
    assert decoder.of(sidecar.read(file, learned.KIND)) is None
    for missing in ("decoder.exit.weight", "decoder.blocks.1.second.bias"):
        some = {name: tensor for name, tensor in decoder.named(net).items() if name != missing}
        sidecar.write(file, learned.KIND, [], low | some)
        with pytest.raises(WeightsError, match=r"c\.safetensors: not all weights of its decoder"):
            decoder.of(sidecar.read(file, learned.KIND))
