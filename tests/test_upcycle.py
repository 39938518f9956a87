"""The upcycling trainer trains what runs later: its student on windows is the model under accel's own hooks."""

import copy
import itertools
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from accel.core import sidecar
from accel.core.plan import TokenPlan
from accel.core.span import Span
from accel.methods import learned
from accel.pipelines.registry import find

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def trainer():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import upcycle_chunking

        return upcycle_chunking
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def model(trainer):
    return trainer.Model(["flat"], 64, torch.device("cpu"))


@pytest.fixture(scope="module")
def state(model):
    torch.manual_seed(0)
    return torch.randn(2, 64, 16), torch.tensor(0.6), (torch.randn(2, 16, 128), torch.randn(2, 128))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_dense_it_is_the_plain_transformer(model, state):
    x, time, (tokens, pooled) = state
    with torch.no_grad():
        mine = model.predict(model.bases["flat"], x, time, tokens, pooled)
        net = type(model.net).from_config(model.net.config)  # without the trainer's hooks
        net.load_state_dict(model.net.state_dict())
        plain = net(x, tokens, pooled, time.expand(2), model.ids, model.text_ids, return_dict=False)[0]
    assert torch.equal(mine, plain)


def test_each_image_has_its_own_plan(model, state):
    x, time, features = state
    torch.manual_seed(1)
    orders = torch.stack([torch.randperm(64), torch.randperm(64)])
    with torch.no_grad():
        plain = model.predict(model.bases["flat"], x, time, *features)
        permuted = model.predict(model.bases["flat"], x, time, *features, TokenPlan.permutation(orders))
    assert relative(permuted, plain) < 1e-5


def test_on_windows_it_is_the_model_under_the_span_and_the_adapter(trainer, model, state, tmp_path):
    x, time, (tokens, pooled) = state
    torch.manual_seed(2)
    low = trainer.LowRank(model.net, trainer.rank_of)
    for p in low.parameters():
        p.data = (p.data + 0.02 * torch.randn_like(p)).bfloat16().float()  # what the file keeps
    plan = model.plan_of(x[:1], 0.4)
    assert plan.slots < 32
    size = sidecar.write(tmp_path / "c.safetensors", learned.KIND, model.fits, low.named())
    assert size < trainer.LIMIT
    with torch.no_grad():
        trained = model.predict(low.changed(model.bases["flat"]), x, time, tokens, pooled, plan)
        unchanged = model.predict(model.bases["flat"], x, time, tokens, pooled, plan)
        net = type(model.net).from_config(model.net.config)
        net.load_state_dict(model.net.state_dict())
        with ExitStack() as stack:
            span = Span(lambda x: plan, tokens=lambda: 64)
            span.attach(net, find(net).tokens.sites(net)[1:], stack, bias=True)
            learned.Adapter(tmp_path / "c.safetensors", lambda: 0.5).attach(net, stack)
            run = net(x, tokens, pooled, time.expand(2), model.ids, model.text_ids, return_dict=False)[0]
    assert relative(run, trained) < 1e-4
    assert relative(run, unchanged) > 1e-2


def test_a_lower_rank_is_as_near_as_any_and_goes_on_as_a_start(trainer, model):
    torch.manual_seed(3)
    low = trainer.LowRank(model.net, trainer.rank_of)
    for p in low.parameters():
        p.data += 0.02 * torch.randn_like(p)
    named, path = low.named(), "single_transformer_blocks.0.proj_mlp"
    kept = trainer.truncated(named, 5)
    assert kept[f"{path}.A"].shape[0] == kept[f"{path}.B"].shape[1] == 5
    whole, part = (t[f"{path}.B"] @ t[f"{path}.A"] for t in (named, kept))
    sizes = torch.linalg.svdvals(whole.detach())
    assert torch.allclose((whole - part).norm(), sizes[5:].norm(), rtol=1e-3)
    assert torch.equal(kept[f"{path}.bias"], named[f"{path}.bias"])
    full = trainer.truncated(named, 1000)
    assert torch.allclose(full[f"{path}.B"] @ full[f"{path}.A"], whole, atol=1e-4)
    fresh = trainer.LowRank(model.net, trainer.rank_of)
    fresh.load(kept)
    again = fresh.named()
    assert again[f"{path}.A"].shape == named[f"{path}.A"].shape
    assert torch.allclose(again[f"{path}.B"] @ again[f"{path}.A"], part, atol=1e-5)


