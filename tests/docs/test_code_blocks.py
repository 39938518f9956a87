"""Python in the documentation compiles, imports what there is, and runs where it says so."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import ALL, PAGES, ROOT, Block, blocks, name

import accel

PYTHON = [block for block in ALL if block.language == "python"]
WRITTEN = {Path(block.file).with_suffix("").as_posix() for block in PYTHON if block.file}
RUN = [page for page in PAGES if any(block.marker.startswith("run") for block in blocks(page))]
INTERPRETER = "run: Triton's interpreter"
#: Folders of the repository -> the packages that they are.
PACKAGES = {"accel": "accel", "pipelines": "accel.pipelines", "kernels": "accel.kernels"}


def module(path: str) -> str:
    """pipelines/diffusion/toy -> accel.pipelines.diffusion.toy"""
    top, *rest = path.removesuffix("/__init__").split("/")
    return ".".join([PACKAGES[top], *rest])


def missing(text: str) -> list[str]:
    """Names of accel that a piece of code imports or uses, and that are not there."""
    found, own = [], {module(path) for path in WRITTEN}
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "accel"
            and not node.level
        ):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if node.module not in own and full not in own and not _there(node.module, alias.name):
                    found.append(full)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "accel"
            and not _there("accel", node.attr)
        ):
            found.append(f"accel.{node.attr}")
    return found


def _there(package: str | None, attribute: str) -> bool:
    assert package is not None
    if hasattr(importlib.import_module(package), attribute):
        return True
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(f"{package}.{attribute}")
        return True
    return False


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_it_compiles_and_names_what_there_is(block: Block):
    compile(block.text, block.where, "exec")
    assert missing(block.text) == []


def test_a_name_that_is_not_there_is_found():
    text = "import accel\nfrom accel.core.plan import TokenPlan, TokenPlane\naccel.accelerate(accel.Foo())"
    assert missing(text) == ["accel.core.plan.TokenPlane", "accel.Foo"]


class Pages:
    """Runs a page: its files lie where they belong, its models are the built-in ones."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def run(self, page: Path) -> dict:
        self._own_tables()
        names: dict = {"__name__": "page"}
        for block in blocks(page):
            if block.file:
                self._place(block)
        for block in blocks(page):
            if block.marker == INTERPRETER:
                self._interpret(block)
            elif block.marker.startswith("run"):
                text = block.text.replace('"cuda"', '"cpu"')
                exec(compile("\n" * block.line + text, name(page), "exec"), names)
        return names

    def _interpret(self, block: Block) -> None:
        """Triton looks at its environment when it is imported: a process of its own."""
        pytest.importorskip("triton")
        added = str(self.folder / "kernels")
        code = f"import accel.kernels\naccel.kernels.__path__.append({added!r})\n{block.text}"
        command = [sys.executable, "-W", "ignore", "-c", code]
        out = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr

    def _own_tables(self) -> None:
        """What a page registers is gone after it."""
        from accel.pipelines import registry

        for owner, table in ((accel.methods, "TABLE"), (registry, "_REGISTERED")):
            self.monkeypatch.setattr(owner, table, dict(getattr(owner, table)))

    def _place(self, block: Block) -> None:
        assert block.file is not None
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        # The package that exists already looks in the page's folder, too.
        there = next(parent for parent in Path(block.file).parents if (ROOT / parent).is_dir())
        package, folder = importlib.import_module(module(there.as_posix())), str(self.folder / there)
        if folder not in package.__path__:
            self.monkeypatch.setattr(package, "__path__", [*package.__path__, folder])


@pytest.fixture
def pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield Pages(tmp_path, monkeypatch)
    for added in {key for key in sys.modules if key.startswith("accel.")} - before:
        if str(tmp_path) in str(getattr(sys.modules[added], "__file__", "")):
            del sys.modules[added]
    torch.compiler.reset()


@pytest.fixture
def own_models(monkeypatch):
    """What the pages take from a hub is the built-in model, at a size that is quick."""
    from diffusers import FluxPipeline

    from accel.pipelines import builtin
    from accel.pipelines.autoregressive import AutoregressivePipeline

    load = FluxPipeline.from_pretrained.__func__

    def flux(cls, source, **options):
        if source != "black-forest-labs/FLUX.1-dev":
            return load(cls, source, **options)
        pipe = builtin.load_pipeline("cpu", options["torch_dtype"])
        pipe.default_sample_size = 16  # 64 px
        return pipe

    load_janus = AutoregressivePipeline.from_pretrained.__func__

    def janus(cls, source, **options):
        if source != "deepseek-community/Janus-Pro-1B":
            return load_janus(cls, source, **options)
        return builtin.load_autoregressive("cpu", options["torch_dtype"])

    monkeypatch.setattr(FluxPipeline, "from_pretrained", classmethod(flux))
    monkeypatch.setattr(AutoregressivePipeline, "from_pretrained", classmethod(janus))


@pytest.fixture
def _models(request, monkeypatch):
    page = request.getfixturevalue("page")
    if "from_pretrained(" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("own_models")


@pytest.mark.parametrize("page", RUN, ids=name)
@pytest.mark.usefixtures("_models")
def test_it_runs(page: Path, pages: Pages):
    with contextlib.redirect_stdout(io.StringIO()):
        pages.run(page)


def test_a_page_that_is_wrong_fails(tmp_path, pages: Pages):
    page = ROOT / "docs" / "index.md"
    (block,) = [block for block in blocks(page) if block.marker == "run"]
    wrong = tmp_path / "wrong.md"
    wrong.write_text(f"<!-- run -->\n```python\n{block.text.replace('balanced', 'balancd')}```\n")
    with pytest.raises(accel.AccelError, match="Did you mean 'balanced'"):
        run_text(pages, wrong)


def run_text(pages: Pages, page: Path) -> None:
    names: dict = {}
    for block in blocks(page):
        exec(compile(block.text, page.name, "exec"), names)


def test_the_pages_that_promise_to_run_do():
    """An example that lost its marker would be skipped without a word."""
    assert {name(page) for page in RUN} >= {
        "README.md",
        "docs/index.md",
        "docs/getting-started.md",
        "docs/presets.md",
        "docs/your-pipeline.md",
        "docs/autoregressive.md",
        "docs/adding/family.md",
        "docs/adding/method.md",
        "docs/adding/kernel.md",
    }
    assert all(block.marker for block in PYTHON)
