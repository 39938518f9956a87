"""Detectors: post-processing on hand-made outputs, the check before a run, ceiling and floor."""

import numpy as np
import pytest
import torch
from PIL import Image

from accel.evaluation import judges
from accel.evaluation.errors import EvaluationError, SanityError, WeightsError
from accel.evaluation.geneval import COLORS, Detection, Metadata, ObjectSpec
from accel.evaluation.geneval.detector import (
    ColorClassifier,
    Mask2FormerDetector,
    check_labels,
    geneval_label,
    instances,
    preprocess,
)

LABELS = {0: "cat", 1: "dog"}
CAT = Metadata("single_object", (ObjectSpec("cat"),), "a photo of a cat")
RED_CAT = Metadata("colors", (ObjectSpec("cat", color="red"),), "a photo of a red cat")


def logits(probabilities):
    return torch.tensor(probabilities).log()


def test_instances_have_mmdetections_confidence_and_box():
    # One query: P(cat) = 0.8, P(dog) = 0.1, P(nothing) = 0.1; its mask is 2 x 3 pixels at 90 %, the
    # rest at 20 %.
    mask = torch.full((1, 6, 8), 0.2)
    mask[0, 1:3, 4:7] = 0.9
    found = instances(logits([[0.8, 0.1, 0.1]]), torch.logit(mask), (6, 8), LABELS)
    assert [d.label for d, _ in found] == ["cat", "dog"]  # every (query, class) pair, best first
    cat = found[0][0]
    assert cat.confidence == pytest.approx(0.8 * 0.9, rel=1e-4)
    assert cat.box == (4, 1, 7, 3)
    assert found[0][1].sum() == 6


def test_instances_scale_masks_to_the_image_and_drop_empty_ones():
    masks = torch.full((2, 4, 4), -5.0)
    masks[0, :, 2:] = 5.0
    found = instances(logits([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05]]), masks, (8, 8), LABELS)
    assert [(d.label, d.box) for d, _ in found] == [("cat", (4, 0, 8, 8)), ("dog", (4, 0, 8, 8))]


def test_at_most_a_hundred_instances_are_kept():
    classes = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    found = instances(classes, torch.ones(80, 2, 2), (2, 2), LABELS)
    scores = classes.softmax(-1)[:, :2].flatten().sort(descending=True).values
    assert len(found) == 100
    assert found[-1][0].confidence == pytest.approx(float(scores[99] * torch.tensor(1.0).sigmoid()), rel=1e-4)


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((300, 600), (667, 1333), (672, 1344)),
        ((900, 450), (1333, 667), (1344, 672)),
    ],
)
def test_preprocess_resizes_and_pads_as_mmdetection(size, inner, padded):
    image = torch.full((3, *size), 255, dtype=torch.uint8)
    pixels, unpadded = preprocess(image)
    assert pixels.shape == (1, 3, *padded)
    assert unpadded == inner
    assert float(pixels[0, 0, 0, 0]) == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)
    if padded[0] > inner[0]:
        assert float(pixels[0, :, inner[0] :].abs().max()) == 0


def test_colour_is_judged_on_the_object_alone():
    """The classifier sees the crop with grey around the object, and averages three templates."""

    class Clip:
        def __call__(self, images):
            self.seen = images
            return torch.nn.functional.one_hot(torch.tensor([COLORS.index("blue")]), 10).float()

        def text(self, prompts):
            self.prompts = prompts
            return torch.eye(10).repeat_interleave(3, 0)

    clip = Clip()
    image = torch.zeros(3, 10, 10, dtype=torch.uint8)
    image[2] = 200
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[2:5, 3:8] = True
    mask[3, 4] = False
    assert ColorClassifier(clip)(image, mask, (3, 2, 8, 5), "cat") == "blue"
    assert clip.seen.shape == (1, 3, 3, 5)
    assert clip.seen[0, :, 0, 0].tolist() == [0, 0, 200]
    assert clip.seen[0, :, 1, 1].tolist() == [0x99] * 3
    assert clip.prompts[:3] == [
        "a photo of a red cat",
        "a photo of a red-colored cat",
        "a photo of a red object",
    ]
    assert len(clip.prompts) == 30


def test_labels_are_genevals():
    assert geneval_label("mouse") == "computer mouse"
    assert geneval_label("dining table") == "dining table"
    assert geneval_label("tvmonitor") == "tv"
    with pytest.raises(EvaluationError, match="no class unicorn"):
        check_labels([Metadata("single_object", (ObjectSpec("unicorn"),), "p")], {"cat"})


