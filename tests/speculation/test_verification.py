"""What a rule accepts and what it costs, against brute force and against counting."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from accel.core.decoding import Sampling
from accel.methods.speculation import SpeculativeDecodingConfig, verify
from accel.methods.speculation.draft import above, carry, inverse_cdf, residual
from accel.methods.speculation.loop import step_of
from accel.methods.speculation.step import State, begin

Config = SpeculativeDecodingConfig
DRAWS = 200_000


def two_laws(vocabulary=12, seed=0, sharpness=1.5, apart=0.5):
    """p and q (1, 1, V), q a disturbed p, as drafts' laws are."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(2, vocabulary, generator=generator)
    p, q = logits[0].softmax(-1), (logits[0] + apart * logits[1]).softmax(-1)
    return p[None, None], q[None, None]


def chances(rule, p, q):
    """(f for every token (V,), what the rule says it spends)."""
    vocabulary = p.shape[-1]
    f, spent = rule(p.expand(1, vocabulary, -1), q.expand(1, vocabulary, -1), torch.arange(vocabulary)[None])
    assert (spent == spent[0, 0]).all(), "what is spent must not depend on the draft"
    return f[0], float(spent[0, 0])


def law(f, p, q):
    """The law of the token that comes out, written down once more."""
    p, q, f = p.flatten().double(), q.flatten().double(), f.double()
    rest = (p - q).clamp(min=0)
    return q * f + (1 - (q * f).sum()) * rest / rest.sum()


def tv(a, b):
    return float((a.flatten().double() - b.flatten().double()).abs().sum() / 2)


