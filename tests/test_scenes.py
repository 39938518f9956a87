"""The world must be what it says, and the detector must see it: every score on the built-in model rests here."""

import itertools

import numpy as np
import pytest
import torch

from accel.evaluation import judges, scenes, suites
from accel.evaluation.geneval.metadata import TASKS, Metadata, ObjectSpec, parse_line
from accel.evaluation.geneval.scorer import score
from accel.evaluation.scenes import split
from accel.evaluation.scenes import world as scenes_world
from accel.evaluation.scenes.patterns import shade
from accel.evaluation.scenes.prompts import colored_position
from accel.evaluation.scenes.render import object_coverage, pixel_grid
from accel.evaluation.scenes.world import COLORS, MAX_OBJECTS

FLAT_MEANS = [0.6207861, 0.5709811, 0.4818887, 0.5757797, 0.535964, 0.5203408]


def one(shape, color, center=(0.5, 0.5), radius=0.22, angle=0.0):
    """A scene with one given object on a plain grey ground."""
    shapes = torch.full((1, MAX_OBJECTS), -1)
    shapes[0, 0] = scenes.SHAPES.index(shape)
    colors = torch.full((1, MAX_OBJECTS), scenes.COLOR_NAMES.index(color))
    return scenes.Scenes(
        shapes,
        colors,
        torch.tensor(center).expand(1, MAX_OBJECTS, 2),
        torch.full((1, MAX_OBJECTS), radius),
        torch.full((1, MAX_OBJECTS), angle),
        torch.full((1, 2, 3), 0.55),
        torch.zeros(1),
        torch.zeros(1, 4),
        torch.zeros(1, 4),
        torch.zeros(1, MAX_OBJECTS, 5),
        torch.zeros(1, MAX_OBJECTS),
    )


def test_detector_scores_ground_truth_and_refuses_mismatches():
    bounds = judges.scenes_judge().bounds(suites.scenes("test", per_task=40, seed=3).prompts)
    assert bounds["ceiling"]["overall"]["value"] >= 0.99, bounds
    assert bounds["floor"]["overall"]["value"] <= 0.05, bounds
    assert set(bounds["ceiling"]["tasks"]) == set(TASKS)


def textured(lines, size=256, seed=0):
    world = scenes.sample_scenes(lines, np.random.default_rng(seed), "textured")
    return (scenes.render(world, size) * 255).round().byte()


def test_detector_scores_ground_truth_and_refuses_mismatches_on_textures():
    """The six tasks, and every scale of the detail set."""
    detect = lambda images, lines: scenes.detect(images, [scenes.scale_of(line.prompt) for line in lines])  # noqa: E731
    sets = {"six tasks": scenes.prompts("test", 8, seed=4), **scenes.detail("test", 10, seed=4)}
    assert set(sets) == {"six tasks", *scenes.SCALES}
    for name, lines in sets.items():
        bounds = judges.ceiling_and_floor(lines, textured, detect)
        assert bounds["ceiling"]["overall"]["value"] >= 0.99, (name, bounds)
        assert bounds["floor"]["overall"]["value"] <= 0.05, (name, bounds)


def test_textures_are_strong_and_the_flat_world_has_none():
    lines = scenes.prompts("test", 8, seed=0)
    flat, patterned = (
        scenes.render(scenes.sample_scenes(lines, np.random.default_rng(0), world), 128)
        for world in scenes.WORLDS
    )
    # Brightness steps between neighbours on the border, where there is only ground.
    roughness = lambda images: images[:, 0, 0].diff().abs().mean()  # noqa: E731
    assert roughness(patterned) > 10 * roughness(flat)


def test_flat_renders_are_the_ones_of_before_the_textured_world():
    """Every published figure was measured on them: pixels of three pictures, as rendered before."""
    images = scenes.render(scenes.sample_scenes(scenes.prompts("test", 1, 0), np.random.default_rng(7)), 64)
    assert images.mean((1, 2, 3)).tolist() == pytest.approx(FLAT_MEANS, abs=1e-6)


