"""What chunking learned: it starts as the training-free form, and its side-car is on exactly where it should be."""

import copy
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accel.core import sidecar
from accel.core.copies import copies_plain
from accel.errors import UnsupportedError, WeightsError
from accel.methods import learned

GRID = (5, 7)


def tokens(channels=6, batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, GRID[0] * GRID[1], channels)


def cosine_by_hand(x_NC, grid):
    """(1 - cos(x_i, mean of the 3x3 around i, edges included)) / 2, token by token."""
    height, width = grid
    out = []
    for row in range(height):
        for column in range(width):
            near = [
                x_NC[r * width + c]
                for r in range(max(0, row - 1), min(height, row + 2))
                for c in range(max(0, column - 1), min(width, column + 2))
            ]
            mean, own = torch.stack(near).mean(0), x_NC[row * width + column]
            out.append((1 - (own @ mean) / own.norm() / mean.norm()) / 2)
    return torch.stack(out)


def test_the_cosine_router_starts_as_the_training_free_one():
    x = tokens()
    router = learned.Router(6, "cosine")
    with torch.no_grad():
        score = router(router.encode(x, GRID), GRID)
        assert torch.equal(router.decode(x, GRID), x)
    for row in range(2):
        assert torch.allclose(score[row], cosine_by_hand(x[row], GRID), atol=1e-6)


def test_the_predictability_router_scores_what_neighbours_do_not_tell():
    x = tokens() * 0.01 + 1 + torch.arange(6.0)  # smooth
    x[0, 17] = torch.tensor([9.0, -9, 9, -9, 9, -9])  # and one token that nothing around it tells
    router = learned.Router(6, "predictability")
    with torch.no_grad():
        score = router(x, GRID)
    corners = [0, 6, 28, 34]
    assert (score[:, corners] == 1).all()
    score[:, corners] = 0
    assert score[0].argmax() == 17
    # Never told by the token itself, whatever training does to the middle of the window.
    with torch.no_grad():
        before = router._guess(x.transpose(1, 2).unflatten(2, GRID))
        router.predict.weight[:, :, 1, 1] = 5.0
        assert torch.equal(router._guess(x.transpose(1, 2).unflatten(2, GRID)), before)


def test_routers_learn_which_tokens_matter():
    """A few steps towards given choices: both forms, through the encoder, end better than they start."""
    x = tokens(batch=1)
    keep = torch.zeros(1, 35, dtype=torch.bool)
    keep[0, 8:16] = True
    for form in ("cosine", "predictability"):
        torch.manual_seed(0)
        router = learned.Router(6, form)
        optimizer = torch.optim.Adam(router.parameters(), 0.03)
        losses = []
        for _ in range(40):
            score = router(router.encode(x, GRID), GRID)
            loss = F.binary_cross_entropy(score.clamp(1e-4, 1 - 1e-4), keep.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], form


def test_ratio_loss_is_one_at_its_target_and_pulls_to_it():
    target = 4.0
    at = torch.full((1, 8), 0.25)
    keep = torch.arange(8)[None] < 2
    assert learned.ratio_loss(at, keep, target).item() == pytest.approx(1.0)
    score = torch.full((1, 8), 0.5, requires_grad=True)
    learned.ratio_loss(score, torch.arange(8)[None] < 6, target).backward()
    assert (score.grad > 0).all()  # too many are kept: scores are to fall
    score.grad = None
    learned.ratio_loss(score, torch.arange(8)[None] < 1, target).backward()
    assert (score.grad < 0).all()


def test_straight_through_changes_the_gradient_only():
    y, keep = tokens(), torch.zeros(2, 35, dtype=torch.bool)
    keep[:, ::2] = True
    score = torch.rand(2, 35, requires_grad=True)
    out = learned.straight_through(y, score, keep)
    assert torch.equal(out, y)
    out.sum().backward()
    expected = y.sum(-1) * torch.where(keep, 1.0, -1.0)
    assert torch.allclose(score.grad, expected, atol=1e-5)


def test_a_router_comes_back_from_its_file_and_fits_its_model_only(tmp_path):
    x, file = tokens(), tmp_path / "r.safetensors"
    for form in ("cosine", "predictability"):
        torch.manual_seed(2)
        router = learned.Router(6, form)
        for p in router.parameters():
            p.data += 0.1 * torch.randn_like(p)
            p.data = p.data.bfloat16().float()  # what the file keeps
        assert learned.save(file, router, Net()) < 20_000
        again = learned.load(file, Net())
        with torch.no_grad():
            assert torch.equal(again(x, x, GRID), router(router.encode(x, GRID), GRID))
        with pytest.raises(WeightsError, match="trained for another model"):
            learned.load(file, nn.Linear(6, 6))
    sidecar.write(file, learned.KIND, [], {})
    with pytest.raises(WeightsError, match="not a side-car for chunking router"):
        learned.load(file, Net())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.SiLU())
        self.out = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.out(self.block(x))


@pytest.fixture
def car(tmp_path):
    torch.manual_seed(3)
    tensors = {f"{name}.{part}": torch.randn(*s) for name in ("block.0", "out") for part, s in SHAPES.items()}
    tensors["block.0.bias"] = torch.randn(6)
    sidecar.write(tmp_path / "c.safetensors", learned.KIND, [sidecar.fingerprint(Net())], tensors)
    return tmp_path / "c.safetensors"


SHAPES = {"A": (2, 6), "B": (6, 2)}


def test_the_adapter_is_on_when_active_and_leaves_nothing(car):
    net, x, on = Net(), tokens(), False
    plain, modules, state = net(x), dict(net.named_buffers()), list(net.state_dict())
    merged, changes = Net(), sidecar.read(car, learned.KIND)
    for path, (a, b) in changes.layers.items():
        merged.get_parameter(f"{path}.weight").data += b @ a
    merged.block[0].bias.data += changes.biases["block.0"]
    stack = ExitStack()
    learned.Adapter(car, lambda: 0.5 if on else 1.0).attach(net, stack)
    assert torch.equal(net(x), plain)  # off: to the last bit
    on = True
    assert torch.allclose(net(x), merged(x), atol=1e-5)
    assert not torch.allclose(net(x), plain, atol=1e-2)
    assert list(net.state_dict()) == state
    with pytest.raises(UnsupportedError, match=r"block\.0 already has a side-car's changes"):
        learned.Adapter(car, lambda: 0.5 if on else 1.0).attach(net, ExitStack())
    stack.close()
    assert torch.equal(net(x), plain)
    assert dict(net.named_buffers()) == modules
    assert not any(m._forward_hooks for m in net.modules())


def test_a_copy_made_meanwhile_can_have_an_adapter_of_its_own(car):
    net, x = Net(), tokens()
    plain = net(x)
    with ExitStack() as stack:
        copies_plain(net, stack)
        learned.Adapter(car, lambda: 0.5).attach(net, stack)
        changed, copied = net(x), copy.deepcopy(net)
        assert torch.equal(copied(x), plain)
        with ExitStack() as own:
            learned.Adapter(car, lambda: 0.5).attach(copied, own)
            assert torch.equal(copied(x), changed)
        assert torch.equal(copied(x), plain)
        assert not dict(copied.named_buffers())
        assert torch.equal(net(x), changed)


def test_an_adapter_of_another_model_is_refused(car):
    other = Net()
    other.out.weight.data += 1
    with pytest.raises(WeightsError, match="trained for another model"):
        learned.Adapter(car, lambda: 0.5).attach(other, ExitStack())
    assert not any(m._forward_hooks for m in other.modules())