@pytest.fixture(scope="module")
def tiny_mask2former(tmp_path_factory):
    """A random Mask2Former with a Swin backbone, saved in the real format."""
    pytest.importorskip("scipy", reason="transformers' Mask2Former needs scipy")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=16, dim_feedforward=16, decoder_layers=2, num_attention_heads=2, num_queries=5,
        num_labels=2, id2label={0: "cat", 1: "mouse"}, label2id={"cat": 0, "mouse": 1},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_the_port_runs_from_a_local_folder(tiny_mask2former, monkeypatch):
    from accel.evaluation.geneval import detector as module

    class Clip:
        def __init__(self, source, device):
            pass

        def __call__(self, images):
            return torch.ones(1, 4)

        def text(self, prompts):
            return torch.ones(len(prompts), 4)

    monkeypatch.setattr(module, "ClipExtractor", Clip)
    monkeypatch.setattr(module, "_SHORT_EDGE", 64)
    detect = Mask2FormerDetector(str(tiny_mask2former), "clip")
    assert detect.labels == {0: "cat", 1: "computer mouse"}
    image = torch.randint(0, 256, (1, 3, 60, 90), dtype=torch.uint8)
    (found,) = detect(image, [RED_CAT])
    assert found
    for detection in found:
        x0, y0, x1, y1 = detection.box
        assert 0 <= x0 < x1 <= 90
        assert 0 <= y0 < y1 <= 60
        assert (detection.color is not None) == (detection.label == "cat" and detection.confidence > 0.3)


def test_an_absent_detector_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        WeightsError,
        match="absent: Mask2FormerForUniversalSegmentation cannot be loaded: there is no such folder",
    ):
        Mask2FormerDetector(str(tmp_path / "absent"), "clip")


# --- sanity, ceiling, floor ----------------------------------------------------------------------


def test_a_blind_detector_stops_the_run_and_a_seeing_one_passes():
    known = [(torch.zeros(3, 8, 8, dtype=torch.uint8), CAT)] * 3
    with pytest.raises(SanityError, match=r"right about none of 3 pictures.*'a photo of a cat': nothing"):
        judges.sanity(lambda images, lines: [[] for _ in images], known)
    sees = [Detection("cat", 0.9, (0, 0, 5, 5))]
    assert judges.sanity(lambda images, lines: [sees for _ in images], known) == 1.0


def test_known_pictures_come_from_a_folder_or_from_scikit_image(tmp_path):
    place = tmp_path / "00000"
    (place / "samples").mkdir(parents=True)
    (place / "metadata.jsonl").write_text(CAT.to_json() + "\n")
    with pytest.raises(EvaluationError, match="no sanity images"):
        judges._known_pictures(tmp_path)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(place / "samples/0000.png")
    ((image, line),) = judges._known_pictures(tmp_path)
    assert line == CAT
    assert image.shape == (3, 4, 4)
    pytest.importorskip("skimage", reason="needs scikit-image")
    pictures = judges._known_pictures(None)
    assert [line.include[0].label for _, line in pictures] == ["person", "cat", "cup"]


def test_mismatched_prompts_ask_for_something_else_of_the_same_task():
    other = Metadata("single_object", (ObjectSpec("dog"),), "a photo of a dog")
    again = Metadata("single_object", (ObjectSpec("cat"),), "a photo of a cat")
    alone = Metadata("counting", (ObjectSpec("cat", 2),), "a photo of two cats")
    assert judges.mismatched([CAT, again, other, alone]) == [other, other, CAT, None]


def test_ceiling_and_floor_of_the_scenes_world():
    pytest.importorskip("accel.evaluation.scenes.detect", reason="the scenes detector is not there yet")
    from accel.evaluation import scenes, suites

    judge = judges.scenes_judge()
    assert judge.bounds is not None
    bounds = judge.bounds(suites.scenes(per_task=6).prompts)
    assert bounds["ceiling"]["overall"]["value"] >= 0.97
    assert bounds["floor"]["overall"]["value"] <= 0.06
    assert bounds["ceiling"]["overall"]["n"] == 36
    assert scenes.prompts("test", 6, 0)[0] == suites.scenes(per_task=6).prompts[0].metadata