def test_the_loss_is_nought_at_all_tokens_and_has_a_gradient_below(trainer, model):
    student = trainer.Student(model.net)
    step = next(trainer.walks(model, ["flat"], 1, 0, torch.device("cpu")))
    step.share = 1.0
    assert trainer.distillation(model, student, step).item() < 1e-10
    assert torch.allclose(step.predicted, trainer.guide(step.dense), atol=1e-5)
    step.share = 0.3
    loss = trainer.distillation(model, student, step)
    assert loss.item() > 1e-3
    loss.backward()
    grads = {name: tensor.grad for name, tensor in student.low.named().items() if name.endswith(".B")}
    used = [name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0]
    assert len(used) > 0.9 * len(grads)
    assert (
        student.decoder.exit.weight.grad.abs().max() > 0
    )  # it starts at nought, its last layer learns first


def test_a_walk_of_the_trainer_is_a_run_under_accels_hooks(trainer, model, tmp_path, monkeypatch):
    """Dense first step, windows, changed layers, carried deviations and the decoder: the same latents in the end."""
    import accel
    from accel.pipelines import builtin

    torch.manual_seed(5)
    student, again = trainer.Student(model.net), trainer.Student(model.net)
    for p in student.parameters():
        p.data += 0.02 * torch.randn_like(p)
    file = tmp_path / "c.safetensors"
    sidecar.write(file, learned.KIND, model.fits, student.named(), int8=True)
    trainer.load(again, file)
    pipe, text, noise = builtin.load_pipeline("cpu"), "a photo of two hearts", torch.randn(1, 64, 16)
    # The trainer spreads the positions of small pictures over the grid of 256 px; the pipeline does not.
    monkeypatch.setattr(model, "ids", pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32))

    def walk(which):
        features = trainer.encode(
            pipe.text_encoder,
            pipe.text_encoder_2,
            pipe.tokenizer,
            pipe.tokenizer_2,
            [text, ""],
            torch.device("cpu"),
        )
        x, last, sigmas = noise, None, model.sigmas(4)
        for sigma, following in itertools.pairwise(sigmas):
            dense = model.predict(
                model.bases["flat"], torch.cat([x, x]), torch.tensor(sigma), *features
            ).detach()
            predicted = trainer.guide(dense)
            if last is not None:
                step = trainer.Step("flat", x, sigma, 0.25, features, dense, last)
                trainer.distillation(model, which, step)
                predicted = step.predicted
            last = x - sigma * predicted
            x = x + (following - sigma) * predicted
        return x

    def run(**settings):
        schedule = accel.Schedule(dense_first=1, dense_last=0, refresh_every=1)
        config = accel.TokenMergingConfig(ratio=0.75, groups="windows", schedule=schedule, **settings)
        chunked = accel.DynamicChunkingConfig(budget=0.25, **settings)
        found = []
        for each in (config, chunked):
            with accel.accelerate(pipe, each):
                options = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"}
                found.append(pipe(text, latents=noise, **options).images)
        return found

    expected, without = walk(again), copy.deepcopy(again)
    torch.nn.init.zeros_(without.decoder.exit.weight)
    torch.nn.init.zeros_(without.decoder.exit.bias)
    for latents in run(adapter=str(file)):
        assert relative(latents, expected) < 1e-4
        assert relative(latents, walk(without)) > 1e-3  # the decoder was at work
    for latents in run():
        assert relative(latents, walk(trainer.Student(model.net))) < 1e-4
        assert relative(latents, expected) > 1e-2


