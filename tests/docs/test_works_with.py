"""The README's table of what works with what: every cell is a test here, and says the same in both places."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import FAMILIES, randomise

import accel
from accel.errors import UnsupportedError

# diffusers' schedulers hand torch tensors to numpy 2 the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

README = Path(__file__).parents[2] / "README.md"

METHODS: dict[str, Any] = {
    "forecasts": accel.ForecastConfig(cycle=(0, 1), dense_steps_first=2, dense_steps_last=0),
    "merging": accel.TokenMergingConfig(ratio=0.5, dense_steps_first=2),
    "pruning": accel.TokenPruningConfig(cycle=(0.5,), dense_steps_first=2),
}
#: Where a cell says "with a setting": the configuration that it means.
SETTINGS: dict[tuple[str, str], Any] = {
    ("ControlNet", "merging"): accel.TokenMergingConfig(ratio=0.5, dense_steps_first=2, scope="block"),
    ("IP-Adapter", "pruning"): accel.TokenPruningConfig(
        cycle=(0.5,), dense_steps_first=2, keys_values="none"
    ),
    ("fused QKV projections", "pruning"): accel.TokenPruningConfig(
        cycle=(0.5,), dense_steps_first=2, keys_values="none"
    ),
}


def compiled_blocks(pipe):
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def offloaded(pipe):
    """What `enable_model_cpu_offload` does to a module, with the CPU in the place of the GPU."""
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


def offloaded_by_layer(pipe):
    """What `enable_sequential_cpu_offload` does: no weight lies on the module between two calls."""
    from accelerate import cpu_offload

    for module in (pipe.transformer, pipe.vae):  # a pipeline asks its modules for their device
        cpu_offload(module, execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).device.type == "meta"


def offloaded_by_group(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def lora(pipe):
    """Random low-rank weights in the attentions, as an adapter that peft carries."""
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def control_net(pipe):
    """The residuals that a ControlNet pipeline gives to the transformer."""
    generator = torch.Generator().manual_seed(9)
    residuals = [torch.randn(1, 96, 32, generator=generator)] * 2
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "controlnet_block_samples": residuals}),
        with_kwargs=True,
        prepend=True,  # before anybody else's: a pipeline's own arguments
    )


def ip_adapter(pipe):
    """The processors that `load_ip_adapter` sets, and its embeddings."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    for i, block in enumerate(pipe.transformer.transformer_blocks):
        processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, scale=0.7)
        block.attn.set_processor(randomise(processor, 10 + i))
    pipe.transformer.encoder_hid_proj = torch.nn.Identity()
    image = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(7))
    more = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [image]}}
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **more}), with_kwargs=True, prepend=True
    )


def fused(pipe):
    pipe.transformer.fuse_qkv_projections()


def scheduler(name: str, **options) -> Callable:
    def switch_on(pipe):
        pipe.scheduler = getattr(diffusers, name)(**options)

    return switch_on


FIRST_ORDER = "first-order and multistep schedulers (Euler, DDIM, DPM-Solver++, UniPC)"
HEUN = "second-order schedulers (Heun)"
NOISE = "samplers that add noise (ancestral, LCM, SDE)"
#: Rows that are several features: each of them is tried.
SCHEDULERS = {
    FIRST_ORDER: {
        "Euler": scheduler("EulerDiscreteScheduler"),
        "DDIM": scheduler("DDIMScheduler"),
        "DPM-Solver++": scheduler("DPMSolverMultistepScheduler"),
        "UniPC": scheduler("UniPCMultistepScheduler"),
    },
    HEUN: {"Heun": scheduler("HeunDiscreteScheduler")},
    NOISE: {
        "ancestral": scheduler("EulerAncestralDiscreteScheduler"),
        "LCM": scheduler("LCMScheduler"),
        "SDE": scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    },
}
#: Rows whose tests stand elsewhere: a file and a test's name for each method.
COMPILED = "test_compiled_equals_eager"
LAUNCHED = ("tests/evaluation/test_launch.py", "test_two_processes_give_the_records_of_one")
ELSEWHERE = {
    "`torch.compile`, whole, `fullgraph=True`": [
        ("tests/methods/test_forecast.py", COMPILED),
        ("tests/core/test_adapters.py", COMPILED),  # merging
        ("tests/methods/test_pruning.py", COMPILED),
    ],
    "several devices, a process each: `accel evaluate run`": [LAUNCHED],
    "several pipelines and threads on one denoiser": [
        ("tests/core/test_whose_call.py", "test_two_threads_share_a_denoiser")
    ],
}
#: Compiling takes time: the order that users write; the other one is in tests/core/test_adapters.py.
COMPILES = "`compile_repeated_blocks`"
#: Feature -> (how it is switched on, whether it changes the plain picture).
FEATURES: dict[str, tuple[Callable, bool]] = {
    COMPILES: (compiled_blocks, False),
    "model offload": (offloaded, False),
    "sequential offload": (offloaded_by_layer, False),
    "group offload": (offloaded_by_group, False),
    "LoRA": (lora, True),
    "ControlNet": (control_net, True),
    "IP-Adapter": (ip_adapter, True),
    "fused QKV projections": (fused, False),
}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def latents(feature: Callable | None, config: Any, *, first: str, family: str = "flux") -> torch.Tensor:
    """A picture with a feature and a method, in one order or the other."""
    # As few blocks as a ControlNet's residuals and a span need.
    pipe = FAMILIES[family].make(**({"dual": 2, "single": 1} if family == "flux" else {}))
    with ExitStack() as stack:
        if config is not None and first == "method":
            stack.enter_context(accel.accelerate(pipe, config))
        if feature is not None:
            feature(pipe)
        if config is not None and first == "feature":
            stack.enter_context(accel.accelerate(pipe, config))
        return FAMILIES[family].latents(pipe)


