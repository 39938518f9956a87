"""LlamaGen against a naive implementation of the published code's arithmetic, written here from scratch.

The naive one runs the whole sequence every time, without a cache, pads captions on the left as the published
sampler does, and rotates with complex numbers.
"""

from __future__ import annotations

import json
import math

import pytest
import tiny_llamagen as tiny
import torch
import torch.nn.functional as F
import windows
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5EncoderModel

from accel.errors import AccelWarning, ConfigError, UnsupportedError, WeightsError
from accel.pipelines.autoregressive import AutoregressivePipeline, llamagen_model

GREEDY = {"temperature": 0.0, "output_type": "tokens"}


def load(folder, **options) -> AutoregressivePipeline:
    pipe = AutoregressivePipeline.from_pretrained(str(folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {text: tiny.save(tmp_path_factory.mktemp("llamagen"), text=text) for text in (False, True)}


def norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def naive_logits(state, prefix, mask, tokens, columns, prefix_rotation=0):
    """Logits (B, tokens + 1, V): after the prefix and after every token.

    prefix (B, P, C) with mask (B, P) of what is not padding; tokens (B, n).
    """
    x = torch.cat([prefix, state["tok_embeddings.weight"][tokens]], 1)
    length, before, head = x.shape[1], prefix.shape[1], tiny.WIDTH // tiny.HEADS
    turn = torch.full((length, head // 2), prefix_rotation, dtype=torch.complex64)
    for i in range(length - before):
        for j in range(head // 4):
            angle = 10000 ** (-4 * j / head)
            turn[before + i, j] = torch.polar(torch.tensor(1.0), torch.tensor((i // columns) * angle))
            turn[before + i, j + head // 4] = torch.polar(
                torch.tensor(1.0), torch.tensor((i % columns) * angle)
            )
    seen = torch.ones(length, length).tril().bool().expand(len(x), -1, -1).clone()
    seen[:, :, :before] &= mask[:, None].bool()
    seen |= torch.eye(length).bool()  # padding sees itself, so that no row is empty

    for layer in range(tiny.LAYERS):
        weight = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"layers.{layer}.")}
        y = norm(x, weight["attention_norm.weight"])
        qkv = (y @ weight["attention.wqkv.weight"].T).split(tiny.WIDTH, -1)
        heads = []
        for h in range(tiny.HEADS):
            q, k, v = (part[..., h * head : (h + 1) * head] for part in qkv)
            q, k = (
                torch.view_as_real(
                    torch.view_as_complex(p.unflatten(-1, (-1, 2)).contiguous()) * turn
                ).flatten(-2)
                for p in (q, k)
            )
            score = (q @ k.mT / math.sqrt(head)).masked_fill(~seen, -torch.inf)
            heads.append(score.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ weight["attention.wo.weight"].T
        y = norm(x, weight["ffn_norm.weight"])
        gate = F.silu(y @ weight["feed_forward.w1.weight"].T) * (y @ weight["feed_forward.w3.weight"].T)
        x = x + gate @ weight["feed_forward.w2.weight"].T
    return (norm(x, state["norm.weight"]) @ state["output.weight"].T)[:, before - 1 :]


def naive_prefix(folder, text, prompts):
    """Conditional and unconditional rows, and the mask that both share."""
    state = tiny.gpt(text)
    if not text:
        table = state["cls_embedding.embedding_table.weight"]
        rows = table[torch.tensor([*prompts, *[tiny.CLASSES] * len(prompts)])][:, None]
        return state, rows, torch.ones(len(rows), 1)
    tokenizer, encoder = (
        AutoTokenizer.from_pretrained(folder / "t5"),
        T5EncoderModel.from_pretrained(folder / "t5"),
    )
    features, mask = (
        torch.zeros(len(prompts), tiny.PREFIX, tiny.CAPTION),
        torch.zeros(len(prompts), tiny.PREFIX),
    )
    for row, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            features[row, -ids.shape[1] :] = encoder(ids).last_hidden_state[0]
        mask[row, -ids.shape[1] :] = 1
    absent = state["cls_embedding.uncond_embedding"].expand(len(prompts), -1, -1)
    both = torch.cat([features, absent]) @ state["cls_embedding.cap_proj.fc1.weight"].T
    rows = F.gelu(both, approximate="tanh") @ state["cls_embedding.cap_proj.fc2.weight"].T
    return state, rows, mask.repeat(2, 1)


def naive_greedy(folder, text, prompts, guidance, slots=16, columns=4):
    state, prefix, mask = naive_prefix(folder, text, prompts)
    tokens = torch.zeros(len(prefix), 0, dtype=torch.int64)
    for _ in range(slots):
        conditional, absent = naive_logits(state, prefix, mask, tokens, columns)[:, -1].chunk(2)
        new = (absent + guidance * (conditional - absent)).argmax(-1)
        tokens = torch.cat([tokens, new.repeat(2)[:, None]], 1)
    return tokens[: len(prompts)]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("text", "prompts"), [(False, [3, 7]), (True, list(tiny.PROMPTS))])
def test_greedy_is_the_naive_implementation_token_for_token(folders, text, prompts, guidance):
    found = load(folders[text])(prompts, guidance_scale=guidance, **GREEDY).images
    assert found.unique().numel() > 5, "a constant image would say nothing"
    assert torch.equal(found, naive_greedy(folders[text], text, prompts, guidance))


@pytest.mark.parametrize(("text", "prompts"), [(False, [3, 7]), (True, list(tiny.PROMPTS))])
def test_logits_are_the_naive_implementations(folders, text, prompts):
    model = windows.prompted(load(folders[text]), prompts, 1.0)
    tokens = torch.randint(tiny.CODES, (len(prompts), 15), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = torch.cat(
            [model.first_BV[:, None], model.forward(tokens, torch.zeros(len(prompts)).long())], 1
        )
    state, prefix, mask = naive_prefix(folders[text], text, prompts)
    rows = slice(len(prompts))
    expected = naive_logits(state, prefix[rows], mask[rows], tokens, 4)
    assert (found - expected).abs().max() < 1e-4
    # The negative control: a prefix that is not multiplied by zero gives other logits.
    other = naive_logits(state, prefix[rows], mask[rows], tokens, 4, prefix_rotation=1)
    assert (other - expected).abs().max() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("text", "prompts"), [(False, [3, 7]), (True, list(tiny.PROMPTS))])
def test_windows_and_rollbacks(folders, text, prompts, guidance):
    assert windows.worst_difference(load(folders[text]), prompts, guidance) < 1e-5


def test_pixels_are_the_naive_decoders(folders):
    state, codes = tiny.vq(), torch.randint(tiny.CODES, (2, 4, 4), generator=torch.Generator().manual_seed(0))

    def conv(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def group(name, x):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def residual(name, x):
        y = conv(f"{name}.conv1", F.silu(group(f"{name}.norm1", x)))
        y = conv(f"{name}.conv2", F.silu(group(f"{name}.norm2", y)))
        return y + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attention(name, x):
        q, k, v = (conv(f"{name}.{part}", group(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weight = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(q.shape[1])).softmax(-1)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weight, v).reshape(x.shape))

    book = state["quantize.embedding.weight"]
    x = (book / book.norm(dim=-1, keepdim=True))[codes].permute(0, 3, 1, 2)
    x = conv("decoder.conv_in", conv("post_quant_conv", x))
    x = residual("decoder.mid.2", attention("decoder.mid.1", residual("decoder.mid.0", x)))
    for block in range(2):
        x = attention(
            f"decoder.conv_blocks.0.attn.{block}", residual(f"decoder.conv_blocks.0.res.{block}", x)
        )
    x = conv("decoder.conv_blocks.0.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for block in range(2):
        x = residual(f"decoder.conv_blocks.1.res.{block}", x)
    expected = (conv("decoder.conv_out", F.silu(group("decoder.norm_out", x))) / 2 + 0.5).clamp(0, 1)

    adapter = load(folders[False]).adapter
    found = adapter.images(codes.flatten(1), adapter.layout(None, None))
    assert found.shape == (2, 3, 8, 8)
    assert found.std() > 0.05, "all clamped to one value would say nothing"
    assert (found - expected).abs().max() < 1e-4


def test_1024_tokens(folders):
    image = load(folders[False])(3, height=64, width=64, guidance_scale=1.0, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    assert image.std() > 0.05


def test_published_names_need_no_config(folders, tmp_path, monkeypatch):
    (tmp_path / "vq_ds16_c2i.pt").write_bytes((folders[False] / "vq_tiny.pt").read_bytes())
    save_file(tiny.gpt(text=False), tmp_path / "c2i_B_384.safetensors")
    with pytest.raises(UnsupportedError, match="pass heads="):
        load(tmp_path)
    monkeypatch.setitem(llamagen_model.HEADS, (tiny.LAYERS, tiny.WIDTH), tiny.HEADS)
    pipe = load(tmp_path, torch_dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    assert pipe.adapter.layout(None, None).columns == 384 // 2
    assert pipe(3, height=8, width=8, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("layers", "width", "published"),
    [(12, 768, "111M"), (24, 1024, "343M"), (36, 1280, "775M"), (48, 1536, "1.4B"), (24, 3200, "3.1B")],
)
def test_published_sizes(layers, width, published):
    """As many parameters as the published table says; counting them takes no memory."""
    shape = llamagen_model.GptShape(
        layers=layers,
        width=width,
        heads=llamagen_model.HEADS[layers, width],
        kv_heads=llamagen_model.HEADS[layers, width],
        feed_forward=-(-(8 * width // 3) // 256) * 256,
        vocabulary=16384,
        classes=1000,
        caption=None,
        prefix=1,
    )
    with torch.device("meta"):
        state = llamagen_model.Gpt(shape).state_dict()
    assert llamagen_model.GptShape.of(state) == shape
    count = sum(value.numel() for value in state.values())
    assert published == (f"{count / 1e9:.1f}B" if count > 1e9 else f"{count / 1e6:.0f}M")


def test_defaults_are_the_published_samplers(folders):
    defaults = [load(folders[text]).adapter.defaults() for text in (False, True)]
    assert [(d.guidance_scale, d.top_k) for d in defaults] == [(4.0, 2000), (7.5, 1000)]


def test_captions_are_cut_where_the_model_stops_reading(folders):
    pipe = load(folders[True])
    with pytest.warns(AccelWarning, match="reads 6 tokens, the caption has 10"):
        found = pipe("A blue star  and circle left of two stars", **GREEDY).images
    cut = pipe("a blue star and circle", **GREEDY).images  # five words and the end token
    assert torch.equal(found, cut)


def test_unknown_and_missing_keys_are_listed(tmp_path):
    tiny.save(tmp_path)
    state = tiny.gpt(text=False)
    state["layers.1.attention.q_norm.weight"] = torch.ones(1)
    state["freqs_cis"] = torch.ones(1)  # in some published files; made anew here
    del state["layers.0.ffn_norm.weight"]
    state["norm.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "c2i_tiny.pt")
    with pytest.raises(WeightsError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "unknown keys: layers.1.attention.q_norm.weight;" in message
    assert "missing keys: layers.0.ffn_norm.weight;" in message
    assert "norm.weight (3,) instead of (32,)" in message
    torch.save({"transformer.wte.weight": torch.ones(1)}, tmp_path / "c2i_tiny.pt")
    with pytest.raises(WeightsError, match=r"lacks tok_embeddings\.weight.*transformer\.wte\.weight"):
        load(tmp_path)


def test_broken_folders(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json"):
        load(tmp_path)
    tiny.save(tmp_path)
    (tmp_path / "c2i_other.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match=r"found c2i_other\.pt, c2i_tiny\.pt"):
        load(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "gpt": "c2i_other.pt"}))
    with pytest.raises(WeightsError, match="cannot be read as a state dict"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "layer": 3}))
    with pytest.raises(ConfigError, match="unknown keys layer"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "gpt": "c2i_tiny.pt", "image_size": 9}))
    with pytest.raises(UnsupportedError, match="multiple of 2 pixels"):
        load(tmp_path)
    torch.save(
        {"model": {**tiny.vq(), "quantize.embedding.weight": torch.ones(5, 8)}}, tmp_path / "vq_tiny.pt"
    )
    (tmp_path / "config.json").write_text(json.dumps({**settings, "gpt": "c2i_tiny.pt"}))
    with pytest.raises(WeightsError, match="64 codes and a VQ tokenizer with 5"):
        load(tmp_path)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    tiny.save(tmp_path)
    torch.save({"model": tiny.gpt(text=False), "args": Evil()}, tmp_path / "c2i_tiny.pt")
    with pytest.raises(WeightsError, match="cannot be read as a state dict"):
        load(tmp_path)


def test_bad_prompts(folders, tmp_path):
    pipe = load(folders[False])
    with pytest.raises(ConfigError, match=r"0 \.\.\. 9, got 10"):
        pipe([1, 10])
    with pytest.raises(ConfigError, match="must be a int"):
        pipe("a red circle")
    with pytest.raises(ConfigError, match="multiples of 2 pixels"):
        pipe(1, height=7)
    with pytest.raises(ConfigError, match="must be a str"):
        load(folders[True])(3)
    tiny.save(tmp_path, text=True).joinpath("t5").rename(tmp_path / "encoder")
    with pytest.raises(WeightsError, match="needs its text encoder"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["attention.wqkv", "attention.wo", "feed_forward.w2"])
def test_layers_that_something_replaced_are_called_as_they_are(folders, name):
    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 1.5 * super().forward(x)

    pipe = load(folders[False])
    assert pipe.adapter.stack() is not None
    before = pipe([3, 7], **GREEDY).images
    layer = pipe.adapter.backbone.layers[1]
    old = layer.get_submodule(name)
    new = Louder(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    layer.set_submodule(name, new)
    assert pipe.adapter.stack() is None
    assert not torch.equal(pipe([3, 7], **GREEDY).images, before)
