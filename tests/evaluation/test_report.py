"""The report: its numbers, its page in a real browser, and prompts that try to be code."""

import csv
import io
import itertools
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from browser import CHROMIUM, DRIVER, Browser
from fake_pipeline import SUITE, FakePipeline
from PIL import Image

from accel.evaluation.errors import EvaluationError
from accel.evaluation.features import FeatureSet, distances, store_path
from accel.evaluation.folder import RunFolder
from accel.evaluation.geneval import Detection, Metadata, ObjectSpec, aggregate
from accel.evaluation.geneval import score as judge
from accel.evaluation.report import report, summarise
from accel.evaluation.report.plot import FILE, Point, file, layout, pareto_front
from accel.evaluation.report.table import Markdown, Table
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.scorers import DetectionScorer, pixel_scorers
from accel.evaluation.suites import Prompt, Suite

EVIL = (
    '</p><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2" alt=\'"><svg onload=pwned()>\'>'
    ' {{ 7 * 7 }} &lt;b&gt; <a href="javascript:window.pwned = 3">click</a> | `md` **bold**'
)


def detect(images, metadata):
    return [[Detection("cat", 0.9, (0, 0, 5, 5))] if image.float().mean() > 110 else [] for image in images]


class Flat:
    """A four-number extractor, enough for a covariance of a few images."""

    name, dim = "flat:test@0", 4

    def __call__(self, images):
        return torch.stack(
            [images.float().mean((1, 2, 3)), *(images[:, c, 3, 5].float() for c in range(3))], 1
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    texts = [EVIL, *(f"a photo of a cat {i}" for i in range(7))]
    tags = ["single_object", "colors"] * 4
    prompts = [
        Prompt(i, text, Metadata(tag, (ObjectSpec("cat"),), text))
        for i, (text, tag) in enumerate(zip(texts, tags, strict=True))
    ]
    path = tmp_path_factory.mktemp("report") / "r"
    run(
        path,
        Suite("geneval", prompts),
        FakePipeline(),
        ["few:steps=4", "steps=12", "same:steps=20"],
        model=EVIL,
    )
    scorers = [DetectionScorer("geneval (transformers port)", detect), *pixel_scorers()]
    score(path, scorers, [Flat()], reference=path / "images/plain")
    report(path, worst=8)
    return RunFolder(path)


@pytest.fixture(scope="module")
def summary(folder):
    return json.loads((folder.path / "report/report.json").read_text())


def row(summary, name):
    return next(r for r in summary["configurations"] if r["name"] == name)


def test_the_summary_is_what_the_records_say(folder, summary):
    records = list(folder.samples())
    seconds = {(r["configuration"], r["prompt_id"]): r["seconds"] for r in records}
    few = row(summary, "few")
    ratios = [seconds["plain", i] / seconds["few", i] for i in range(8)]
    assert few["speed"]["pipeline"]["speedup"]["value"] == pytest.approx(np.median(ratios))
    assert few["speed"]["pipeline"]["median"] == pytest.approx(
        np.median([seconds["few", i] for i in range(8)])
    )
    values = [r["value"] for r in folder.scores() if r["configuration"] == "few" and r["metric"] == "psnr"]
    assert few["metrics"]["psnr"]["mean"]["value"] == pytest.approx(np.mean(values))
    assert few["metrics"]["psnr"]["mean"]["n"] == 8
    worst = [w["value"] for w in few["worst"]]
    assert worst == sorted(values)
    assert row(summary, "same")["metrics"]["psnr"]["identical"] == 8
    assert "mean" not in row(summary, "same")["metrics"]["psnr"]


def test_the_suite_score_is_genevals_aggregate(folder, summary):
    metric = "geneval (transformers port)"
    assert summary["suite_metric"] == metric
    prompts = folder.prompts()
    verdicts = []
    for record in folder.scores():
        if record["metric"] == metric and record["configuration"] == "plain":
            seen = [Detection.from_dict(d) for d in record["seen"]]
            verdicts.append(judge(seen, prompts[record["prompt_id"]].metadata))
    expected = aggregate(verdicts)
    own = row(summary, "plain")["metrics"][metric]
    assert own["mean"] == expected.overall.to_dict()
    assert "not comparable" in " ".join(summary["notes"])
    assert own["missing_tasks"] == ["single_object", "two_object", "counting", "position", "color_attr"][1:]
    assert "difference" in row(summary, "few")["metrics"][metric]


def test_distances_name_extractor_n_and_reference(summary):
    found = {(d["configuration"], d["to"]): d for d in summary["distances"]}
    assert set(found) == {(n, "plain") for n in ("few", "steps=12", "same")} | {
        (n, "reference") for n in ("plain", "few", "steps=12", "same")
    }
    assert all((d["extractor"], d["n"]) == ("flat:test@0", 8) for d in found.values())
    assert found["same", "plain"]["fid"] == pytest.approx(0, abs=1e-6)
    assert found["plain", "reference"]["fid"] == pytest.approx(0, abs=1e-6)
    assert found["few", "plain"]["fid"] > 1
    assert found["same", "plain"]["intervals"]["fid"] is None  # equal sets: no spread is no certainty


def test_csv_and_markdown(folder, summary):
    rows = list(csv.DictReader(io.StringIO((folder.path / "report/report.csv").read_text())))
    assert [r["configuration"] for r in rows] == ["plain", "few", "steps=12", "same"]
    assert float(rows[1]["psnr"]) == pytest.approx(row(summary, "few")["metrics"]["psnr"]["mean"]["value"])
    text = (folder.path / "report/report.md").read_text()
    tables = re.findall(r"^\| configuration .*\n\|( --- \|)+\n(\|.*\n)+", text, re.M)
    assert len(tables) == 3
    assert "<script" not in text.replace("\\<", "")


def test_the_page_is_self_contained(folder):
    page = (folder.path / "report/index.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", re.sub(r"&[#\w]+;", "", page))
    assert "@import" not in page
    assert "url(" not in page
    assert page.count("<script>") == 1


def test_an_unfinished_run_says_what_it_compares(tmp_path):
    unfinished = run(tmp_path / "r", SUITE, FakePipeline(), ["steps=4"])
    file = tmp_path / "r/samples/rank-00000.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-3]) + "\n")
    summary = summarise(unfinished)
    assert summary["images"] == 4
    assert "Only the 4 images that every configuration has" in summary["notes"][0]
    file.write_text("")
    with pytest.raises(EvaluationError, match="no images yet"):
        summarise(unfinished)


def test_what_failed_is_named_and_does_not_shorten_the_comparison(tmp_path):
    broken = run(tmp_path / "r", SUITE, FakePipeline(), ["steps=4", "steps=8"])
    file = tmp_path / "r/samples/rank-00000.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [r for r in lines if r["configuration"] != "steps=4" or r["prompt_id"] == 0]
    file.write_text("".join(json.dumps(r) + "\n" for r in kept))
    (tmp_path / "r/problems.json").write_text(json.dumps({"steps=4": "ValueError: no", "never-run": "?"}))
    summary = summarise(broken)
    assert (summary["images"], [r["name"] for r in summary["configurations"]]) == (6, ["plain", "steps=8"])
    assert summary["notes"] == [
        "Configuration steps=4 failed and is left out with its 1 images: ValueError: no"
    ]


def test_only_neighbours_of_one_start_make_a_ratio(tmp_path):
    started = run(tmp_path / "r", SUITE, FakePipeline(), ["steps=4"])
    file = tmp_path / "r/samples/rank-00000.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["configuration"] == "plain" and line["prompt_id"] < 4:
            line |= {"session": "0.9", "seconds": 1000.0}  # another, slower start
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    speed = row(summarise(started), "steps=4")["speed"]["pipeline"]
    assert speed["speedup"]["n"] == 2
    assert speed["speedup"]["value"] < 100


def test_a_batch_is_one_measurement_of_time(tmp_path):
    """Six images of two calls share two times; counting them as six would make the interval too sure."""
    batched = run(tmp_path / "r", SUITE, FakePipeline(), ["steps=4"], batch_size=3)
    speed = row(summarise(batched), "steps=4")["speed"]
    assert speed["pipeline"]["speedup"]["n"] == speed["denoiser"]["speedup"]["n"] == 2
    assert speed["pipeline"]["speedup"]["low"] is None


def test_reference_images_are_taken_evenly_from_their_folder(tmp_path):
    """A folder sorted by class would otherwise give only its first classes."""
    started = run(tmp_path / "r", SUITE, FakePipeline(), [], limit=5)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(20):
        Image.new("RGB", (32, 32), (12 * i, 0, 0)).save(pictures / f"{i:02d}.png")
    score(started.path, [], [Flat()], reference=pictures)
    (row,) = summarise(started)["distances"]
    chosen = FeatureSet(
        store_path(started.path, "flat:test@0"), "reference", {(i, 0) for i in (0, 4, 8, 12, 16)}
    )
    own = FeatureSet(store_path(started.path, "flat:test@0"), "plain")
    assert row["kid"] == pytest.approx(distances(chosen, own, tmp_path / "s")["kid"])


def test_one_prompt_a_task_has_a_ceiling_but_no_floor(folder, summary):
    """A run limited to one prompt per task has nothing to mismatch; the page must say so, not fail."""
    from accel.evaluation.report import html

    entry = row(summary, "plain")["metrics"][summary["suite_metric"]]
    ceiling = {"tasks": entry["tasks"], "overall": entry["mean"]}
    page = html(folder, summary | {"bounds": {"ceiling": ceiling, "floor": None}})
    assert "no floor: that needs two different prompts of a task" in page
    assert "a floor of 0." in html(folder, summary | {"bounds": {"ceiling": ceiling, "floor": ceiling}})


def test_pareto_front_and_reversed_axis():
    a, b, c, d = (
        Point(n, x, y, None, None, "") for n, x, y in [("a", 1, 9), ("b", 2, 8), ("c", 2, 7), ("d", 3, 8)]
    )
    assert [p.name for p in pareto_front([a, b, c, d], higher_is_better=True)] == ["a", "d"]
    assert [p.name for p in pareto_front([a, b, c, d], higher_is_better=False)] == ["c", "d"]
    for higher in (True, False):
        drawn = {p["name"]: p for p in layout([a, c], label="m", higher_is_better=higher)["points"]}
        assert (drawn["a"]["y"] < drawn["c"]["y"]) is higher  # better is up, y grows downwards
    layout([a], label="m", higher_is_better=True)  # one point: no division by its zero spread


def test_labels_of_a_crowded_plot_cover_neither_each_other_nor_the_points():
    points = [Point(f"merge{i}-ratio=0.{i}", 1 + i / 40, 0.8 - i / 200, None, None, "") for i in range(8)]
    drawn = layout(points, label="m", higher_is_better=True, lines=[("ceiling", 1.0), ("floor", 0.0)])
    boxes = []
    for p in drawn["points"]:
        width = 10 * len(p["shown"])
        left = p["label_x"] - (width if p["anchor"] == "end" else 0)
        boxes.append((left, p["label_y"] - 18, left + width, p["label_y"] + 6))
    for i, a in enumerate(boxes):
        assert 0 <= a[0] <= a[2] <= drawn["width"]
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for p in drawn["points"]:
            assert not (a[0] < p["x"] < a[2] and a[1] < p["y"] < a[3])
    long = layout([Point("x" * 60, 1, 1, None, None, "")], label="m", higher_is_better=True)["points"][0]
    assert (len(long["shown"]), len(long["name"])) == (24, 60)


def test_curves_are_drawn_on_logarithmic_axes_and_named_once():
    points = [Point(n, 2**i, k * 2**i, None, None, "", n) for n, k in (("a", 1), ("b", 3)) for i in range(4)]
    drawn = layout(points, label="m", series=True, sheet=FILE)
    assert [p["shown"] for p in drawn["points"] if p["shown"]] == ["a", "b"]
    first, second = ([tuple(map(float, c.split(","))) for c in path.split()] for path in drawn["paths"])
    across = [b[0] - a[0] for a, b in itertools.pairwise(first)]
    assert across == pytest.approx([across[0]] * 3, abs=0.2)  # doublings are equally far apart
    assert [a[1] - b[1] for a, b in zip(first, second, strict=True)] == pytest.approx(
        [first[0][1] - second[0][1]] * 4, abs=0.2
    )
    assert [text for _, text in drawn["x_ticks"]] == ["1", "2", "5", "10"]


def test_the_legend_covers_no_point():
    # Points in three of the four corners.
    points = [
        Point(f"p{i}", x, y, None, None, "", "ab"[i % 2]) for i, (x, y) in enumerate([(1, 0), (1, 9), (4, 9)])
    ]
    drawn = layout(points, label="m", sheet=FILE)
    x0, y0, x1, y1 = drawn["frame"]
    assert [name for name, *_ in drawn["legend"]] == ["a", "b"]
    for _, left, top in drawn["legend"]:
        assert not any(left < p["x"] < left + 37 and top < p["y"] < top + 18 for p in drawn["points"])
        assert x0 <= left < left + 37 <= x1
        assert y0 <= top < top + 18 <= y1


def test_a_figure_is_a_document_of_its_own_with_names_that_are_no_code():
    evil = layout([Point(EVIL, 1, 1, 0.5, 1.5, "<b>", EVIL, (0.9, 1.1))], label=EVIL)
    tree = ElementTree.fromstring(file([evil, layout([Point("b", 2, 1, None, None, "")], label="m")]))
    names = [part.get("data-name") for part in tree.iter() if part.get("data-name")]
    assert names == [EVIL, "b"]
    assert not any(part.tag.endswith(("script", "image", "a")) for part in tree.iter())
    assert [part.get("y") for part in tree.iter() if part.tag.endswith("svg")] == [None, "24", "408"]


# --- one table, its views ------------------------------------------------------------------------

TABLE = Table(
    ["name", "value | unit"], [["a*b|c](http://x)", None], [Markdown("`d|e`"), "1.0 [0.5, 1.5]"]], "Two"
)


def test_a_table_as_markdown_escapes_what_is_not_markdown():
    assert TABLE.markdown().splitlines() == [
        "## Two",
        "",
        "| name | value \\| unit |",
        "| --- | --- |",
        "| a\\*b\\|c\\](http://x) | – |",
        "| `d\\|e` | 1.0 [0.5, 1.5] |",
    ]


def test_a_table_as_csv_has_the_values():
    flat = Table.of([{"a": 1.5, "b": None}, {"b": "x,y", "c": True}])
    assert list(csv.reader(io.StringIO(flat.csv()))) == [
        ["a", "b", "c"],
        ["1.5", "", ""],
        ["", "x,y", "True"],
    ]


def test_a_table_on_a_terminal_takes_nothing_for_markup():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    console.print(Table(["name", "[bold]"], [["[/x] [red]a", Markdown("2x `b`")]]).terminal())
    shown = console.file.getvalue()
    assert "[/x] [red]a" in shown
    assert "[bold]" in shown
    assert "2x b" in shown


def test_a_row_that_does_not_fit_is_found_where_it_is_made():
    with pytest.raises(AssertionError, match="another length"):
        Table(["a", "b"], [["1"]])


# --- in the browser ------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)


@pytest.fixture(params=[1280, 400], ids=["1280px", "400px"])
def browser(request, tmp_path):
    browser = Browser(tmp_path / "profile", width=request.param)
    yield browser
    browser.close()


OVERLAPPING_LABELS = """
const found = [];
for (const svg of document.querySelectorAll('svg')) {
  const boxes = [...svg.querySelectorAll('.point text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1))
    if (p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom) found.push([a, b]);
}
return found;
"""


@needs_browser
def test_the_page_in_a_browser(browser, folder):
    browser.get(folder.path / "report/index.html")
    # The injected prompt and model name are text, in every place they appear, and never ran.
    assert browser.js("return window.pwned === undefined && document.title.includes('window.pwned')")
    assert browser.js("return document.querySelectorAll('script').length") == 1
    assert (
        browser.js("return document.querySelectorAll('a, svg[onload], img:not([src^=\"data:\"])').length")
        == 0
    )
    assert EVIL in browser.js("return [...document.querySelectorAll('.prompt')].map(p => p.textContent)")
    # Every picture is there, nothing is wider than the window, nothing was fetched, nothing complained.
    assert browser.js("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.js("return document.images.length") == 3 * 8 * 2
    assert browser.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.js(OVERLAPPING_LABELS) == []
    # At 400 pixels a row is a card: every number is in the window, with its column's name before it.
    cells = browser.js(
        "return [...document.querySelectorAll('td')].map(c => [c.dataset.label, "
        "getComputedStyle(c, '::before').content, c.getBoundingClientRect().right])"
    )
    assert all(label for label, _, _ in cells)
    if browser.js("return document.documentElement.clientWidth") == 400:
        assert all(label in before and right <= 400 for label, before, right in cells)
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:"))] == []
    assert browser.log("browser") == []


@needs_browser
def test_hover_names_the_configuration(browser, folder):
    browser.get(folder.path / "report/index.html")
    assert browser.js("return document.getElementById('tip').hidden")
    browser.hover(".point[data-name='few'] circle")
    assert browser.js("return document.getElementById('tip').textContent").startswith("few · ")
    box = browser.js(
        "const b = document.getElementById('tip').getBoundingClientRect(); return [b.left, b.right]"
    )
    assert box[0] >= 0
    assert box[1] <= browser.js("return document.documentElement.clientWidth")
    browser.hover("h1")
    assert browser.js("return document.getElementById('tip').hidden")


@needs_browser
def test_the_content_policy_alone_would_stop_a_script(tmp_path, folder):
    """The negative control: with escaping broken, the policy still lets nothing run."""
    page = (folder.path / "report/index.html").read_text()
    (tmp_path / "broken.html").write_text(page.replace("</body>", "<script>window.pwned = 1</script></body>"))
    (tmp_path / "open.html").write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", page).replace(
            "</body>", "<script>window.pwned = 1</script></body>"
        )
    )
    browser = Browser(tmp_path / "profile")
    try:
        browser.get(tmp_path / "broken.html")
        assert browser.js("return window.pwned === undefined")
        browser.get(tmp_path / "open.html")
        assert browser.js("return window.pwned") == 1
    finally:
        browser.close()
