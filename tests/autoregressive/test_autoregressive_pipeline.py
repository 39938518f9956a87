"""Plain decoding against transformers' own `generate`, batches, seeds, output types, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
import tiny_janus
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_janus import PROMPTS

import accel
from accel.core.decoding import decode
from accel.errors import (
    AccelWarning,
    ConfigError,
    NumericsError,
    UnknownNameError,
    UnsupportedError,
    WeightsError,
)
from accel.pipelines.autoregressive import AutoregressivePipeline
from accel.pipelines.autoregressive.adapter import Layout, Prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_janus.save(tmp_path_factory.mktemp("janus"), tiny_janus.model())


@pytest.fixture
def pipe(folder):
    return load(folder)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def load(folder, **options) -> AutoregressivePipeline:
    pipe = AutoregressivePipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens(pipe, prompts=PROMPTS, **options):
    return pipe(list(prompts), **{"temperature": 0, **options, "output_type": "tokens"}).images


def generate(model, prompts, guidance: float):
    """transformers' own greedy decoding of a left-padded batch."""
    tokenizer = tiny_janus.tokenizer()
    text = [f"{prompt}{tokenizer.boi_token}" for prompt in prompts]
    inputs = tokenizer(text, padding=True, padding_side="left", return_tensors="pt")
    # transformers 5.0 reckons with its defaults, which are None; the length is the larger of this and what is needed.
    extra: dict = {"num_return_sequences": 1, "max_length": 1}
    if guidance == 1:  # its loop doubles the batch all the same, and needs someone to drop the second half
        extra["logits_processor"] = [lambda ids, scores: scores[: len(prompts)]]
    return model.generate(
        **inputs, generation_mode="image", do_sample=False, guidance_scale=guidance, **extra
    )


needs_their_generate = pytest.mark.skipif(
    transformers.__version__.startswith(("5.0.", "5.17.")),
    reason="transformers' Janus generate: 5.0's differs from its own full pass from the second token on, 5.17's raises TypeError",
)


@needs_their_generate
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_greedy_is_transformers_generate(pipe, guidance):
    expected = generate(pipe.model, PROMPTS, guidance)
    assert torch.equal(tokens(pipe, guidance_scale=guidance), expected)
    # One prompt without padding, so that the agreement is not one of two wrong paddings.
    assert torch.equal(tokens(pipe, PROMPTS[:1], guidance_scale=guidance), expected[:1])


@needs_their_generate
def test_the_comparison_can_fail(pipe, monkeypatch):
    """Padding on the left that is not masked, one wrong token in the unconditional prompt: both show."""
    expected = generate(pipe.model, PROMPTS, 5.0)
    own_prefix = type(pipe.adapter).prefix

    def left_padded(self, prompts, layout, guided):
        prefix = own_prefix(self, prompts, layout, guided)
        longest = max(prefix.lengths)
        rows = [
            row.roll(longest - length, 0)
            for row, length in zip(prefix.embedding_RPD, prefix.lengths, strict=True)
        ]
        return Prefix(torch.stack(rows), (longest,) * len(rows))

    monkeypatch.setattr(type(pipe.adapter), "prefix", left_padded)
    got = tokens(pipe, guidance_scale=5.0)
    longest = max(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index]))
    assert torch.equal(got[longest], expected[longest])  # the one without padding
    assert not torch.equal(got, expected)
    monkeypatch.undo()

    pipe.adapter.special["padding"] += 1
    assert not torch.equal(tokens(pipe, guidance_scale=5.0), expected)


def test_defaults_come_from_the_checkpoint(pipe, folder, copied):
    assert torch.equal(tokens(pipe), tokens(pipe, guidance_scale=3.0))
    assert not torch.equal(tokens(pipe), tokens(pipe, guidance_scale=1.0))
    path = copied / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "top_k": 1, "temperature": 0.5}))
    one = load(copied)(PROMPTS[0], output_type="tokens").images  # top_k=1 is greedy
    assert torch.equal(one, tokens(pipe, PROMPTS[:1]))
    assert load(copied).adapter.defaults().temperature == 0.5


