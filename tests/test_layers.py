"""Imports run one way, and nowhere in a circle. Read from the code, so that an import in a function, under
TYPE_CHECKING or in a table of names counts as well."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "draw_imports.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="tests run without the source tree around them")

#: From the top down; a room imports only from floors below its own. Methods and families do not know each other.
FLOORS = (
    ("accel/cli",),
    ("evaluation/bench",),
    ("evaluation",),
    ("accel",),  # the verb: api, generation, handle
    ("configs",),
    ("accel/methods", "pipelines"),
    ("accel/core",),
    ("kernels",),
    ("accel: foundations",),
)
FLOOR = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms}


@pytest.fixture(scope="module")
def graph():
    spec = importlib.util.spec_from_file_location("draw_imports", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def upward(graph, root: Path) -> list[str]:
    found = []
    for i in graph.imports(root):
        above, below = graph.room(i.source), graph.room(i.target)
        if above != below and FLOOR[above] <= FLOOR[below]:
            found.append(f"{i.where}: {above} imports {i.target} ({below}), which is not below it")
    return found


def between_methods(graph, root: Path) -> list[str]:
    """A method's folder is its own: what two methods share lies beside the folders, or in the core."""
    found = []
    for i in graph.imports(root):
        a, b = (name.split(".")[1:3] for name in (i.source, i.target))
        inside = a[0] == b[0] == "methods" and len(a) == len(b) == 2
        files = graph.modules(root)
        folders = all(
            (files.get(f"accel.methods.{x[-1]}") or Path()).name == "__init__.py" for x in (a, b) if inside
        )
        if inside and folders and a != b:
            found.append(f"{i.where}: the method {a[1]} imports {i.target}")
    return found


def settings_that_know_their_engine(graph, root: Path) -> list[str]:
    """config.py is what a user sets; whoever reads it must not be known to it."""
    allowed = ("accel.core.", "accel.errors")
    return [
        f"{i.where}: a configuration imports {i.target}"
        for i in graph.imports(root)
        if i.source.startswith("accel.methods.")
        and i.source.endswith(".config")
        and not i.target.startswith(allowed)
    ]


def circles(graph, root: Path) -> list[list[str]]:
    return graph.circles({(i.source, i.target) for i in graph.imports(root)})


def test_every_import_goes_down(graph):
    assert upward(graph, ROOT) == []


def test_no_files_import_each_other(graph):
    assert circles(graph, ROOT) == []


def test_methods_do_not_import_each_other(graph):
    assert between_methods(graph, ROOT) == []


def test_configurations_do_not_import_engines(graph):
    assert settings_that_know_their_engine(graph, ROOT) == []


def test_every_room_has_a_floor(graph):
    """A new folder is placed by somebody, not overlooked."""
    assert {graph.room(name) for name in graph.modules(ROOT) if name != "accel"} == set(FLOOR)


def arrows(picture: str) -> set[str]:
    return set(re.findall(r"<title>(.+?): \d+ imports</title>", picture))


def test_the_picture_is_of_this_code(graph):
    """After a change of who imports whom: `python scripts/draw_imports.py --out docs/imports.svg`."""
    drawn = arrows((ROOT / "docs/imports.svg").read_text(encoding="utf-8"))
    assert drawn == arrows(graph.draw(ROOT, graph.TITLE))
    assert len(drawn) > 20


# That the measure measures: a small tree with one fault of each kind.

FAULTS = {
    "accel/__init__.py": '_HOME = {"accelerate": "accel.api"}\n',
    "accel/api.py": "from .core import plan\n",
    "accel/errors.py": "",
    "accel/core/plan.py": "def late():\n    from accel import accelerate\n",
    "accel/core/site.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan import x\n",
    "accel/methods/__init__.py": "",
    "accel/methods/merging/__init__.py": "",
    "accel/methods/merging/config.py": "from . import engine\n",
    "accel/methods/merging/engine.py": "from accel.methods.pruning import engine\n",
    "accel/methods/pruning/__init__.py": "",
    "accel/methods/pruning/engine.py": "import accel.errors\nfrom ..merging.engine import x\n",
    "pipelines/registry.py": 'TABLE = {"A": "accel.methods.merging.config"}\n',
}


@pytest.fixture
def faulty(tmp_path) -> Path:
    for name, text in FAULTS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_each_fault_is_found_and_named(graph, faulty):
    assert upward(graph, faulty) == [
        "accel/core/plan.py:2: accel/core imports accel.api (accel), which is not below it",
        "pipelines/registry.py:1: pipelines imports accel.methods.merging.config (accel/methods), which is not below it",
    ]
    assert circles(graph, faulty) == [
        ["accel.api", "accel.core.plan"],
        ["accel.methods.merging.engine", "accel.methods.pruning.engine"],
    ]
    assert between_methods(graph, faulty) == [
        "accel/methods/merging/engine.py:1: the method merging imports accel.methods.pruning.engine",
        "accel/methods/pruning/engine.py:2: the method pruning imports accel.methods.merging.engine",
    ]
    assert settings_that_know_their_engine(graph, faulty) == [
        "accel/methods/merging/config.py:1: a configuration imports accel.methods.merging.engine"
    ]


def test_the_picture_shows_them_in_red(graph, faulty):
    picture = graph.draw(faulty, "with faults")
    assert "1 upwards" in picture  # the verb and the core import each other once each: one of the two goes up
    assert "circles between files: 2" in picture
    assert "#c0392b" in picture
    assert "#c0392b" not in graph.draw(ROOT, "ours")