def brute_force(p, q, size, delta=None, codebook=None, distance=None):
    """min(1, p(C) / q(C)) with C straight from its definition."""
    p, q = p.flatten().tolist(), q.flatten().tolist()
    ranked = sorted(range(len(p)), key=lambda token: p[token])
    f = []
    for token in range(len(p)):
        first = min(max(0, ranked.index(token) - size // 2), len(p) - size)
        members = ranked[first : first + size]
        if delta is not None:
            members = [m for m in members if abs(p[m] - p[token]) < delta]
        if codebook is not None:
            members = [m for m in members if (codebook[m] - codebook[token]).square().sum() < distance]
        assert token in members
        f.append(min(1.0, sum(p[m] for m in members) / sum(q[m] for m in members)))
    return torch.tensor(f)


@pytest.mark.parametrize("size", [2, 3, 5, 12])
@pytest.mark.parametrize("delta", [None, 0.15, 0.02])
@pytest.mark.parametrize("distance", [None, 1.0])
def test_groups_are_the_published_ones(size, delta, distance):
    p, q = two_laws(seed=size)
    codebook = torch.randn(12, 2, generator=torch.Generator().manual_seed(9))
    near = None if distance is None else verify.near(codebook, distance)

    def rule(*inputs):
        return verify.group(*inputs, sizes=(size,), delta=delta, near_VV=near)

    f, spent = chances(rule, p, q)
    expected = brute_force(p, q, size, delta, None if distance is None else codebook, distance)
    torch.testing.assert_close(f, expected, atol=1e-5, rtol=1e-5)
    assert spent == pytest.approx(tv(law(f, p, q), p), abs=1e-6)


def test_a_group_of_one_is_the_lossless_rule():
    p, q = two_laws()
    f, spent = chances(lambda *x: verify.group(*x, sizes=(1,), delta=0.15), p, q)
    exact, nothing = chances(verify.exact, p, q)
    torch.testing.assert_close(f, exact)
    assert spent == nothing == 0.0
    # The lossless rule passes as often as any lossless rule can.
    assert float((q.flatten() * exact).sum()) == pytest.approx(1 - tv(p, q), abs=1e-6)


RULES = {
    "exact": Config(drafting="maximal"),
    "group": Config(group_size=4),
    "group, budget": Config(tv_budget=0.1),
    "mixture": Config(relaxation="mixture", mixture_weight=0.7),
    "mixture, budget": Config(relaxation="mixture", tv_budget=0.04),
}


@pytest.mark.parametrize("name", RULES)
def test_counted_law_is_the_predicted_one(name):
    """Drafts from q, verified and replaced a hundred thousand times: the law, and its distance to p."""
    p, q = two_laws(seed=4)
    rule = verify.rule_of(RULES[name])
    f, spent = chances(rule, p, q)
    generator = torch.Generator().manual_seed(1)
    draft = inverse_cdf(q.expand(1, DRAWS, -1), torch.rand(1, DRAWS, generator=generator))
    passes = torch.rand(1, DRAWS, generator=generator) < f[draft]
    replaced = inverse_cdf(residual(p, q).expand(1, DRAWS, -1), torch.rand(1, DRAWS, generator=generator))
    token = torch.where(passes, draft, replaced)
    counts = torch.bincount(token.flatten(), minlength=p.shape[-1]).double()
    predicted = law(f, p, q) * DRAWS
    z = (((counts - predicted) ** 2 / predicted).sum() - 11) / 22**0.5
    assert abs(float(z)) < 4
    assert tv(counts / DRAWS, p) == pytest.approx(spent, abs=0.004)
    if name == "exact":
        assert spent == 0
    else:
        assert spent > 0.005, "the case relaxes nothing"
        # Counting tells relaxed from lossless: the same counts are far from p.
        assert (
            float((((counts - p.flatten() * DRAWS) ** 2 / (p.flatten() * DRAWS)).sum() - 11) / 22**0.5) > 10
        )


@pytest.mark.parametrize("seed", range(6))
def test_budgets_are_kept_and_used(seed):
    p, q = two_laws(seed=seed, apart=0.3 + 0.2 * seed, vocabulary=40)
    passes = {}
    for budget in (0.0, 0.01, 0.05, 0.2):
        for relaxation in ("group", "mixture"):
            rule = verify.rule_of(Config(relaxation=relaxation, tv_budget=budget))
            f, spent = chances(rule, p, q)
            assert spent <= budget + 1e-6
            passes[relaxation, budget] = float((q.flatten() * f).sum())
            if relaxation == "mixture" and budget > 0:
                assert spent == pytest.approx(min(budget, tv(p, q)), abs=1e-6)
                # One for one, which no rule can beat.
                assert passes[relaxation, budget] == pytest.approx(1 - tv(p, q) + spent, abs=1e-5)
            assert passes[relaxation, budget] <= 1 - tv(p, q) + spent + 1e-5
    for relaxation in ("group", "mixture"):
        rising = [passes[relaxation, budget] for budget in (0.0, 0.01, 0.05, 0.2)]
        assert rising == sorted(rising)


def test_mixture_with_weight_spends_its_share():
    p, q = two_laws()
    f, spent = chances(lambda *x: verify.mixture(*x, weight=0.7), p, q)
    assert spent == pytest.approx(0.3 * tv(p, q), abs=1e-6)
    torch.testing.assert_close(law(f, p, q).float(), (0.7 * p + 0.3 * q).flatten())


def test_equal_laws_pass_everything():
    p, _ = two_laws()
    for config in RULES.values():
        f, spent = chances(verify.rule_of(config), p, p)
        torch.testing.assert_close(f, torch.ones_like(f))
        assert spent < 1e-6
    torch.testing.assert_close(residual(p, p), p)


def test_inverse_cdf_draws_the_law_and_no_token_of_weight_zero():
    weight = torch.tensor([0.0, 2.0, 0.0, 1.0, 5.0, 0.0])
    uniform = (torch.arange(8000) + 0.5) / 8000
    counts = torch.bincount(inverse_cdf(weight.expand(8000, -1), uniform), minlength=6)
    assert counts.tolist() == [0, 2000, 0, 1000, 5000, 0]
    edges = torch.tensor([0.0, 0.25, 0.375, 1 - 2**-24])
    assert inverse_cdf(weight.expand(4, -1), edges).tolist() == [1, 3, 4, 4]


def test_drafts_that_stay_take_the_new_law_with_them():
    p = torch.rand(2, 4, 5).softmax(-1)
    enters = torch.rand(2, 4, 5)
    q = carry(p, enters, torch.tensor([1, 3]))
    assert torch.equal(q[0], p[0, [1, 2, 3]])
    assert torch.equal(q[1], torch.stack([p[1, 3], *enters[1, :2]]))
    q = carry(p, enters, torch.tensor([2, 4]))
    assert torch.equal(q[0], torch.stack([*p[0, [2, 3]], enters[0, 0]]))
    assert torch.equal(q[1], enters[1, :3])


def test_where_the_token_above_stands():
    """In a window of 3 before slots 3, 4, 5: a row of 4 back, or of 2 back, twice if once is behind the window."""
    device = torch.device("cpu")
    assert above(3, 4, device).tolist() == [-1, 0, 1]
    assert above(3, 2, device).tolist() == [1, 2, 1]
    assert above(3, 1, device).tolist() == [2, 2, 2]


def test_sorting_packed_numbers_is_sorting():
    """As a compiler sorts, and a GPU: stable, zeros and ties in the order of tokens."""
    p = torch.rand(3, 5, 40).softmax(-1)
    p[..., ::3] = 0
    p[..., 1::5] = p[..., 1:2]
    by_torch = p.sort(dim=-1, stable=True)
    values, order = verify.ranked(p)
    assert torch.equal(values, by_torch.values)
    assert torch.equal(order, by_torch.indices)


# A step neither waits for the device nor depends on data for its shapes.

STEPS = {
    "noise": Config(),
    "noise, last": Config(fresh="last"),
    "maximal": Config(drafting="maximal"),
    "gumbel": Config(drafting="gumbel", verification="ratio"),
    "gumbel, last": Config(drafting="gumbel", verification="ratio", fresh="last"),
    "sjd": Config.sjd(),
    "group": Config(group_size=8),
    "group, budget": Config(tv_budget=0.05),
    "group, codebook": Config(group_size=4, distance_filter=0.5),
    "mixture": Config(relaxation="mixture", tv_budget=0.05),
}


def a_step(name, sampling, images=3, width=4, vocabulary=16, slots=9):
    """(step, its inputs) in the middle of a generation."""
    config = STEPS[name]
    generator = torch.Generator().manual_seed(0)
    forced = torch.full((slots,), -1)
    forced[4] = 20
    forced_S = pad(forced, (0, 2 * width), value=-1)
    codebook = torch.randn(vocabulary, 3, generator=generator)
    step = step_of(config, sampling, verify.rule_of(config, codebook), slots, row=3)
    first_BV = torch.randn(images, vocabulary, generator=generator)
    logits_BWV = torch.randn(images, width, vocabulary, generator=generator)
    q_BWV = (logits_BWV[:, :-1] + 0.3).softmax(-1)[:, :, torch.randperm(vocabulary, generator=generator)]
    draft_BW = torch.randint(vocabulary, (images, width - 1), generator=generator)
    if config.verifies_by == "noise":
        q_BWV = q_BWV[:, :0]
    state = begin(
        first_BV, forced_S, torch.zeros(images, dtype=torch.int64), draft_BW, width, q_BWV
    )._replace(finished_B=torch.tensor([1, 3, slots]))
    noise = torch.empty(images, 2 * width, vocabulary).exponential_(generator=generator)
    uniform = None if config.verifies_by == "noise" else torch.rand(images, width, 4, generator=generator)
    return step, (state, logits_BWV, uniform, noise, forced_S)


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait for the device."""

    BANNED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.BANNED):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


SAMPLING = Sampling(temperature=1.2, top_k=12, top_p=0.9)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait_for_the_device(name):
    step, inputs = a_step(name, SAMPLING)
    with NoSync():
        step(*inputs)
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        inputs[0].finished_B.max().item()


@pytest.mark.parametrize("name", STEPS)
def test_shapes_of_a_step_do_not_depend_on_data(name):
    step, (state, *rest) = a_step(name, SAMPLING)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # a rule may hold the codebook's neighbours

        def convert(x):
            return None if x is None else fake.from_tensor(x)

        new = step(State(*map(convert, state)), *map(convert, rest))
    for before, after in zip(state, new, strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


@pytest.mark.parametrize("name", ["noise", "gumbel", "group, budget", "mixture"])
def test_a_step_compiles_whole(name):
    step, inputs = a_step(name, SAMPLING)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="eager")
    for eager, traced in zip(step(*inputs), compiled(*inputs), strict=True):
        torch.testing.assert_close(traced, eager)