def test_an_image_depends_on_its_own_generator_alone(pipe):
    def seeded(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return tokens(pipe, prompts, temperature=1.0, top_k=20, generator=generators)

    batch = seeded(PROMPTS, [1, 2, 3, 4])
    assert torch.equal(seeded(PROMPTS[2:3], [3]), batch[2:3])
    assert torch.equal(seeded(PROMPTS[::-1], [4, 3, 2, 1]), batch.flip(0))
    assert not torch.equal(seeded(PROMPTS, [1, 2, 5, 4])[2], batch[2])
    one = tokens(pipe, PROMPTS[:2], temperature=1.0, generator=torch.Generator().manual_seed(7))
    again = tokens(pipe, PROMPTS[:1], temperature=1.0, generator=torch.Generator().manual_seed(7))
    assert torch.equal(one[:1], again)
    torch.manual_seed(0)
    first = tokens(pipe, PROMPTS[:1], temperature=1.0)
    second = tokens(pipe, PROMPTS[:1], temperature=1.0)
    torch.manual_seed(0)
    assert torch.equal(tokens(pipe, PROMPTS[:1], temperature=1.0), first)
    assert not torch.equal(first, second)


def test_images_of_a_prompt_follow_each_other(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    got = tokens(pipe, PROMPTS[:2], temperature=1.0, top_k=20, num_images_per_prompt=2, generator=generators)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    spread = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert torch.equal(got, tokens(pipe, spread, temperature=1.0, top_k=20, generator=generators))


def test_pixels_are_the_vq_models(pipe):
    token_BT = tokens(pipe)
    raw = pipe.model.decode_image_tokens(token_BT)  # (B, H, W, 3), normalised
    expected = (raw * torch.tensor(tiny_janus.STD) + torch.tensor(tiny_janus.MEAN)).clamp(0, 1)
    pt = pipe(list(PROMPTS), temperature=0, output_type="pt").images
    assert pt.shape == (4, 3, 8, 8)
    torch.testing.assert_close(pt.permute(0, 2, 3, 1), expected)
    array = pipe(list(PROMPTS), temperature=0, output_type="np").images
    np.testing.assert_allclose(array, expected.numpy(), atol=1e-6)
    pil = pipe(list(PROMPTS), temperature=0).images
    assert [image.size for image in pil] == [(8, 8)] * 4
    assert np.abs(np.asarray(pil[3]) / 255 - array[3]).max() <= 0.5 / 255 + 1e-6


def test_codebook_is_what_the_vq_model_decodes(pipe):
    codes = pipe.adapter.codebook_VD
    token_BT = tokens(pipe)
    looked_up = pipe.model.model.vqmodel.quantize.get_codebook_entry(token_BT)  # (B, D, rows, columns)
    torch.testing.assert_close(codes[token_BT], looked_up.flatten(2).transpose(1, 2))
    assert pipe.adapter.codebook_VD is codes


def test_janus_processor_agrees(pipe, folder):
    pytest.importorskip("torchvision", reason="JanusProcessor needs it")
    from transformers import JanusProcessor

    processor = JanusProcessor.from_pretrained(folder)
    inputs = processor(list(PROMPTS), generation_mode="image", padding=True, return_tensors="pt")
    prefix = pipe.adapter.prefix(list(PROMPTS), pipe.adapter.layout(None, None), guided=False)
    for row, mask, own, length in zip(
        inputs["input_ids"], inputs["attention_mask"], prefix.embedding_RPD, prefix.lengths, strict=True
    ):
        torch.testing.assert_close(own[:length], pipe.model.get_input_embeddings()(row[mask.bool()]))
    raw = pipe.model.decode_image_tokens(tokens(pipe)).float()
    theirs = processor.postprocess(list(raw), return_tensors="pt")["pixel_values"]  # (B, 3, H, W) uint8
    ours = pipe(list(PROMPTS), temperature=0, output_type="pt").images
    assert (theirs / 255 - ours).abs().max() <= 1 / 255 + 1e-6  # theirs cuts off what is between two levels


def test_progress_is_told(pipe, capsys):
    seen = []
    pipe(PROMPTS[0], callback_on_step_end=lambda pipe, slots, total, kept: seen.append((slots, total)))
    assert seen == [(slot, 16) for slot in range(1, 17)]
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config()
    pipe(PROMPTS[0])
    assert "16/16" in capsys.readouterr().err


def test_the_decoder_is_the_pipelines(pipe):
    seen = {}

    def ones(model, sampling, generators, on_slots):
        seen.update(images=model.images, vocabulary=model.vocabulary, top_k=sampling.top_k)
        return torch.ones(model.images, len(model.forced_N), dtype=torch.int64)

    assert pipe.decoder is decode
    pipe.decoder = ones
    assert (tokens(pipe, top_k=3) == 1).all()
    assert seen == {"images": 4, "vocabulary": 64, "top_k": 3}


def test_layout_takes_forced_tokens_out():
    layout = Layout(2, 3, (-1, -1, -1, 9, -1, -1, -1, 9))
    assert layout.finished(torch.arange(8)[None]).tolist() == [[0, 1, 2, 4, 5, 6]]
    assert Layout(1, 2, (-1,) * 4, (2, 3)).finished(torch.arange(4)[None]).tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale must be a number >= 1"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"output_type": "jpeg"}, "output_type must be one of pil"),
        ({"height": 16}, "images of 8x8 pixels only, not 8x16"),
        ({"generator": [torch.Generator()] * 3}, r"one per image \(1\), got 3"),
        ({"generator": 5}, "generator must be a torch.Generator or a list of them, on any device, got 5"),
        ({"generator": [5]}, r"generator must be .*got \[5\]"),
        ({"prompt": 3}, "prompt must be a str"),
        ({"prompt": ["a", None]}, "the list has None"),
        ({"prompt": []}, "prompt must be a str or a list"),
    ],
)
def test_bad_arguments(pipe, options, message):
    with pytest.raises(ConfigError, match=message):
        pipe(**{"prompt": "a", **options})


