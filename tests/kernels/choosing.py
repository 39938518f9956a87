"""Which implementation runs, where kernels can. Run as `numerics.py` is: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from numerics import DEVICE, owners, randn

from accel.errors import AccelWarning, ConfigError, NumericsError
from accel.evaluation.bench.kernel_cases import CASES, chain
from accel.kernels import dispatch, use
from accel.kernels.merge import merge
from accel.kernels.plan import plan, segments
from accel.kernels.unmerge import unmerge

MERGE = dispatch.OPS["merge"]


@pytest.fixture
def arguments():
    owner = owners(1, 33, 12, 0)
    return randn(2, 33, 20), owner, *segments(owner, 12)


@pytest.fixture(autouse=True)
def _forget():
    for op in dispatch.OPS.values():
        op.verdicts.clear()
    yield
    for op in dispatch.OPS.values():
        op.verdicts.clear()


def other_kernel(monkeypatch, kernel):
    monkeypatch.setattr(MERGE, "kernel", kernel)


def test_the_kernel_runs_and_is_proven(arguments, monkeypatch):
    calls, kernel = [], MERGE.kernel
    other_kernel(monkeypatch, lambda *args: calls.append(args) or kernel(*args))
    first = merge(*arguments)
    assert list(MERGE.verdicts.values()) == [None]
    assert len(calls) == 2  # once to be proven
    second = merge(*arguments)
    assert len(calls) == 3
    assert torch.equal(first, second)
    with use("reference"):
        torch.testing.assert_close(merge(*arguments), first)
    assert len(calls) == 3
    merge(randn(2, 33, 21), *arguments[1:])  # other channels are another kind
    assert len(MERGE.verdicts) == 2


def raises(*args):
    raise RuntimeError("out of resources")


def wrong(x, owner, size, segments):
    return x[:, : size.shape[1]].contiguous()


@pytest.mark.parametrize(("kernel", "why"), [(wrong, "off by"), (raises, "out of resources")])
def test_a_kernel_that_fails_is_not_used(arguments, monkeypatch, kernel, why):
    other_kernel(monkeypatch, kernel)
    with pytest.warns(AccelWarning, match=f"'merge' is not used .*{why}"):
        found = merge(*arguments)
    assert torch.equal(found, MERGE.reference(*arguments))
    assert torch.equal(merge(*arguments), found)  # silently, from now on
    assert why in dispatch.status()[1]
    MERGE.verdicts.clear()
    with use("triton"), pytest.raises(NumericsError, match=why):
        merge(*arguments)


def test_gradients_take_the_reference(arguments):
    x, *rest = arguments
    x = x.clone().requires_grad_()
    merge(x, *rest).sum().backward()
    assert MERGE.verdicts == {}
    _, size, _ = rest
    torch.testing.assert_close(x.grad[0, :, 0], 1 / size[0].gather(0, rest[0][0]))
    with torch.no_grad():
        merge(x, *rest)
    assert len(MERGE.verdicts) == 1


def test_what_kernels_do_not_take_is_the_references(arguments):
    x, *rest = arguments
    assert merge(x.double(), *rest).dtype == torch.float64
    assert merge(x[:0], *rest).shape == (0, 12, 20)
    assert MERGE.verdicts == {}
    none = merge(x, torch.full_like(rest[0], -1), *segments(torch.full_like(rest[0], -1), 0))
    assert none.shape == (2, 0, 20)
    with pytest.raises((RuntimeError, ValueError)):
        merge(x, *(t.to("meta") for t in rest))


def test_tensors_that_are_not_contiguous(arguments):
    x, *rest = arguments
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not apart.is_contiguous()
    assert torch.equal(merge(apart, *rest), merge(x, *rest))
    full = torch.cat([x, x], 2)[..., :20]
    y = merge(x, *rest)
    assert torch.equal(
        unmerge(full, y, None, rest[0], complete=True), unmerge(x, y, None, rest[0], complete=True)
    )


def test_indices_out_of_range_are_no_harm_and_can_be_found(arguments):
    x, owner, size, lists = arguments
    y = merge(x, owner, size, lists)
    far = owner.clone()
    far[0, 3] = 10**6
    kernel = dispatch.OPS["unmerge"].kernel
    found = kernel(x, y, None, far, True)
    assert torch.equal(found[:, 3], x[:, 3])  # nothing is read there
    with use("auto", check=True), pytest.raises(ConfigError, match="unmerge: indices from 0 to 1000000"):
        unmerge(x, y, None, far, complete=True)


def test_more_tokens_than_a_kernel_holds():
    best = randn(1, 5000)
    target = torch.zeros(1, 5000, dtype=torch.int64, device=DEVICE)
    target[:] = best.argmin()
    dst, _, size, _ = plan(best, target, 3000)
    assert dispatch.OPS["plan"].verdicts == {}
    assert size.sum() == 5000
    assert sorted(best[0, dst[0]].tolist()) == sorted(best[0].tolist())[:3000]


def chain_arguments():
    return (
        randn(2, 70, 40),
        torch.randperm(70, generator=torch.Generator().manual_seed(0))[:18].sort().values[None].to(DEVICE),
        randn(2, 50, 40, seed=1),
    )


def test_compiled_in_one_graph():
    seen = []

    def backend(graph, example):
        seen.append([str(node.target) for node in graph.graph.nodes if "accel" in str(node.target)])
        return graph.forward

    args = chain_arguments()
    plain = chain(*args)
    torch.compiler.reset()
    compiled = torch.compile(chain, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*args), plain)
    # What inductor can fuse itself is left to it.
    assert seen == [["accel.match.default", "accel.plan.default", "accel.merge.default"]]
    with use("reference"):
        torch.testing.assert_close(compiled(*args), plain)
    assert seen[1] == []
    torch.compiler.reset()


@pytest.mark.parametrize("name", sorted(dispatch.OPS))
def test_opcheck(name):
    args = small_arguments()[name]
    torch.library.opcheck(
        dispatch.OPS[name].node,
        args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def small_arguments():
    """Of every operation."""
    x, dst, y = chain_arguments()
    exempt = randn(1, 70, seed=5) > 1.5
    best, target = dispatch.OPS["match"].reference(x, dst, exempt)
    _, owner, size, lists = dispatch.OPS["plan"].reference(best, target, 50)
    stamps = [randn(2, 70, 1, seed=i) for i in range(2)]
    slots = torch.tensor([[4, 5, 6], [7, 8, 9]], device=DEVICE)
    return {
        "match": (x, dst, exempt),
        "plan": (best, target, 50),
        "segments": (owner, 50),
        "merge": (x, owner, size, lists),
        "unmerge": (x, y, y.flip(0), owner, True),
        "detail": (x, 7, 10),
        "forecast": ([x, x * 2], stamps, 0.5, 0.5),
        "verify": (randn(2, 3, 50), randn(2, 9, 50, seed=1).exp(), slots, 0.8, 20),
        "correct": (x, x * 2, x * 3, torch.tensor(0.5, device=DEVICE)),
    }


@pytest.mark.parametrize("name", sorted(dispatch.OPS))
def test_every_check_finds_a_wrong_result(name):
    """That a kernel proves itself means something: what is off in one place, or for other arguments, fails."""
    op, args = dispatch.OPS[name], small_arguments()[name]
    truth = op.reference(*args)
    found = op.kernel(*args)
    assert op.agrees(args, found, truth) is None
    several = isinstance(found, tuple)
    for at in range(len(found) if several else 1):
        spoiled = [t.clone() for t in found] if several else [found.clone()]
        values = spoiled[at].view(-1)
        place = min(7, len(values) - 1)
        if not values.is_floating_point():
            values[place] += 1
        elif values[place].isinf():
            values[place] = 0.0
        else:
            values[place] += 0.5 * values.abs().max()
        assert op.agrees(args, tuple(spoiled) if several else spoiled[0], truth), at


def test_a_match_is_not_judged_by_the_references_rounding():
    """Products of TF32, which users allow, have 11 bits."""
    op, args = dispatch.OPS["match"], small_arguments()["match"]
    best, target = op.reference(*args)
    rounded = torch.where(best.isfinite(), best.bfloat16().float(), best)
    assert not torch.equal(rounded, best)
    assert op.agrees(args, op.kernel(*args), (rounded, target)) is None
    # The negative control: another destination for every token.
    assert "less similar" in op.agrees(args, (best, args[1][:, :1].expand_as(target)), (best, target))


def test_every_operation_is_measured_and_checked():
    assert {case.op for case in CASES} == set(dispatch.OPS) == set(small_arguments())
