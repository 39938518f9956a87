"""What a start imports: that, and not the clock of a busy machine, decides how long it takes."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "diffusers", "transformers", "scipy", "numpy", "PIL", "yaml"}


def imported_by(code: str) -> set[str]:
    """Modules in a new process that has run the code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_check_sees_what_is_imported():
    assert {"numpy"} == imported_by("import numpy") & {"numpy", "torch"}


def test_importing_the_package_imports_nothing_else():
    found = imported_by("import accel")
    assert not found & (HEAVY | {"rich", "typer"})
    assert "importlib.metadata" not in found  # by itself longer than everything else


@pytest.mark.parametrize(
    "command", [["--help"], ["generate", "--help"], ["evaluate", "run", "--help"], ["--version"]]
)
def test_help_imports_no_numbers(command):
    run = f"from accel.cli.app import main\ntry: main({command!r})\nexcept SystemExit as left: assert not left.code"
    assert not imported_by(run) & HEAVY


def test_what_is_imported_late_is_there():
    """The names that cost something do arrive."""
    found = imported_by("import accel; accel.accelerate; accel.__version__; accel.configs.load('balanced')")
    assert {"torch", "yaml"} <= found
