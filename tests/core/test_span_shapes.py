"""Spans over models that count tokens between their blocks, or that carry tokens past them."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from accel.core.plan import TokenPlan
from accel.core.site import Side, Site, rows
from accel.core.span import Span

N, TEXT, WIDTH = 12, 3, 8


class Block(nn.Module):
    """Attention of all to all, so that every token's result depends on which others there are."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 3)

    def forward(self, x, skip=None):
        x = x if skip is None else x + skip @ self.weight.T
        return x + torch.softmax(x @ self.weight @ x.transpose(1, 2), -1) @ x


class Appending(nn.Module):
    """One more text token is appended before every block, and cut off after it where the sequence ended before."""

    def __init__(self, counts):
        super().__init__()
        self.counts, self.blocks = counts, nn.ModuleList(Block(seed) for seed in range(3))

    def forward(self, x_BLC):
        length = x_BLC.shape[1]
        for i, block in enumerate(self.blocks):
            more = torch.full_like(x_BLC[:, :1], i + 1.0)
            x_BLC = block(torch.cat([x_BLC, more], 1))
            x_BLC = x_BLC[:, :length] if self.counts else x_BLC[:, :-1]
        return x_BLC


def run(model, x, sites, plan):
    with ExitStack() as stack:
        Span(lambda x: plan, tokens=lambda: N).attach(model, sites, stack, bias=False)
        return model(x)


def sequence(seed=0):
    return torch.randn(2, N + TEXT, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged():
    """Every token with its right neighbour."""
    owner = torch.arange(N)[None] // 2
    return TokenPlan.build(torch.arange(0, N, 2)[None], owner)


def sites(**options):
    return [Site(f"blocks.{i}", tokens="x", image="first", **options) for i in range(3)]


def test_padded_sequences_are_what_unpadded_ones_are():
    counting, relative = Appending(counts=True).double(), Appending(counts=False).double()
    x, plan = sequence(), merged()
    expected = run(relative, x, sites(), plan)
    torch.testing.assert_close(run(counting, x, sites(padded=True), plan), expected)
    # The negative control: it cuts at a length that the span has not.
    assert not torch.allclose(expected, run(relative, x, sites(), None))
    with pytest.raises((RuntimeError, AssertionError)):
        torch.testing.assert_close(run(counting, x, sites(), plan), expected)


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(seed) for seed in range(4))

    def forward(self, x):
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        third = self.blocks[2](second)
        return self.blocks[3](third, first)


def test_a_skip_from_before_the_span_is_reduced_where_it_is_read():
    def follow(get, plan):
        skip = get("skip")
        return skip if skip is None or skip.shape[1] == plan.slots else plan.reduce(skip)

    model, plan = Skipping().double(), merged()
    x = sequence()[:, :N]
    parts = [Site(f"blocks.{i}", tokens="x", sides=(Side("skip", follow),)) for i in (1, 2, 3)]
    # By hand: the first block whole, the others on means of pairs.
    a, b, c, d = model.blocks
    first = a(x)
    reduced = plan.reduce(first)
    expected = first + plan.expand(d(c(b(reduced)), reduced) - reduced)
    torch.testing.assert_close(run(model, x, parts, plan), expected)


def test_rows_inside_a_dict():
    mask = torch.arange(N + TEXT)[None].float()
    plan = merged()
    side = rows("options", image="first", item="mask")
    followed = side.follow(lambda name: {"mask": mask, "scale": 2.0}, plan)
    expected = torch.cat([torch.arange(0, N, 2), torch.arange(N, N + TEXT)])[None].float()
    assert followed["scale"] == 2.0
    torch.testing.assert_close(followed["mask"], expected)
    assert side.follow(lambda name: {"scale": 2.0}, plan) == {"scale": 2.0}
    assert side.follow(lambda name: None, plan) is None


class Masked(Block):
    def forward(self, x, valid=None):
        scores = x @ self.weight @ x.transpose(1, 2)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], float("-inf"))
        return x + torch.softmax(scores, -1) @ x


class Padding(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Masked(seed) for seed in range(3))

    def forward(self, x, valid=None):
        for block in self.blocks:
            x = block(x, valid)
        return x


def test_padded_samples_are_what_each_is_alone():
    """[text, image, padding]: the image begins at another place in every sample."""
    model, plan = Padding().double(), merged()
    samples = [sequence(1)[:1], sequence(2)[:1, 2:]]
    alone = [run(model, x, last(), plan) for x in samples]
    x = torch.zeros(2, N + TEXT, WIDTH, dtype=torch.float64)
    valid = torch.zeros(2, N + TEXT, dtype=torch.bool)
    for i, sample in enumerate(samples):
        x[i, : sample.shape[1]], valid[i, : sample.shape[1]] = sample[0], True

    def padded(sites):
        with ExitStack() as stack:
            Span(lambda x: plan, tokens=lambda: N).attach(model, sites, stack, bias=False)
            return model(x, valid)

    both = padded(last(valid="valid", sides=(rows("valid", image="last", valid="valid"),)))
    for i, expected in enumerate(alone):
        torch.testing.assert_close(both[i : i + 1, : expected.shape[1]], expected)
    # The negative control: the last rows of all are not the image of the shorter sample.
    wrong = padded(last(sides=(rows("valid", image="last"),)))
    torch.testing.assert_close(wrong[:1], alone[0])
    assert not torch.allclose(wrong[1:, : alone[1].shape[1]], alone[1])


def last(**options):
    return [Site(f"blocks.{i}", tokens="x", image="last", **options) for i in range(3)]