def cells() -> dict[tuple[str, str], str]:
    """(feature, method) -> what the README says."""
    lines = README.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| with |"))
    names = [cell.strip() for cell in lines[start].strip("|").split("|")][1:]
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        feature, *said = [cell.strip() for cell in line.strip("|").split("|")]
        found.update({(feature, name): text for name, text in zip(names, said, strict=True)})
    return found


CELLS = cells()
BEFORE = "before `accelerate`"
DDIM = SCHEDULERS[FIRST_ORDER]["DDIM"]  # what the family has of itself


def test_the_table_has_these_rows():
    assert {feature for feature, _ in CELLS} == {*FEATURES, *SCHEDULERS, *ELSEWHERE}
    assert {method for _, method in CELLS} == set(METHODS)
    assert set(SETTINGS) == {key for key, said in CELLS.items() if "=" in said}
    assert set(CELLS.values()) - {"yes", "no", BEFORE} == {said for said in CELLS.values() if "=" in said}
    for feature, tests in ELSEWHERE.items():
        assert {CELLS[feature, method] for method in METHODS} == {"yes"}
        for path, test in tests:
            assert f"def {test}(" in (README.parent / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("feature", "first"),
    [(f, first) for f in FEATURES for first in ("feature", "method") if (f, first) != (COMPILES, "method")],
)
@pytest.mark.parametrize("method", METHODS)
def test_features(feature, method, first):
    said, (switch_on, changes) = CELLS[feature, method], FEATURES[feature]
    config = METHODS[method]
    if said == BEFORE and first == "method":  # an error, never a picture that is silently another one
        with pytest.raises((UnsupportedError, RuntimeError)):
            latents(switch_on, config, first=first)
        return
    if said not in ("yes", BEFORE):  # refused as it is, in words that say the way out
        with pytest.raises(UnsupportedError) as refusal:
            latents(switch_on, config, first=first)
        for word in re.findall(r"`(\w+)=", said):
            assert word in str(refusal.value)
    if said == "no":
        return
    config = SETTINGS.get((feature, method), config)
    alone, both = latents(None, config, first=first), latents(switch_on, config, first=first)
    plain = latents(switch_on if changes else None, None, first=first)
    assert 1e-4 < relative(both, plain) < 1.5  # the method is at work
    if first == "method":  # the order makes no difference
        assert relative(both, latents(switch_on, config, first="feature")) < 1e-5
    if changes:
        assert relative(both, alone) > 1e-3  # and so is the feature
        assert relative(plain, latents(None, None, first=first)) > 1e-3
    else:
        assert relative(both, alone) < 1e-5


@pytest.mark.parametrize("row", SCHEDULERS)
@pytest.mark.parametrize("method", METHODS)
def test_schedulers(row, method):
    """On PixArt, whose pipeline takes every kind; a scheduler is set before `accelerate`."""
    for switch_on in SCHEDULERS[row].values():
        options = {"first": "feature", "family": "pixart"}
        if CELLS[row, method] == "no":
            with pytest.raises(UnsupportedError, match=r"(calls the model 2 times|adds noise).*DPM-Solver"):
                latents(switch_on, METHODS[method], **options)
        else:
            plain, both = (latents(switch_on, config, **options) for config in (None, METHODS[method]))
            assert both.isfinite().all()
            assert 1e-4 < relative(both, plain) < 1.5
            assert relative(plain, latents(None, None, **options)) > 1e-3 or switch_on is DDIM
