import pytest
import torch

from accel.core.plan import TokenPlan

# Shapes: B batch, N tokens, K slots, C channels.


def random_plan(rows: int, tokens: int, slots: int, *, holes: bool, seed: int = 0) -> TokenPlan:
    """Every slot owns its own position; the other tokens go anywhere, some nowhere."""
    g = torch.Generator().manual_seed(seed)
    dst = torch.stack([torch.randperm(tokens, generator=g)[:slots] for _ in range(rows)])
    owner = torch.randint(-1 if holes else 0, slots, (rows, tokens), generator=g)
    owner.scatter_(1, dst, torch.arange(slots).expand(rows, -1))
    return TokenPlan.build(dst, owner, complete=not holes)


def naive_reduce(plan, x):
    out = torch.zeros(x.shape[0], plan.slots, x.shape[2], dtype=torch.float64)
    for b in range(x.shape[0]):
        owner = plan.owner[b % plan.owner.shape[0]].tolist()
        for k in range(plan.slots):
            out[b, k] = torch.stack([x[b, n].double() for n in range(plan.tokens) if owner[n] == k]).mean(0)
    return out


def naive_expand(plan, y):
    out = torch.zeros(y.shape[0], plan.tokens, y.shape[2], dtype=y.dtype)
    for b in range(y.shape[0]):
        for n, k in enumerate(plan.owner[b % plan.owner.shape[0]].tolist()):
            if k >= 0:
                out[b, n] = y[b, k]
    return out


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_reduce_expand_and_take_match_loops(rows, holes):
    plan = random_plan(rows, tokens=23, slots=9, holes=holes)
    x = torch.randn(3, 23, 5)
    y = torch.randn(3, 9, 5)
    torch.testing.assert_close(plan.reduce(x).double(), naive_reduce(plan, x), rtol=0, atol=1e-6)
    assert torch.equal(plan.expand(y), naive_expand(plan, y))
    picked = torch.stack([x[b, plan.dst[b % rows]] for b in range(3)])
    assert torch.equal(plan.take(x), picked)


def test_reduce_accumulates_in_float32():
    # 4096 equal bf16 values: summed in bf16 the mean would stick at 1/16 of the right one.
    plan = TokenPlan.build(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 4096, dtype=torch.long))
    x = torch.full((1, 4096, 2), 3.0, dtype=torch.bfloat16)
    assert torch.equal(plan.reduce(x), x[:, :1])


def test_permutation_round_trip_is_exact():
    plan = TokenPlan.permutation(torch.randperm(17))
    x = torch.randn(2, 17, 3)
    assert torch.equal(plan.expand(plan.reduce(x)), x)
    assert torch.equal(plan.reduce(x), plan.take(x))


def test_repeat_serves_both_halves_of_guidance():
    plan = random_plan(2, 11, 4, holes=False)
    half = torch.randn(2, 11, 3)
    both = plan.repeat(2).reduce(torch.cat([half, half]))
    assert torch.equal(both[:2], both[2:])
    assert torch.equal(both[:2], plan.reduce(half))


def test_reference_tokens_behind_have_slots_of_their_own():
    """The slots' lists of tokens are of the plan without them: kernels would read beyond their end."""
    plan = TokenPlan.build(torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1, 1]]))
    assert plan.segments is not None
    longer = plan.before(3)
    assert longer.segments is None
    x = torch.randn(1, 7, 5)
    expected = torch.cat([x[:, :2].mean(1, keepdim=True), x[:, 2:4].mean(1, keepdim=True), x[:, 4:]], 1)
    torch.testing.assert_close(longer.reduce(x), expected)