def test_patterns_are_what_they_are_called():
    """Their mean and their coarsest detail, from closed forms, at two sizes."""
    for size in (128, 256):
        x, y = pixel_grid(size)
        share = {
            "stripes": 0.5,
            "checks": 0.5,
            "dots": np.pi * 0.3**2,
            "lines": 1 - (1 - 0.125) ** 2,
            "waves": 0.5,
        }
        for name, expected in share.items():
            pattern = torch.tensor([[scenes_world.PATTERNS.index(name), 8.0, 0.0, 0.25]])
            assert shade(pattern, x, y, size).mean().item() == pytest.approx(expected, abs=0.01), name
        upright = torch.tensor([[scenes_world.PATTERNS.index("stripes"), 8.0, 0.0, 0.0]])
        spectrum = torch.fft.rfft(shade(upright, x, y, size)[0, 0]).abs()
        assert spectrum[1:].argmax() + 1 == 8


def test_words_of_scale_are_drawn_and_only_in_the_textured_world():
    (line,) = [row for row in scenes.detail("test", 1, 0)["thin"] if row.tag == "colors"]
    assert line.prompt.split()[4] == "thin"
    with pytest.raises(ValueError, match="world='textured'"):
        scenes.sample_scenes([line], np.random.default_rng(0))
    with pytest.raises(ValueError, match="flat, textured"):
        scenes.sample_scenes([line], np.random.default_rng(0), "striped")
    # A filled shape is not a thin one, whatever it is called.
    filled = scenes.render(one(line.include[0].label, line.include[0].color, radius=0.14), 256)
    assert scenes.detect(filled, ["thin"]) == [[]]
    assert [d.label for d in scenes.detect(filled, [None])[0]] == [line.include[0].label]


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_in_every_color_is_named_and_boxed(shape):
    batch = scenes.Scenes.cat([one(shape, color, (0.4, 0.6), angle=0.15) for color in COLORS])
    for color, found in zip(COLORS, scenes.detect(scenes.render(batch, 256)), strict=True):
        assert [(d.label, d.color) for d in found] == [(shape, color)]
        assert found[0].confidence > 0.9
        x0, y0, x1, y1 = found[0].box
        assert abs((x0 + x1) / 2 - 0.4 * 256) < 16
        assert abs((y0 + y1) / 2 - 0.6 * 256) < 16


def test_detector_is_not_sure_of_a_blob():
    """A shape half way between two must not pass the counting threshold, or blurry models would count well."""
    x = torch.linspace(-1, 1, 256)
    radius = torch.hypot(x[None], x[:, None])
    angle = torch.atan2(x[:, None], x[None].expand(256, 256))
    blob = radius < 0.4 * (1 + 0.22 * torch.cos(3 * angle))
    image = torch.full((1, 3, 256, 256), 0.55)
    image[0, :, blob] = torch.tensor(COLORS["red"])[:, None]
    found = scenes.detect(image)[0]
    assert all(d.confidence < 0.9 for d in found)


def test_empty_ground_and_wrong_input():
    assert scenes.detect(torch.full((1, 3, 64, 64), 0.55)) == [[]]
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        scenes.detect(torch.zeros(3, 64, 64))


def test_uint8_and_float_images_are_seen_alike():
    images = scenes.render(one("star", "pink"), 256)
    from_bytes = scenes.detect((images * 255).round().byte())
    assert [(d.label, d.color) for d in from_bytes[0]] == [("star", "pink")]


def test_rendered_areas_match_the_formulas():
    """The renderer against areas known in closed form, in units of the radius squared."""
    areas = {
        "circle": np.pi,
        "square": 1.7**2,
        "triangle": 3 * np.sqrt(3) * 0.6**2,
        "ring": np.pi * (1.02**2 - 0.46**2),
    }
    for shape, area in areas.items():
        cover = object_coverage(one(shape, "red", radius=0.3), 256)[2]
        assert cover.sum().item() / (0.3 * 256) ** 2 == pytest.approx(area, rel=0.01), shape


