"""Extractors against the models' own preprocessing; weights that are missing or wrong."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from accel.evaluation import extractors, metrics
from accel.evaluation.bootstrap import jackknife_interval
from accel.evaluation.errors import EvaluationError, IncomparableError, WeightsError
from accel.evaluation.extractors.base import resize_and_crop, resize_clean
from accel.evaluation.extractors.scenes import WEIGHTS, ScenesExtractor, ScenesNet
from accel.evaluation.features import FeatureSet, FeatureWriter, distances, store_path
from accel.evaluation.scorers import ClipScorer
from accel.evaluation.suites import Prompt
from accel.evaluation.weights import WeightFile, file_sha256, load_pickle_free

PICTURES = torch.randint(
    0, 256, (3, 3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def test_a_missing_or_wrong_weight_file_says_path_hash_and_source(tmp_path):
    file = WeightFile("w.pt", "ab" * 32, "https://example.org/w.pt")
    with pytest.raises(WeightsError, match=rf"w\.pt: no such weight file; .*{'ab' * 32}.*https://example"):
        file.check(tmp_path)
    (tmp_path / "w.pt").write_bytes(b"other")
    with pytest.raises(WeightsError, match=rf"w\.pt: SHA-256 is {file_sha256(tmp_path / 'w.pt')}; expected"):
        file.check(tmp_path / "w.pt")
    assert file.check(tmp_path, file_sha256(tmp_path / "w.pt")) == tmp_path / "w.pt"


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth: not a readable tensor file"):
        load_pickle_free(tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:50])
    with pytest.raises(WeightsError, match=r"cut\.pth"):
        load_pickle_free(tmp_path / "cut.pth")


def test_inception_is_not_run_unless_its_hash_is_right(tmp_path):
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"not it")
    with pytest.raises(WeightsError, match=r"expected SHA-256 f58cb9b6ec.*nvlabs"):
        extractors.load(f"inception:{tmp_path}")
    with pytest.raises(WeightsError, match="no such weight file"):
        extractors.load("inception:/nowhere/inception.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_inception_sees_images_normalised_as_the_2015_network_wants(tmp_path):
    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return self.layers(x)

    torch.jit.save(torch.jit.script(Base()), tmp_path / "own.pt")
    extractor = extractors.InceptionExtractor(tmp_path / "own.pt", sha256=file_sha256(tmp_path / "own.pt"))
    grey = torch.full((2, 3, 20, 20), 192, dtype=torch.uint8)
    torch.testing.assert_close(extractor(grey), torch.full((2, 3), 0.5))


def test_resize_equals_clean_fid():
    resize = pytest.importorskip("cleanfid.resize", reason="needs clean-fid")
    images = resize_clean(PICTURES, 99)
    oracle = resize.make_resizer("PIL", False, "bicubic", (99, 99))
    for own, picture in zip(images, PICTURES, strict=True):
        np.testing.assert_array_equal(own.permute(1, 2, 0).numpy(), oracle(picture.permute(1, 2, 0).numpy()))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP with a tokenizer, saved in the real format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 1},
        vision_config={**small, "image_size": 24, "patch_size": 8},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    words = ["<pad>", "<end>", "a", "red", "blue", "circle", "square"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>").save_pretrained(
        folder
    )
    return folder


def test_clip_features_equal_the_models_own_pipeline(clip_folder):
    from transformers import CLIPModel

    extractor = extractors.load(f"clip:{clip_folder}")
    features = extractor(PICTURES)
    assert features.shape == (3, extractor.dim) == (3, 12)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for row, picture in zip(features, PICTURES, strict=True):
        # 50 x 70 -> shorter edge 24: 33 x 24, centre 24.
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((33, 24), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image.crop((4, 0, 28, 24)))).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            vision = model.vision_model(pixel_values=((pixels - mean) / std)[None]).pooler_output
            expected = model.visual_projection(vision)[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_clip_score_works_with_this_transformers_and_cuts_long_prompts(clip_folder):
    extractor = extractors.ClipExtractor(str(clip_folder))
    prompts = ["a red circle", "a blue square", "a " * 40]
    found = ClipScorer(extractor)(PICTURES, None, [Prompt(i, text) for i, text in enumerate(prompts)])
    cosine = torch.cosine_similarity(extractor(PICTURES), extractor.text(prompts)).clamp(min=0)
    assert [part["value"] for part in found] == pytest.approx((100 * cosine).tolist(), rel=1e-4)


def test_dinov2_takes_the_class_token(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    extractor = extractors.load(f"dinov2:{tmp_path}")
    features = extractor(PICTURES)
    pixels = resize_and_crop(PICTURES, 256, 224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(tmp_path).eval()((pixels - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected)


def test_names_tell_models_apart(clip_folder, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    for file in clip_folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first, second = (extractors.load(f"clip:{folder}").name for folder in (clip_folder, tmp_path))
    assert first.rsplit("@")[1] != second.rsplit("@")[1]
    assert first.startswith(f"clip:{clip_folder.name}@")  # not where it lies: that differs by machine


@pytest.mark.parametrize("spec", ["resnet:x", "clip", "inception", ""])
def test_unknown_extractors_are_refused(spec):
    with pytest.raises(EvaluationError, match="expected scenes, inception:PATH"):
        extractors.load(spec)


def test_absent_models_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="absent: CLIPModel cannot be loaded"):
        extractors.load(f"clip:{tmp_path / 'absent'}")


def test_scenes_extractor_loads_what_was_saved_and_says_how_to_train(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = ScenesNet()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    extractor = ScenesExtractor(tmp_path / "w.safetensors")
    features = extractor(PICTURES)
    assert features.shape == (3, extractor.dim)
    assert not torch.equal(features[0], features[1])
    with pytest.raises(WeightsError, match=r"train_scenes_extractor\.py"):
        ScenesExtractor(tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"bad\.safetensors: not the scenes extractor's weights"):
        ScenesExtractor(tmp_path / "bad.safetensors")


# --- feature store -------------------------------------------------------------------------------


def fill(folder, extractor, configuration, features, start=0, rank=0):
    writer = FeatureWriter(folder, extractor, features.shape[1], rank)
    names = {"configuration": configuration, "configuration_hash": configuration, "image_sha256": "x"}
    writer.write([{**names, "prompt_id": start + i, "sample": 0} for i in range(len(features))], features)
    writer.close()


def test_distances_from_disk_equal_those_in_memory(tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 60, 8, generator=generator)
    fill(tmp_path, "clip:x", "plain", a[:30])
    fill(tmp_path, "clip:x", "fast", b[:30])
    fill(tmp_path, "clip:x", "plain", a[30:], start=30, rank=1)
    fill(tmp_path, "clip:x", "fast", b[30:], start=30, rank=1)
    store = store_path(tmp_path, "clip:x")
    result = distances(FeatureSet(store, "plain"), FeatureSet(store, "fast"), tmp_path / "scratch")
    assert (result["n"], result["extractor"]) == (60, "clip:x")
    expected = metrics.FrechetDistance()
    expected.update(a, reference=True)
    expected.update(b, reference=False)
    assert result["fid"] == pytest.approx(expected.compute())
    assert result["kid"] == pytest.approx(metrics.kernel_inception_distance(a.numpy(), b.numpy()).value)
    assert result["cmmd"] == pytest.approx(metrics.cmmd(a.numpy(), b.numpy()))
    assert (result["precision"], result["recall"]) == metrics.precision_recall(a.numpy(), b.numpy())


def test_rows_that_were_written_but_not_named_are_overwritten(tmp_path):
    fill(tmp_path, "e", "plain", torch.ones(2, 3))
    data = store_path(tmp_path, "e") / "rank-00000.f32"
    data.write_bytes(data.read_bytes() + b"\0" * 20)  # killed between row and index
    fill(tmp_path, "e", "plain", torch.full((2, 3), 2.0), start=2)
    rows = torch.cat(list(FeatureSet(data.parent, "plain").batches()))
    assert rows[:, 0].tolist() == [1, 1, 2, 2]


def test_what_must_not_be_compared_is_refused(tmp_path):
    fill(tmp_path, "e", "plain", torch.randn(5, 3))
    fill(tmp_path, "e", "fast", torch.randn(4, 3))
    fill(tmp_path, "f", "fast", torch.randn(5, 3))
    e, f = store_path(tmp_path, "e"), store_path(tmp_path, "f")
    with pytest.raises(IncomparableError, match="features of e and of f in one distance"):
        distances(FeatureSet(e, "plain"), FeatureSet(f, "fast"), tmp_path / "s")
    with pytest.raises(IncomparableError, match="'plain' has 5 images, 'fast' 4"):
        distances(FeatureSet(e, "plain"), FeatureSet(e, "fast"), tmp_path / "s")
    fill(tmp_path, "e", "other", torch.randn(5, 3), start=1)
    with pytest.raises(IncomparableError, match="images of other prompts"):
        distances(FeatureSet(e, "plain"), FeatureSet(e, "other"), tmp_path / "s", paired=True)
    fill(tmp_path, "g", "plain", torch.randn(3, 3))
    result = distances(*[FeatureSet(store_path(tmp_path, "g"), "plain")] * 2, tmp_path / "s")
    assert result["fid"] is None
    assert "n = 3 images are too few" in result["fid_reason"]
    assert all("more than 3 images a side" in result[f"{name}_reason"] for name in ("precision", "recall"))
    assert result["kid"] is not None


def test_rows_are_in_order_of_their_keys_whoever_wrote_them_when(tmp_path):
    """Pairs are taken row by row; a resumed run has written them in any order."""
    fill(tmp_path, "e", "plain", torch.arange(4.0).view(4, 1), start=4)
    fill(tmp_path, "e", "plain", torch.arange(4.0, 8.0).view(4, 1), start=0, rank=1)
    rows = torch.cat(list(FeatureSet(store_path(tmp_path, "e"), "plain").batches()))
    assert rows[:, 0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_every_distance_has_an_interval_where_there_are_images_enough(tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 60, 8, generator=generator)
    for folder, n in ((tmp_path / "many", 60), (tmp_path / "few", 9)):
        fill(folder, "clip:x", "plain", a[:n])
        fill(folder, "clip:x", "fast", b[:n])
    many, few = (
        distances(*(FeatureSet(store_path(f, "clip:x"), name) for name in ("plain", "fast")), tmp_path / "s")
        for f in (tmp_path / "many", tmp_path / "few")
    )
    assert set(many["intervals"]) == {"fid", "kid", "cmmd", "precision", "recall"}
    for name, (low, high) in many["intervals"].items():
        assert low < many[name] < high
    assert few["fid"] is not None  # nine images for eight features, and none to leave out
    assert few["intervals"]["fid"] is None


# --- the packaged network ------------------------------------------------------------------------


def test_the_packaged_features_measure_how_far_a_set_is_from_ground_truth():
    """96 pictures a side. Ground truth is close to other ground truth, and every corruption takes a set
    further away the stronger it is; if the weights were noise, none of the orders would hold."""
    from accel.evaluation import scenes

    extractor = extractors.load("scenes")
    card = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert extractor.name == f"scenes@{card['fingerprint']}"
    assert WEIGHTS.stat().st_size <= 2 << 20
    generator = torch.Generator().manual_seed(0)

    def draw(seed, circles=0.0):
        drawn = scenes.sample_scenes(scenes.prompts("test", 16, seed), np.random.default_rng(seed))
        wrong = (drawn.shape_BM >= 0) & (torch.rand(drawn.shape_BM.shape, generator=generator) < circles)
        shapes = torch.where(wrong, scenes.SHAPES.index("circle"), drawn.shape_BM)
        drawn = dataclasses.replace(drawn, shape_BM=shapes)
        return torch.cat([scenes.render(drawn[i : i + 8], 128) for i in range(0, 96, 8)])

    def features(pictures):
        return extractor((pictures.clamp(0, 1) * 255).round().to(torch.uint8))

    def blurred(pictures, width):
        pad = torch.nn.functional.pad(pictures, (width // 2,) * 4, mode="replicate")
        return torch.nn.functional.avg_pool2d(pad, width, 1)

    def fid(pictures):
        metric = metrics.FrechetDistance()
        metric.update(reference, reference=True)
        metric.update(features(pictures), reference=False)
        return metric.compute()

    reference, other = features(draw(1)), draw(2)
    near = fid(other)
    noise = torch.randn(other.shape, generator=generator)
    series = {
        "blur": [fid(blurred(other, width)) for width in (3, 5, 9)],
        "noise": [fid(other + std * noise) for std in (0.03, 0.06, 0.12)],
        "wrong shapes": [fid(draw(2, share)) for share in (0.3, 0.6, 1.0)],
    }
    for name, values in series.items():
        assert near < values[0] < values[1] < values[2], name
        assert values[2] > 2 * near, name


def few_features(tmp_path, prompts, samples):
    """Two sets of `samples` images of each of `prompts` prompts."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        writer = FeatureWriter(tmp_path, "t@0", 2, 0)
        effect = np.repeat(rng.standard_normal((prompts, 2)), samples, 0)
        values = torch.tensor(effect + 0.3 * rng.standard_normal(effect.shape) + (name == "b"))
        keys = [(i, j) for i in range(prompts) for j in range(samples)]
        writer.write([row(name, i, j) for i, j in keys], values.float())
        writer.close()
    return [FeatureSet(store_path(tmp_path, "t@0"), name) for name in ("a", "b")]


