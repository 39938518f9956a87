"""The range of versions that is supported, tried: a virtual environment, the main job and the core suite for each end.

    python scripts/versions.py [--only lowest] [--write docs/measured/versions.md]

Prints a Markdown table. A row that was stopped goes on at the stage where it was; `--again` starts it anew. pip's own
settings hold, such as PIP_INDEX_URL for wheels without CUDA. Only the three packages whose interfaces the library lives
on are held at their lowest; the others are whatever pip takes beside them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "transformers")
#: Pins by end of the range; pyproject.toml's lower bounds must say the same.
RANGE = {"lowest": ("torch==2.10.*", "diffusers==0.40.*", "transformers==5.0.*"), "newest": PACKAGES}
MAIN_JOB = ("demo", "--steps", "8", "--json")
#: The built-in model's tests look at the pictures: weights that a version does not find are drawn at random, and
#: the main job takes no notice.
SUITE = (
    "tests/core",
    "tests/methods",
    "tests/autoregressive",
    "tests/test_builtin_model.py",
    "tests/test_builtin_ar_model.py",
)
COMMAND = "python scripts/versions.py --write docs/measured/versions.md"

Row = dict[str, Any]


def install(folder: Path, end: str) -> Row:
    """Make the environment and install the package into it, with the pins of this end."""
    venv.create(folder / "venv", with_pip=True, clear=True)
    python = folder / "venv/bin/python"
    made = called([python, "-m", "pip", "install", "--quiet", "--upgrade", f"{ROOT}[test]", *RANGE[end]])
    script = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    found = called([python, "-c", script, *PACKAGES])["output"].split() if made["ok"] else []
    return made | {"versions": dict(zip(PACKAGES, found, strict=False)), "python": platform.python_version()}


def main_job(folder: Path, end: str) -> Row:
    """What a newcomer runs first, away from the repository, so that what is tried is what was installed."""
    with tempfile.TemporaryDirectory() as elsewhere:
        return called([folder / "venv/bin/accel", *MAIN_JOB], elsewhere)


def suite(folder: Path, end: str) -> Row:
    """The core suite; how many tests passed, failed and were skipped, and the failures' first lines."""
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    ran = called(
        [folder / "venv/bin/pytest", "-q", "--continue-on-collection-errors", f"--junitxml={report}", *SUITE]
    )
    if not report.exists():
        return ran
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = {
        f"{case.get('classname')}::{case.get('name')}": (found.get("message") or "").split("\n")[0]
        for case in cases
        for found in [*case.findall("failure"), *case.findall("error")]
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"passed": len(cases) - len(failures) - skipped, "failed": len(failures), "skipped": skipped}
    return ran | counts | {"failures": failures}


STAGES = {"install": install, "main job": main_job, "tests": suite}


def called(command: list[Any], folder: Path | str = ROOT) -> Row:
    """Run a command; whether it went well, the end of what it said, and how long it took."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - start
    return {"ok": done.returncode == 0, "output": done.stdout[-4000:].strip(), "seconds": round(seconds)}


def tried(end: str, folder: Path, *, again: bool, keep: bool) -> Row:
    """The row of one end: its stages in turn, each written down when it is done. Stops where a stage leaves nothing
    for the next to run on."""
    file = folder / "row.json"
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    row: Row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, stage in STAGES.items():
        if name in row:
            continue
        print(f"{end}: {name} ...", file=sys.stderr, flush=True)
        row[name] = stage(folder, end)
        file.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        if name == "install" and not row[name]["ok"]:
            break
    if not keep:
        shutil.rmtree(folder / "venv", ignore_errors=True)
    return row


def table(rows: dict[str, Row]) -> str:
    """The rows as Markdown, and below them what went wrong."""
    header = ("range", "Python", *PACKAGES, "install", "main job", "passed", "failed", "skipped", "seconds")
    lines = [header, ("---",) * len(header)]
    wrong = []
    for end, row in rows.items():
        made, tests = row["install"], row.get("tests", {})
        cells = [end, made["python"], *(made["versions"].get(name, "–") for name in PACKAGES)]
        for name in ("install", "main job"):
            cells.append("–" if name not in row else "ok" if row[name]["ok"] else "failed")
        cells += [str(tests.get(name, "–")) for name in ("passed", "failed", "skipped")]
        lines.append((*cells, str(sum(stage["seconds"] for stage in row.values()))))
        wrong += [f"- {end}, `{test}`: {why}" for test, why in tests.get("failures", {}).items()]
        for name, stage in row.items():
            if not stage["ok"] and not stage.get("failures"):
                said = stage["output"].splitlines() or ["(nothing said)"]
                wrong.append(f"- {end}, {name}: {said[-1]}")
    return (
        "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *(["", *wrong] if wrong else [])]) + "\n"
    )


def page(rows: dict[str, Row]) -> str:
    job = f"`accel {' '.join(MAIN_JOB)}`"
    said = (
        f"The main job is {job}, the tests are `pytest {' '.join(SUITE)}`, on {platform.system()} "
        f"{platform.machine()}. Each row is an environment of its own."
    )
    return f"# Versions\n\n```bash\n{COMMAND}\n```\n\n{said}\n\n{table(rows)}"


def main() -> int:
    """0 where every row went well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=RANGE, help="one end of the range")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/versions", help="environments and rows")
    parser.add_argument("--write", type=Path, help="also write the page with the table to this file")
    parser.add_argument("--again", action="store_true", help="start rows anew that are finished or begun")
    parser.add_argument("--keep", action="store_true", help="leave the environments where they are")
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    for end in RANGE:
        folder = options.folder.absolute() / end
        if options.only in (None, end):
            rows[end] = tried(end, folder, again=options.again, keep=options.keep)
        elif (folder / "row.json").exists():  # of an earlier start: the page keeps it
            rows[end] = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    print(table(rows), end="")
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(page(rows), encoding="utf-8")
    return 0 if all(stage["ok"] for row in rows.values() for stage in row.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
