"""On a GPU: what the interpreter runs, and what it cannot: FLUX's sizes, three types, graphs, inductor."""

import pytest
import torch

pytest.importorskip("triton")

from numerics import check, check_match

from accel.evaluation.bench.kernel_cases import CASES, C, K, M, N, chain, destinations, values
from accel.kernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FLOATS = dispatch.FLOATS


def large(dtype, seed=0):
    torch.manual_seed(seed)
    return values("cuda", dtype, 1, N, C), destinations("cuda", 1, N, M), values("cuda", dtype, 1, K, C)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_case_at_full_size(dtype):
    torch.manual_seed(0)
    assert {case.name: case.operation.check(case.arguments("cuda", dtype)) for case in CASES} == {
        case.name: None for case in CASES
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_full_size_against_float64(dtype):
    x, dst, y = large(dtype)
    best, target = dispatch.OPS["match"].kernel(x, dst, None)
    check_match(x, dst, None, (best, target), 1e-4)
    _, owner, size, lists = dispatch.OPS["plan"].kernel(best, target, K)
    reduced = dispatch.OPS["merge"].kernel(x, owner, size, lists)
    mean = torch.zeros(1, K, C, dtype=torch.float64, device="cuda").index_add_(1, owner[0], x.double())
    mean /= torch.bincount(owner[0], minlength=K)[None, :, None]
    check(reduced, mean, dtype)
    out = dispatch.OPS["unmerge"].kernel(x, y, reduced, owner, True)
    check(out, x.double() + (y.double() - reduced.double())[:, owner[0]], dtype)


def test_two_runs_are_equal():
    args = large(torch.bfloat16)
    with dispatch.use("triton"):
        assert torch.equal(chain(*args), chain(*args))


def test_captured_in_a_graph():
    x, dst, y = large(torch.bfloat16)
    with dispatch.use("triton"):
        plain = chain(x, dst, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x, dst, y)
        x2, _, y2 = large(torch.bfloat16, 1)
        expected = chain(x2, dst, y2)
        for a, b, truth in ((x2, y2, expected), (*large(torch.bfloat16)[::2], plain)):
            x.copy_(a)
            y.copy_(b)
            graph.replay()
            assert torch.equal(out, truth)


def test_nothing_is_proven_while_a_graph_is_captured():
    x, dst, y = large(torch.bfloat16)
    chain(x, dst, y)  # cuBLAS and the allocator are warm
    dispatch.OPS["merge"].verdicts.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(x, dst, y)
    assert dispatch.OPS["merge"].verdicts == {}


def test_compiled_by_inductor():
    args = large(torch.bfloat16)
    plain = chain(*args)
    torch.compiler.reset()
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(chain, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            assert dispatch.close(compiled(*args), plain) is None
    torch.compiler.reset()