def row(name, prompt_id, sample):
    key = {"configuration": name, "prompt_id": prompt_id, "sample": sample}
    return {**key, "configuration_hash": name, "image_sha256": "0"}


def test_fewer_prompts_than_groups_leave_out_a_prompt_at_a_time(tmp_path):
    """Ten groups of three prompts were seven empty ones: replicates without an error."""
    a, b = few_features(tmp_path, 3, 8)
    found = distances(a, b, tmp_path / "s")
    sets = [torch.cat(list(x.batches())).numpy() for x in (a, b)]
    groups = [x.groups(3) for x in (a, b)]
    assert [sorted(set(g.tolist())) for g in groups] == [[0, 1, 2]] * 2

    def fid(without):
        metric = metrics.FrechetDistance()
        for total, x, group in zip((metric.reference, metric.samples), sets, groups, strict=True):
            total.update(torch.from_numpy(x[group != without]))
        return metric.compute()

    expected = jackknife_interval(found["fid"], [fid(i) for i in range(3)], bounds=(0, np.inf))
    assert found["intervals"]["fid"] == pytest.approx(expected, rel=1e-4)


def test_one_prompt_gives_no_interval_of_a_distance(tmp_path):
    found = distances(*few_features(tmp_path, 1, 8), tmp_path / "s")
    assert found["fid"] > 0
    assert set(found["intervals"].values()) == {None}
