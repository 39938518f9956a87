"""A side-car changes the model that it was made for, and is refused by every other."""

import pytest
import torch
from torch import nn

from accel.core import sidecar
from accel.errors import WeightsError


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture
def car(tmp_path):
    torch.manual_seed(1)
    tensors = {
        "first.A": torch.randn(2, 6).bfloat16(),
        "first.B": torch.randn(8, 2).bfloat16(),
        "first.bias": torch.randn(8).bfloat16(),
        "letters.index": torch.tensor([3, 1]),
    }
    size = sidecar.write(tmp_path / "x.safetensors", "test", [sidecar.fingerprint(Net())], tensors)
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert not (tmp_path / "x.part").exists()
    return tmp_path / "x.safetensors", tensors


def test_merged_is_low_rank_added(car):
    path, tensors = car
    net, x = Net(), torch.randn(3, 6)
    plain = Net()
    sidecar.read(path, "test").merge(net)
    a, b, bias = (tensors[f"first.{k}"].float() for k in ("A", "B", "bias"))
    weight, offset = (
        sum_.bfloat16().float() for sum_ in (plain.first.weight + b @ a, plain.first.bias + bias)
    )  # in every precision, so that the model is known by the next side-car
    assert torch.allclose(net(x), plain.second(x @ weight.T + offset), atol=1e-5)
    half, twin = Net().bfloat16().half(), Net().bfloat16().float()
    base = sidecar.fingerprint(half)
    sidecar.write(path, "test", [base], tensors)
    sidecar.read(path, "test").merge(twin)
    sidecar.read(path, "test").merge(half)
    assert sidecar.fingerprint(half) == sidecar.fingerprint(twin) != base
    assert not torch.allclose(net(x), plain(x), atol=1e-2)
    assert sidecar.read(path, "test").extra["letters.index"].tolist() == [3, 1]


def test_in_int8_a_side_car_is_half_as_large_and_changes_the_same(tmp_path):
    torch.manual_seed(2)
    net = nn.Linear(256, 256)
    mark = [sidecar.fingerprint(net)]
    scale = torch.logspace(-3, 0, 16)[:, None]  # rows of very different size
    tensors = {"A": torch.randn(16, 256) * scale, "B": torch.randn(256, 16), "bias": torch.randn(256)}
    tensors = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    files = [tmp_path / f"{name}.safetensors" for name in ("wide", "narrow")]
    wide, narrow = (
        sidecar.write(file, "test", mark, tensors, int8=int8)
        for file, int8 in zip(files, (False, True), strict=True)
    )
    assert narrow < 0.6 * wide
    found = [sidecar.read(file, "test") for file in files]
    assert not found[1].extra  # the units are no tensors of their own
    (a, b), (c, d) = (car.layers["layer"] for car in found)
    assert c.dtype == d.dtype == torch.float32
    assert (d @ c - b @ a).norm() < 0.01 * (b @ a).norm()
    assert (c[0] - tensors["layer.A"][0]).norm() < 0.01 * tensors["layer.A"][0].norm()  # the smallest row too


def test_precision_and_device_do_not_change_what_a_model_is():
    stored = Net().bfloat16()  # built-in weights are stored so
    mark = sidecar.fingerprint(stored)
    assert mark == sidecar.fingerprint(stored.float()) == sidecar.fingerprint(stored.half())
    assert mark != sidecar.fingerprint(Net(seed=1).bfloat16())


def test_other_models_and_other_files_are_refused(car, tmp_path):
    path, tensors = car
    with pytest.raises(WeightsError, match=r"x\.safetensors: was trained for another model than this Net"):
        sidecar.read(path, "test").merge(Net(seed=1))
    with pytest.raises(WeightsError, match="not a side-car for chunking"):
        sidecar.read(path, "chunking")
    with pytest.raises(WeightsError, match="no such file"):
        sidecar.read(tmp_path / "y.safetensors", "test")
    pickled = tmp_path / "y.pt"
    torch.save(tensors, pickled)
    with pytest.raises(WeightsError, match=r"not a \.safetensors file"):
        sidecar.read(pickled, "test")
    broken = tmp_path / "z.safetensors"
    broken.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        sidecar.read(broken, "test")
    mark = [sidecar.fingerprint(Net())]
    sidecar.write(tmp_path / "w.safetensors", "test", mark, {"first.A": tensors["first.A"]})
    with pytest.raises(WeightsError, match=r"first\.A without first\.B"):
        sidecar.read(tmp_path / "w.safetensors", "test")
    whole = {"first.A": torch.ones(2, 6, dtype=torch.int8), "first.B": torch.ones(8, 2, dtype=torch.int8)}
    units = {"first.A.unit": torch.ones(2), "first.B.unit": torch.ones(8, 1)}
    for more, said in (
        ({}, "whole numbers without their unit"),
        (units, "first.A.unit is not one number a row"),
    ):
        sidecar.write(tmp_path / "t.safetensors", "test", mark, whole | more)
        with pytest.raises(WeightsError, match=said):
            sidecar.read(tmp_path / "t.safetensors", "test")
    sidecar.write(tmp_path / "u.safetensors", "test", mark, {"first.A.unit": torch.ones(2, 1)})
    with pytest.raises(WeightsError, match=r"first\.A\.unit without first\.A"):
        sidecar.read(tmp_path / "u.safetensors", "test")
    wrong = {"second.A": tensors["first.A"], "second.B": tensors["first.B"]}
    sidecar.write(tmp_path / "v.safetensors", "test", mark, wrong)
    with pytest.raises(WeightsError, match="second is no 8x6 linear layer of this Net"):
        sidecar.read(tmp_path / "v.safetensors", "test").merge(Net())
