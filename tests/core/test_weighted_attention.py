"""Keys that weigh as many as they stand for: every form of it against the definition."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from accel.core import weighted_attention as wa

PARTS = ((1, 9), (4, 5), (16, 2), (1, 3))


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(q, k, v, parts, scale):
    size_S = torch.tensor([s for s, n in parts for _ in range(n)], dtype=torch.float64)
    score = scale * q.double() @ k.double().transpose(-1, -2)
    weight = size_S * (score - score.amax(-1, keepdim=True)).exp()
    return (weight / weight.sum(-1, keepdim=True)) @ v.double()


@pytest.mark.parametrize("form", wa.FORMS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_form_is_the_definition(form, scale):
    q, k, v = numbers(2, 3, 11, 16, seed=1), numbers(2, 3, 19, 16, seed=2), numbers(2, 3, 19, 16, seed=3)
    scale = scale or 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention outside of torch.compile
        found = wa.FORMS[form](q, k, v, PARTS, scale)
    torch.testing.assert_close(found.double(), by_definition(q, k, v, PARTS, scale), atol=1e-5, rtol=1e-5)
    # The negative control: without sizes it is something else.
    assert (F.scaled_dot_product_attention(q, k, v, scale=scale) - found).abs().max() > 0.05


def test_the_channel_keeps_its_bias_in_half_precision():
    q, k, v = (numbers(1, 2, 19, 16, seed=s, dtype=torch.bfloat16) for s in (1, 2, 3))
    wanted = by_definition(q, k, v, PARTS, 0.25)
    for form in ("mask", "channel", "lse"):
        assert (wa.FORMS[form](q, k, v, PARTS, 0.25).double() - wanted).abs().max() < 0.03


def test_runs_of_one_size_are_one():
    assert wa.runs(((1, 4), (1, 0), (4, 0), (1, 3), (4, 2))) == ((1, 7), (4, 2))


def test_the_fastest_form_is_taken_and_those_that_fail_are_not(monkeypatch):
    q, k, v = numbers(1, 2, 11, 16), numbers(1, 2, 19, 16), numbers(1, 2, 19, 16)

    def broken(*args):
        raise RuntimeError("no such kernel")

    def slow(*args):
        import time

        time.sleep(0.02)
        return wa.masked(*args)

    monkeypatch.setattr(wa, "_CHOSEN", {})
    monkeypatch.setattr(wa, "FORMS", {"mask": slow, "lse": broken, "channel": wa.channel})
    out = wa.attend(q, k, v, PARTS)
    assert wa.chosen() == {("cpu", torch.float32, 16): "channel"}
    torch.testing.assert_close(out.double(), by_definition(q, k, v, PARTS, 0.25), atol=1e-5, rtol=1e-5)


def test_gradients_go_through_the_sizes_too(monkeypatch):
    """Training at reduced tokens: whatever is fastest, log-sum-exps have no gradient."""
    monkeypatch.setattr(wa, "_CHOSEN", {("cpu", torch.float32, 16): "lse"})
    gradients = []
    for attend in (wa.attend, lambda q, k, v, parts: by_definition(q, k, v, parts, 0.25)):
        tensors = [numbers(1, 2, n, 16, seed=n).requires_grad_() for n in (11, 19)]
        attend(tensors[0], tensors[1], tensors[1] * 0.5, PARTS).double().square().sum().backward()
        gradients.append([t.grad for t in tensors])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_masks_reach_attention_through_what_processors_do_with_them():
    q, k, v = numbers(2, 3, 11, 16), numbers(2, 3, 19, 16), numbers(2, 3, 19, 16)
    wanted = by_definition(q, k, v, PARTS, 0.25)
    mask = wa.SizedMask.of(wa.bias(PARTS, q)[None, None], PARTS)  # (1, 1, S)
    # diffusers' Attention.prepare_attention_mask, then a view with heads
    shaped = mask.expand(2, -1, -1).repeat_interleave(3, dim=0).view(2, 3, -1, 19).to(q.dtype)
    assert isinstance(shaped, wa.SizedMask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=shaped, dropout_p=0.0, is_causal=False)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    # Together with another mask it is an ordinary one.
    blocked = torch.zeros(1, 1, 1, 19)
    blocked[..., :4] = -math.inf
    both = mask[None] + blocked
    assert type(both) is torch.Tensor
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=both)
    left = tuple(zip((1, 4, 16, 1), (5, 5, 2, 3), strict=True))
    torch.testing.assert_close(
        found.double(), by_definition(q, k[:, :, 4:], v[:, :, 4:], left, 0.25), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("ordered", [True, False])
def test_keys_carry_their_sizes_to_attention(first, mask, ordered):
    q, k, v = numbers(2, 3, 11, 16), numbers(2, 3, 19, 16), numbers(2, 3, 19, 16)
    parts = ((1, 8), (4, 6))
    size_PK = torch.tensor([[1.0] * 8 + [4.0] * 6])
    image, text = (k[:, :, :14], k[:, :, 14:]) if first else (k[:, :, 5:], k[:, :, :5])
    sized = wa.SizedKeys.of(image.transpose(1, 2), size_PK, parts if ordered else (), first)
    sized = (sized * 2.0 / 2.0).transpose(1, 2)
    joint = torch.cat([sized, text] if first else [text, sized], dim=2)
    keep = torch.ones(2, 1, 1, 19, dtype=torch.bool)
    keep[..., 3 if not first else 17] = mask is None
    given = {None: None, "bool": keep, "float": torch.zeros(keep.shape).masked_fill(~keep, -math.inf)}[mask]
    out = F.scaled_dot_product_attention(q, joint, v, attn_mask=given)
    assert type(out) is torch.Tensor
    every = (*parts, (1, 5)) if first else ((1, 5), *parts)
    sizes = torch.tensor([s for s, n in every for _ in range(n)], dtype=torch.float32)
    bias = sizes.log().masked_fill(~keep, -math.inf)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_keys_without_the_image_among_them_carry_nothing():
    """Qwen-Image 2.1 lets text attend to the keys before it."""
    q, k = numbers(2, 11, 3, 16), numbers(2, 19, 3, 16)
    for first, text in ((False, slice(None, 5)), (True, slice(14, None))):
        sized = wa.SizedKeys.of(k, torch.full((1, 14), 4.0), ((4, 14),), first)
        assert type(sized[:, text]) is torch.Tensor
        assert isinstance(sized[:, 1:] if not first else sized[:, :18], wa.SizedKeys)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, sized[:, text], k[:, text])))
        plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k[:, text], k[:, text])))
        assert torch.equal(out, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 128])
def test_every_form_on_cuda(dtype, channels):
    """At FLUX's length, with half of the tokens and all of its text."""
    parts = ((1, 512 + 1344), (4, 640), (16, 12))
    count = sum(n for _, n in parts)
    q, k, v = (numbers(1, 4, count, channels, seed=s).to("cuda", dtype) for s in (1, 2, 3))
    size_S = torch.tensor([float(s) for s, n in parts for _ in range(n)], device="cuda").double()
    weight = (channels**-0.5 * q.double() @ k.double().transpose(-1, -2)).exp() * size_S
    wanted = (weight / weight.sum(-1, keepdim=True)) @ v.double()
    for name, form in wa.FORMS.items():
        found = form(q, k, v, parts, channels**-0.5).double()
        assert (found - wanted).abs().max() < 0.02, name
    assert wa.fastest(q, k, v, parts, channels**-0.5) in wa.FORMS
