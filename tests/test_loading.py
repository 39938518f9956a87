"""Folders of models that are not quite what they say, and hubs that do not answer."""

import json
import logging
import shutil
import time

import pytest
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from accel import backends, generation
from accel.errors import AccelWarning, WeightsError
from accel.pipelines import hub
from accel.pipelines.builtin import FOLDER
from accel.pipelines.builtin.scenes_flux import ScenesFluxPipeline


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "model")


def renamed(folder, name):
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))


def test_a_saved_built_in_model_is_the_same_again(tmp_path):
    before = generation.load_pipeline()
    before.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"]
        == "ScenesFluxPipeline"
    )
    after = generation.load_pipeline(str(tmp_path / "saved"))
    assert type(after) is ScenesFluxPipeline
    assert after.default_sample_size == before.default_sample_size
    job, settings = [generation.Job("a photo of a star", 1)], generation.Settings(2, (64, 64))
    images = [generation.run(pipe, job, settings) for pipe in (before, after)]
    # Not bit for bit: float32 read from a file lies otherwise in memory than float32 made from float16.
    assert (images[0] - images[1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["MyFluxPipeline", ["pipeline", "BetterFluxPipelineOfMine"]])
def test_a_subclass_of_ones_own_is_loaded_as_its_base_and_said(folder, name):
    renamed(folder, name)
    with pytest.warns(AccelWarning, match=r"model_index\.json: is of class \w*Flux.*loaded as FluxPipeline"):
        assert type(generation.load_pipeline(str(folder))) is FluxPipeline


def test_code_of_a_folder_is_never_run(folder):
    (folder / "pipeline.py").write_text("raise SystemExit('was run')")
    (folder / "Mine.py").write_text("raise SystemExit('was run')")
    renamed(folder, ["pipeline", "Mine"])
    with pytest.raises(WeightsError, match=r"model_index\.json: is of class Mine.*is not run.*FluxPipeline"):
        generation.load_pipeline(str(folder))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "transformer", "vae"])
@pytest.mark.parametrize("damage", ["lacks one", "another shape"])
def test_weights_that_do_not_fit_are_refused_and_not_made_up(folder, part, damage):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if tensors[key].ndim in (2, 4))
    value = tensors.pop(name)
    if damage == "another shape":
        tensors[name] = value[:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"model.*{name.rpartition('.')[0].rpartition('.')[2]}"):
        generation.load_pipeline(str(folder))


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer_config.json"])
def test_no_tokenizer_is_made_up(folder, name):
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=name.split("/")[0]):
        generation.load_pipeline(str(folder))


class Session:
    """A hub client's session that answers, or does not."""

    def __init__(self, seconds=0.0, error=None):
        self.seconds, self.error = seconds, error

    def head(self, url, timeout):
        time.sleep(self.seconds)
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("session", "answers"),
    [(Session(), True), (Session(error=ConnectionError("refused")), False), (Session(seconds=600), False)],
)
def test_a_hub_that_does_not_answer_is_found_out_in_seconds(monkeypatch, session, answers):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    start = time.monotonic()
    assert hub.answers(seconds=0.2) is answers
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("forbidden", "says"), [(False, "there is no network"), (True, "HF_HUB_OFFLINE forbids")]
)
def test_without_a_network_it_is_said(monkeypatch, forbidden, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", forbidden)
    monkeypatch.setattr(hub, "answers", lambda: False)
    with pytest.raises(WeightsError, match=f"nobody/nothing: .*{says}.*path of a folder"):
        generation.load_pipeline("nobody/nothing")


def test_without_a_network_a_cached_copy_is_used_and_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model, name: str(tmp_path / name))
    with pytest.warns(AccelWarning, match="cached copy of some/model is used"):
        assert hub.where("some/model") == {"local_files_only": True}


def test_only_the_lines_on_torchvision_are_silenced(caplog):
    backends.quiet_torchvision()
    backends.quiet_torchvision()
    logger = logging.getLogger("transformers.utils.import_utils")
    assert len([f for f in logger.filters if isinstance(f, backends._TorchvisionLines)]) == 1
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.addHandler(caplog.handler)
        logger.warning("`CLIPImageProcessor` requires torchvision (not installed); falling back")
        logger.warning("something else is wrong")
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"something else is wrong"}