def test_it_trains_stops_in_time_and_goes_on(trainer, tmp_path, monkeypatch, capsys):
    options = ["--worlds", "flat", "--size", "64", "--batch", "1", "--log", "1", "--report", "0", "--seconds"]
    for seconds, said in (("1", "upcycle step 1 loss"), ("1.5", "resumed at step")):
        monkeypatch.setattr(sys, "argv", ["upcycle_chunking.py", "--out", str(tmp_path), *options, seconds])
        trainer.main()
        assert said in capsys.readouterr().out
    assert (tmp_path / "chunking.safetensors").stat().st_size < trainer.LIMIT
    assert not list(tmp_path.glob("*.part"))


def test_it_goes_on_from_a_side_car_and_reports_under_accels_hooks(
    trainer, model, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(6)
    student = trainer.Student(model.net)
    for p in student.parameters():
        p.data = (p.data + 0.02 * torch.randn_like(p)).bfloat16().float()  # what the file keeps
    sidecar.write(tmp_path / "start.safetensors", learned.KIND, model.fits, student.named())
    fresh = trainer.Student(model.net)
    trainer.load(fresh, tmp_path / "start.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), student.parameters(), strict=True))
    options = [
        "--worlds",
        "flat",
        "--size",
        "64",
        "--batch",
        "1",
        "--log",
        "1",
        "--report",
        "1",
        "--seconds",
        "0",
    ]
    start = ["--start", str(tmp_path / "start.safetensors"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["upcycle_chunking.py", *start, *options])
    trainer.main()
    said = capsys.readouterr().out
    assert "windows:0.67: " in said
    assert "upcycled:0.67: " in said
    assert "over windows" in said
    assert "+0.00 ± 0.00 over windows" not in said  # it was on


def test_all_processes_go_by_the_clock_of_the_first(trainer, tmp_path, monkeypatch, capsys):
    sent = []

    def broadcast(seconds):
        sent.extend(seconds)
        return [1000.0]  # the first one's, far ahead

    monkeypatch.setattr(trainer, "broadcast_object_list", broadcast)
    options = ["--worlds", "flat", "--size", "64", "--batch", "1", "--log", "1", "--report", "0"]
    arguments = ["upcycle_chunking.py", "--out", str(tmp_path), *options, "--seconds", "1000"]
    monkeypatch.setattr(sys, "argv", arguments)
    trainer.main()
    assert len(sent) == 1
    assert sent[0] < 1000
    assert "1000 s" in capsys.readouterr().out


def test_a_side_car_is_on_at_reduced_steps_only(trainer, model, tmp_path):
    """Merging by windows with an adapter: the first, dense step stays exact, and remove() gives everything back."""
    import accel
    from accel.errors import ConfigError
    from accel.pipelines import builtin

    torch.manual_seed(4)
    low = trainer.LowRank(model.net, trainer.rank_of)
    for p in low.parameters():
        p.data += 0.02 * torch.randn_like(p)
    file = str(tmp_path / "c.safetensors")
    sidecar.write(Path(file), learned.KIND, model.fits, low.named())
    pipe = builtin.load_pipeline("cpu")
    pipe.set_progress_bar_config(disable=True)

    def latents(config=None):
        seen = []
        options = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
        options["generator"] = torch.Generator().manual_seed(0)
        options["callback_on_step_end"] = lambda p, i, t, kw: (seen.append(kw["latents"].clone()), kw)[1]
        if config is None:
            pipe("a photo of a star", **options)
        else:
            with accel.accelerate(pipe, config):
                pipe("a photo of a star", **options)
        return seen

    settings = {"groups": "windows", "schedule": {"dense_first": 1, "dense_last": 0, "refresh_every": 1}}
    plain = latents()
    windows = latents(accel.TokenMergingConfig(ratio=0.6, **settings))
    adapted = latents(accel.TokenMergingConfig(ratio=0.6, adapter=file, **settings))
    assert torch.equal(adapted[0], plain[0])
    assert relative(adapted[1], windows[1]) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(latents(), plain, strict=True))
    with pytest.raises(ConfigError, match=r'adapter must be None with groups="matching"'):
        accel.TokenMergingConfig(adapter=file)
