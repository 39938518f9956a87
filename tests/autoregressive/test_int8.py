"""Weights in 8 bits by torchao, where it is installed: the model's own logits within a tolerance, eager and captured."""

from __future__ import annotations

import pytest
import tape
import tiny_janus
import torch
from tiny_janus import PROMPTS

from accel.pipelines.autoregressive import AutoregressivePipeline
from accel.pipelines.autoregressive import model as model_module
from accel.pipelines.autoregressive.janus import Janus
from accel.pipelines.autoregressive.kept import Kept
from accel.pipelines.autoregressive.model import PromptedModel

quantization = pytest.importorskip("torchao.quantization")


def pipeline() -> AutoregressivePipeline:
    janus = Janus(tiny_janus.model(grid=5, context=64).requires_grad_(False), tiny_janus.tokenizer())
    pipe = AutoregressivePipeline(janus, graphs=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_int8_weights_are_used_and_near():
    logits = []
    for bits in (None, 8):
        pipe = pipeline()
        if bits:
            quantization.quantize_(pipe.adapter.backbone, quantization.Int8WeightOnlyConfig())
        logits.append(PromptedModel(pipe.adapter, pipe.adapter.layout(None, None), PROMPTS, 2.0).first_BV)
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0.002 < error < 0.05  # 0.020; 0: nothing was quantised
    assert pipe.adapter.stack() is None, "a tensor of torchao's is called by its own layer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_rounds_of_int8_weights_draw_what_eager_ones_draw(dtype, monkeypatch):
    """In bfloat16 with eager shapes: padded prompts round otherwise there, whatever the weights are."""
    if dtype == torch.bfloat16:
        monkeypatch.setattr(model_module, "_PROMPT_TOKENS", 0)
        monkeypatch.setattr(model_module, "_BUCKETS", 1000)
    pipe = pipeline().to(dtype)
    quantization.quantize_(pipe.adapter.backbone, quantization.Int8WeightOnlyConfig())

    def drawn():
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return pipe(list(PROMPTS), generator=generators, output_type="tokens", temperature=1.0).images

    eager = drawn()
    pipe.graphs, pipe._kept = True, Kept(lambda device, failed: tape.capture, devices=("cpu",))
    assert torch.equal(drawn(), eager)
    assert torch.equal(drawn(), eager)