def test_prompt_beyond_the_context(pipe):
    with pytest.raises(
        UnsupportedError, match=r"prompt 1 has 65 tokens and an image takes 16.* 64 that Janus"
    ):
        pipe(["a", "a " * 62 + "a"])


def test_nan_is_found_with_its_place(pipe):
    with torch.no_grad():  # everything after a token 5 is NaN
        pipe.model.model.generation_embeddings.weight[5] = torch.nan

    def decoder(model, sampling, generators, on_slots):
        token_BN = torch.ones(model.images, len(model.forced_N), dtype=torch.int64)
        token_BN[1, 6] = 5
        for slot in range(16):
            model.forward(token_BN[:, slot : slot + 1], torch.full((model.images,), slot))
        return token_BN

    pipe.decoder = decoder
    with pytest.raises(NumericsError, match=r"1 of 2 images, first in image 1 at slot 7 \(row 1, column 3\)"):
        tokens(pipe, PROMPTS[:2])
    pipe.decoder = decode
    with torch.no_grad():
        pipe.model.model.generation_head.vision_head.bias[0] = torch.nan
    with pytest.raises(NumericsError, match="2 of 2 images, first in image 0 at slot 0"):
        tokens(pipe, PROMPTS[:2])


@pytest.mark.gpu
def test_a_generator_may_be_on_another_device(folder):
    """It only seeds the images' own; each of both seeds a pipeline on either device."""
    for device in ("cpu", "cuda"):
        pipe = load(folder).to(device)
        pipe.set_progress_bar_config(disable=True)
        for of in ("cpu", "cuda"):
            drawn = [
                pipe("a", generator=torch.Generator(of).manual_seed(seed), output_type="tokens").images
                for seed in (1, 1, 2)
            ]
            assert torch.equal(drawn[0], drawn[1])
            assert not torch.equal(drawn[0], drawn[2])


def test_missing_and_unknown_keys_are_listed(copied):
    path = copied / "model.safetensors"
    weights = load_file(path)
    weights["model.extra.weight"] = torch.zeros(1)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.warns(AccelWarning, match=r"unknown keys .*model\.extra\.weight"):
        load(copied)
    head = [name for name in weights if "generation_head" in name]
    assert head
    for name in head:
        del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"does not have .*generation_head.*does not know: model\.extra"):
        load(copied)


def test_broken_folders(copied, tmp_path):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"model\.safetensors: corrupt weight file"):
        load(copied)
    path.unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        load(copied)
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"are pickles .*are refused"):
        load(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "architectures": ["JanusForGeneration"]}))
    with pytest.raises(UnknownNameError, match=r"Did you mean 'JanusForConditionalGeneration'.*janus\.py"):
        load(copied)
    for own, found in (
        ("MultiModalityCausalLM", "deepseek-community/Janus-Pro-1B"),
        ("Emu3ForCausalLM", "Emu3-Gen-hf"),
    ):
        (copied / "config.json").write_text(json.dumps({**config, "architectures": [own]}))
        with pytest.raises(UnsupportedError, match=rf"{own}: .*authors' own format.*{found}"):
            load(copied)
    (copied / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load(copied)
    with pytest.raises(WeightsError, match=r"cannot be reached|has no config"):
        load(tmp_path / "nowhere", local_files_only=True)


def test_a_diffusion_method_refuses_it(pipe):
    with pytest.raises(UnsupportedError, match=r"AutoregressivePipeline .*take SpeculativeDecodingConfig"):
        accel.accelerate(pipe, accel.TokenMergingConfig())
    assert pipe.decoder is decode


@pytest.mark.parametrize("window", [None, 4])
def test_a_preview_is_the_image_as_far_as_it_is(pipe, window):
    """Its finished rows are those of an image of the same tokens; below it is grey; asking changes nothing."""
    seen = {}

    def look(pipe, finished, slots, given):
        seen[finished] = given["preview"]()

    def call(**options):
        generator = torch.Generator().manual_seed(3)
        return pipe(list(PROMPTS[:2]), generator=generator, output_type="tokens", **options).images

    config = accel.SpeculativeDecodingConfig(window=window, auto_disable=False) if window else None
    with accel.accelerate(pipe, config) if config else contextlib.nullcontext():
        token_BT = call(callback_on_step_end=look)
        assert torch.equal(call(), token_BT)
    assert [len(images) for finished, images in seen.items() if finished < 4] == [0] * sum(
        f < 4 for f in seen
    )
    whole = pipe.adapter.images(token_BT, pipe.adapter.layout(None, None))
    last = np.asarray(seen[16][1]) / 255
    np.testing.assert_allclose(last, whole[1].permute(1, 2, 0).numpy(), atol=0.51 / 255)
    half = max(finished for finished in seen if 8 <= finished < 12)  # two of four rows, of two pixels each
    picture = np.asarray(seen[half][1])
    assert (picture[4:] == 128).all()
    below = token_BT.clone()
    below[:, 8:12] = below[:, 12:16] = token_BT[:, 4:8]
    expected = pipe.adapter.images(below, pipe.adapter.layout(None, None))[1].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(picture[:4] / 255, expected[:4], atol=0.51 / 255)
