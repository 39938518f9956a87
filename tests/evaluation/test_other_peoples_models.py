"""What other people's files do when they are loaded: corrupt model folders, Python files, settings."""

import json

import pytest
import torch
from test_command_line import invoke

from accel.errors import AccelError
from accel.evaluation import configurations, extractors
from accel.evaluation.errors import EvaluationError, WeightsError
from accel.evaluation.extractors.hub import load_model
from accel.evaluation.models import load_pipeline


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    path = tmp_path_factory.mktemp("dino") / "tiny"
    Dinov2Model(config).save_pretrained(path)
    return path


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda config, weights: weights.write_bytes(weights.read_bytes()[:1000]),
        lambda config, weights: weights.write_bytes(b""),
        lambda config, weights: weights.write_bytes(b"\xff" * 4000),
        lambda config, weights: weights.unlink(),
        lambda config, weights: config.write_text("{"),
        lambda config, weights: config.write_text("[]"),
        lambda config, weights: config.write_text(
            json.dumps(json.loads(config.read_text()) | {"hidden_size": "x"})
        ),
        lambda config, weights: config.write_bytes(b"\xff\xfe"),
        lambda config, weights: config.unlink(),
    ],
)
def test_a_corrupt_model_folder_is_one_line(tmp_path, dino, damage):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((dino / name).read_bytes())
    assert extractors.load(f"dinov2:{tmp_path}").dim == 8
    damage(tmp_path / "config.json", tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"Dinov2Model cannot be loaded: .*give a local folder") as error:
        extractors.load(f"dinov2:{tmp_path}")
    assert one_line(error).startswith(f"{tmp_path}: ")


def test_weights_that_a_file_lacks_are_not_drawn_at_random(tmp_path, dino):
    """transformers warns and goes on: every distance would be one of a random network."""
    from safetensors.torch import load_file, save_file
    from transformers import Dinov2Model

    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    state = load_file(dino / "model.safetensors")
    lost = next(name for name in state if "attention" in name)
    save_file({n: t for n, t in state.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        WeightsError, match=r"attention\S+ is not in its weights; it is another model's, or damaged"
    ):
        load_model(Dinov2Model, str(tmp_path))
    other = {n: t if n != lost else t[:3].clone() for n, t in state.items()}
    save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_model(Dinov2Model, str(tmp_path))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def make(:\n", r"own\.py:make: cannot be imported: SyntaxError: .*own\.py, line 1\)"),
        ("import nothing_of_that_name\n", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("1 / 0\n", r"ZeroDivisionError: division by zero \(.*own\.py, line 1\); accel --debug"),
        ("other = 1\n", "has no attribute 'make'"),
        ("make = 3\n", "a int, not a function"),
        ("def make(needed): pass\n", "made no pipeline: TypeError: .*needed"),
        (
            "def make():\n    raise RuntimeError\n",
            r"made no pipeline: RuntimeError: RuntimeError \(.*line 2\)",
        ),
        ("def make(): return 3\n", "returned a int, which cannot be called"),
        ("\0", "own.py:make: cannot be imported"),
    ],
)
def test_a_pipeline_file_of_ones_own_that_fails_is_one_line(tmp_path, code, says):
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(EvaluationError, match=says) as error:
        load_pipeline(f"{tmp_path / 'own.py'}:make")
    one_line(error)
    with pytest.raises(EvaluationError, match=r"absent\.py:make: cannot be imported: no such file"):
        load_pipeline(f"{tmp_path / 'absent.py'}:make")


@pytest.mark.parametrize(
    "result", ["None", "SimpleNamespace(images=None)", "SimpleNamespace(images=[3])", "[1]"]
)
def test_a_pipeline_that_returns_no_pictures_is_one_line(tmp_path, result):
    code = f"from types import SimpleNamespace\ndef make(): return lambda prompt, **arguments: {result}\n"
    (tmp_path / "own.py").write_text(code)
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(EvaluationError, match="whose `images` are no list of PIL images") as error:
        invoke("run", tmp_path / "r", "--model", f"{tmp_path / 'own.py'}:make", "--suite", tmp_path / "p.txt")
    one_line(error)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[", "ratio=. is no value"),
        ("[" * 3000, "is no value"),
        ("&a [*a]", "refers to something else"),
        ("!!python/object:os.system x", "is no value"),
        ("half", "ratio"),
        ("2020-13-45", "ratio"),
        (".nan", "ratio"),
        ("{a: 1}", "ratio"),
    ],
)
def test_odd_settings_of_a_configuration_are_one_line(value, says):
    with pytest.raises(AccelError, match=says) as error:
        configurations.parse(f"merging,ratio={value}")
    one_line(error)
    assert configurations.parse("merging,ratio=0.3").method.ratio == 0.3


def test_true_is_no_number_of_steps():
    with pytest.raises(EvaluationError, match="steps must be an integer, not True"):
        configurations.parse("steps=true")


def test_paths_are_printed_as_they_are(tmp_path, monkeypatch):
    """[/x] is a command to rich, an escape sequence one to the terminal."""
    from accel.cli import evaluate

    (tmp_path / "own.py").write_text(
        "from types import SimpleNamespace\nfrom PIL import Image\n"
        "def make(): return lambda prompt, **a: SimpleNamespace(images=[Image.new('RGB', (16, 16))] * len(prompt))\n"
    )
    (tmp_path / "p.txt").write_text("a [/b] cat\n")
    out = tmp_path / "r[/x]\x1b[31m"
    own = ["--model", f"{tmp_path / 'own.py'}:make", "--suite", tmp_path / "p.txt"]
    said = invoke("run", out, *own).stderr
    assert "r[/x]\\x1b[31m/images" in "".join(said.split("\n"))
    assert "\x1b[31m" not in said
    invoke("score", out)
    shown = invoke("report", out)
    assert "plain" in shown.stdout
    assert evaluate.app.info.help
