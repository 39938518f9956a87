"""The upcycling trainer trains what runs later: its student on windows is the model under accel's own hooks."""

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
    plan = model.plan_of(x[:1], 0.6, torch.randn(1, 64, 16), 0.4)
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
            learned.Adapter(tmp_path / "c.safetensors", lambda: True).attach(net, stack)
            run = net(x, tokens, pooled, time.expand(2), model.ids, model.text_ids, return_dict=False)[0]
    assert relative(run, trained) < 1e-4
    assert relative(run, unchanged) > 1e-2


def test_the_loss_is_nought_at_all_tokens_and_has_a_gradient_below(trainer, model):
    low = trainer.LowRank(model.net, trainer.rank_of)
    state = next(trainer.walks(model, ["flat"], 1, 0, torch.device("cpu")))
    assert trainer.distillation(model, low, state, 1.0).item() < 1e-10
    loss = trainer.distillation(model, low, state, 0.3)
    assert loss.item() > 1e-3
    loss.backward()
    grads = {name: tensor.grad for name, tensor in low.named().items() if name.endswith(".B")}
    used = [name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0]
    assert len(used) > 0.9 * len(grads)


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
    low = trainer.LowRank(model.net, trainer.rank_of)
    for p in low.parameters():
        p.data = (p.data + 0.02 * torch.randn_like(p)).bfloat16().float()  # what the file keeps
    sidecar.write(tmp_path / "start.safetensors", learned.KIND, model.fits, low.named())
    fresh = trainer.LowRank(model.net, trainer.rank_of)
    trainer.load(fresh, tmp_path / "start.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), low.parameters(), strict=True))
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