def test_objects_do_not_overlap_and_stay_inside():
    lines = scenes.prompts("train", per_task=50, seed=5)
    world = scenes.sample_scenes(lines, np.random.default_rng(0))
    image, _, cover = object_coverage(world, 128)
    total = torch.zeros(len(world), 128, 128).index_add_(0, image, (cover > 0).float())
    assert total.max() <= 1
    border = torch.cat([total[:, 0], total[:, -1], total[:, :, 0], total[:, :, -1]])
    assert border.max() == 0


def test_same_seed_same_images():
    lines = scenes.prompts("test", per_task=3, seed=1)
    first, second = (
        scenes.render(scenes.sample_scenes(lines, np.random.default_rng(7)), 64) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, scenes.render(scenes.sample_scenes(lines, np.random.default_rng(8)), 64))


def test_prompts_are_geneval_lines_of_all_tasks():
    lines = scenes.prompts("test", per_task=20, seed=0)
    assert [line.tag for line in lines] == [task for task in TASKS for _ in range(20)]
    assert all(parse_line(line.to_json()) == line for line in lines)
    texts = " ".join(line.prompt for line in lines)
    assert "a orange" not in texts
    assert "three crosss" not in texts
    with pytest.raises(ValueError, match="'train' or 'test'"):
        scenes.prompts("validation")


def _combinations(line):
    """What of a line the split is about."""
    items = [(scenes.SHAPES.index(i.label), i) for i in line.include]
    shapes = frozenset(index for index, _ in items)
    pairs = {(scenes.COLOR_NAMES.index(i.color), index) for index, i in items if i.color}
    return shapes, pairs


def test_held_out_combinations_never_occur_in_training():
    """In captions, and in the colours that a caption leaves open."""
    rng = np.random.default_rng(0)
    lines = scenes.prompts("train", per_task=150, seed=2) + [colored_position(rng) for _ in range(150)]
    for line in lines:
        shapes, pairs = _combinations(line)
        assert not any(split.is_held_out_pair(*pair) for pair in pairs), line.prompt
        if len(shapes) == 2:
            assert not split.is_held_out_company(*shapes), line.prompt
        if line.tag == "counting":
            assert not split.is_held_out_count(*shapes, line.include[0].count), line.prompt
    world = scenes.sample_scenes(lines, rng)
    for shape, color in zip(
        world.shape_BM.flatten().tolist(), world.color_BM.flatten().tolist(), strict=True
    ):
        assert shape < 0 or not split.is_held_out_pair(color, shape)


def test_held_out_share_is_what_the_docstrings_say():
    assert sum(split.is_held_out_pair(c, s) for c in range(10) for s in range(8)) == 8
    assert sum(split.is_held_out_company(a, b) for a, b in itertools.combinations(range(8), 2)) == 4
    assert sum(split.is_held_out_count(s, n) for s in range(8) for n in (2, 3, 4)) == 8


def test_position_is_drawn_as_the_prompt_says():
    """ "A left of B": A's centre is left of B's. The control: the swapped relation fails on the same image."""
    for relation, opposite in (("left of", "right of"), ("above", "below")):
        line = Metadata(
            "position",
            (ObjectSpec("square"), ObjectSpec("star", position=(relation, 0))),
            f"a photo of a star {relation} a square",
        )
        swapped = Metadata(
            "position", (ObjectSpec("square"), ObjectSpec("star", position=(opposite, 0))), "swapped"
        )
        world = scenes.sample_scenes([line] * 8, np.random.default_rng(1))
        for found in scenes.detect(scenes.render(world, 128)):
            assert score(found, line).correct
            assert not score(found, swapped).correct
