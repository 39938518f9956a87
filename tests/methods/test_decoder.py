"""The learned decoder: what it may change, and what comes back from a file."""

from pathlib import Path

import pytest
import torch
from conftest import make_pixart, pixart_call

import accel
from accel.core import sidecar
from accel.errors import ConfigError, UnsupportedError, WeightsError
from accel.methods import decoder, learned, windows
from accel.pipelines import builtin

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


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """A PixArt, and a side-car of it that is a decoder alone."""
    pipe = make_pixart()
    torch.manual_seed(4)
    net = decoder.Decoder(16, width=8, depth=1)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    file = tmp_path_factory.mktemp("car") / "c.safetensors"
    mark = [sidecar.fingerprint(pipe.transformer)]
    sidecar.write(file, learned.KIND, mark, decoder.named(net), most="0.5")
    return pipe, str(file)


def merging(file=None, budget=0.4, **settings):
    schedule = accel.Schedule(cycle=(budget,), dense_first=1, dense_last=0, refresh_every=1)
    return accel.TokenMergingConfig(groups="windows", adapter=file, schedule=schedule, **settings)


def drawn(pipe, config, **call):
    with accel.accelerate(pipe, config) as handle:
        return pipe(**pixart_call(guidance=3.0, **call)).images, handle.stats.notes


def test_images_of_a_batch_are_decoded_as_each_alone(pixart):
    """Plans for each image, both branches of guidance in one batch, a sampler that is not of flow matching."""
    pipe, file = pixart
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(7))
    both = pixart_call(batch=2)
    for config in (merging(file), accel.DynamicChunkingConfig(budget=0.4, adapter=file)):
        batch, _ = drawn(pipe, config, batch=2, latents=latents)
        for i in range(2):
            embeds = {name: both[name][i : i + 1] for name in ("prompt_embeds", "negative_prompt_embeds")}
            alone, _ = drawn(pipe, config, latents=latents[i : i + 1], **embeds)
            assert torch.allclose(batch[i : i + 1], alone, atol=1e-4)
        without, _ = drawn(pipe, merging(), batch=2, latents=latents)
        assert not torch.allclose(batch, without, atol=1e-2)


def test_it_is_on_where_the_file_says_and_off_in_so_many_words(pixart):
    pipe, file = pixart
    for config in (merging, lambda *a: accel.DynamicChunkingConfig(adapter=a[0], budget=a[1])):
        with pytest.raises(UnsupportedError, match=r"at most 50% of the tokens .* compute 60% at least"):
            accel.accelerate(pipe, config(file, 0.6))
    falling = {"cycle": (0.7,), "late_cycle": (0.4,), "dense_first": 1, "dense_last": 0, "refresh_every": 1}
    schedule = accel.Schedule(**falling)

    def steps(adapter):
        found = []
        config = accel.TokenMergingConfig(groups="windows", adapter=adapter, schedule=schedule)
        drawn(pipe, config, callback=lambda i, t, latents: found.append(latents.clone()), callback_steps=1)
        return found

    equal = [torch.equal(a, b) for a, b in zip(steps(None), steps(file), strict=True)]
    assert equal == [True, True, True, False, False, False]  # whole, then 70 % twice, then 40 %
    for copied in (
        merging(file, unmerge="copy"),
        accel.DynamicChunkingConfig(budget=0.4, adapter=file, dechunk="copy"),
    ):
        _, notes = drawn(pipe, copied)
        assert decoder.NOTHING_CARRIED in notes


def test_what_it_was_not_trained_for_is_refused(pixart):
    pipe, file = pixart
    for settings in ({"depth": (0.6, 1.4)}, {"unconditional": 0.3}, {"chunks": "tokens"}):
        with pytest.raises(ConfigError, match="adapter must be None but with windows, and one plan"):
            accel.DynamicChunkingConfig(adapter=file, budget=0.5, **settings)
    own = Path(file).with_name("d.safetensors")
    sidecar.write(
        own, learned.KIND, [sidecar.fingerprint(pipe.transformer)], decoder.named(decoder.Decoder(4))
    )
    with pytest.raises(WeightsError, match="decoder is for 4 channels a token, and this model predicts 16"):
        drawn(pipe, merging(str(own)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", ["flat", "textured"])
def test_the_one_that_ships_fits_the_built_in_model(world, dtype):
    car = sidecar.read(builtin.UPCYCLED, learned.KIND)
    car.check(builtin.load_pipeline("cpu", dtype, world).transformer)
    assert decoder.of(car) is not None
    assert 0 < float(car.metadata["most"]) < 1
