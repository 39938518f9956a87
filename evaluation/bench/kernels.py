"""`accel bench kernels`: each kernel against its reference on this GPU, beside what its bytes or products must take.

Kernels are compiled beforehand in parallel processes. Every row is written at once; a row that breaks the CUDA
context is written, too, and the rest goes on in a new process.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accel.errors import UnsupportedError
from accel.evaluation.environment import environment
from accel.evaluation.errors import EvaluationError
from accel.kernels import dispatch

from .kernel_cases import CASES, C, K, M, N, chain, destinations, values

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_REPEATS, _ROTATED = 7, 4
_CHAIN = "match to unmerge"
_LATE = "out of time"


# Compiling


def compile_case(name: str, dtype: str, capability: int) -> list[dict[str, Any]]:
    """What the compiler makes of a case's kernels. In a process of its own: see `accel.kernels.compiling`."""
    from accel.kernels.compiling import compile_all

    case = next(case for case in CASES if case.name == name)
    kernel, args = case.operation.kernel, case.arguments("meta", DTYPES[dtype])
    made = compile_all(lambda: kernel(*args), capability)
    return [{"case": name, "dtype": dtype, "arch": capability, **kernel.as_dict()} for kernel in made]


def compile_cases(
    dtypes: tuple[str, ...], capabilities: tuple[int, ...], workers: int | None = None
) -> list[dict[str, Any]]:
    """All cases, in parallel processes; what is compiled stays in Triton's cache."""
    jobs = [
        (case.name, dtype, capability) for case in CASES for dtype in dtypes for capability in capabilities
    ]
    count = min(workers or os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_case, *job) for job in jobs]
        return [row for future in futures for row in future.result()]


def compiled(out: Path, dtype: str = "bfloat16", capabilities: tuple[int, ...] = (80, 90)) -> str:
    """The table of `compile_cases`, which `out/compiled.md` holds, too.

    Raises:
        UnsupportedError: no Triton here.
    """
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError(
            "compiling kernels needs Triton, which comes with torch's CUDA builds for Linux"
        )
    rows = compile_cases((dtype,), capabilities)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compiled.json").write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    text = compiled_table(rows)
    (out / "compiled.md").write_text(text)
    return text


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; what is the same in several cases stands once."""
    cells = ("kernel", "dtype", "arch", "registers", "spilled", "shared", "wide_loads", "products")
    cases: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        cases.setdefault(tuple(row[cell] for cell in cells), []).append(row["case"])
    lines = [
        "| kernel | values | sm | registers | spilled bytes | shared bytes | 128-bit loads | tensor-core instructions | in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(map(str, key))} | {', '.join(names)} |" for key, names in cases.items()]
    return "\n".join(lines) + "\n"


# Measuring


def bench(
    out: Path, *, dtype: str = "bfloat16", budget: float = 90.0, say: Callable[[str], None] = print
) -> str:
    """Measure every case that `out/kernels.json` does not hold yet, for about `budget` seconds; returns the table,
    which `out/kernels.md` holds, too.

    Raises:
        UnsupportedError: no kernel can run here.
        EvaluationError: the folder is of another dtype.
    """
    if dispatch.MISSING is not None:
        raise UnsupportedError(f"accel bench kernels needs a GPU and Triton: {dispatch.MISSING}")
    end = time.time() + budget
    out.mkdir(parents=True, exist_ok=True)
    file = out / "kernels.json"
    if not file.is_file():
        begin, capability = time.monotonic(), torch.cuda.get_device_capability()
        compile_cases((dtype,), (10 * capability[0] + capability[1],))
        seconds = round(time.monotonic() - begin, 1)
        file.write_text(
            json.dumps({"environment": environment(), "dtype": dtype, "compile_seconds": seconds})
        )
        say(f"compiled in {seconds} s")
    _resume(file, dtype)
    missing, left = set(names()), len(names()) + 1
    while (
        missing and len(missing) < left
    ):  # a process whose CUDA context broke wrote its row, and was the last to
        left = len(missing)
        worker = multiprocessing.get_context("spawn").Process(target=_measure_all, args=(file, end, say))
        worker.start()
        worker.join()
        missing = set(names()) - set(json.loads(file.read_text()).get("rows", {}))
    text = table(json.loads(file.read_text()))
    (out / "kernels.md").write_text(text)
    return text


def _resume(file: Path, dtype: str) -> None:
    """Leave out the rows that there was no time for, so that they are measured."""
    report = json.loads(file.read_text())
    if report["dtype"] != dtype:
        raise EvaluationError(f"{file} was made with {report['dtype']}, not {dtype}: choose another folder")
    rows = report.get("rows", {})
    report["rows"] = {name: row for name, row in rows.items() if row.get("error") != _LATE}
    if report["rows"] != rows:
        file.write_text(json.dumps(report, indent=1))


def names() -> list[str]:
    return [*(case.name for case in CASES if case.measured), _CHAIN]


def _measure_all(file: Path, end: float, say: Callable[[str], None]) -> None:
    report = json.loads(file.read_text())
    report.setdefault("rows", {})
    if "bytes_per_second" not in report:
        report |= _limits()
    for name in names():
        if name in report["rows"]:
            continue
        broken = False
        try:
            row = {"error": _LATE} if time.time() > end else _measure(name, report)
        except Exception as error:  # one kernel's fault must not hide the others
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            broken = _context_is_broken()
        report["rows"][name] = row
        file.write_text(json.dumps(report, indent=1))
        say(f"{name:22s} {row}")
        if broken:
            return
        torch.cuda.empty_cache()


def _context_is_broken() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _measure(name: str, report: dict[str, Any]) -> dict[str, Any]:
    dtype = DTYPES[report["dtype"]]
    if name == _CHAIN:
        return _measure_chain(dtype)
    case = next(case for case in CASES if case.name == name)
    op = case.operation
    inputs = [case.arguments("cuda", dtype) for _ in range(_ROTATED)]
    row: dict[str, Any] = {"check": op.check(inputs[0]) or "ok"}
    bound = case.bytes(dtype.itemsize) / report["bytes_per_second"]
    if case.flops and dtype != torch.float32:
        bound = max(bound, case.flops / report["flops_per_second"])
    row["kernel_us"] = _captured([partial(op.kernel, *args) for args in inputs])
    with dispatch.use("triton"):
        row["call_us"] = _eager([partial(op, *args) for args in inputs])
    row["reference_us"] = _eager([partial(op.reference, *args) for args in inputs])
    return {**row, "bound_us": round(bound * 1e6, 1)}


def _measure_chain(dtype: torch.dtype) -> dict[str, Any]:
    inputs = [
        (values("cuda", dtype, 1, N, C), destinations("cuda", 1, N, M), values("cuda", dtype, 1, K, C))
        for _ in range(_ROTATED)
    ]
    calls = [partial(chain, *args) for args in inputs]
    with dispatch.use("reference"):
        plain = _eager(calls)
    with dispatch.use("triton"):
        return {"check": "ok", "call_us": _eager(calls), "kernel_us": _captured(calls), "reference_us": plain}


def _limits() -> dict[str, float]:
    """What this device reaches in a copy and in a matrix product."""
    a, b = (torch.randn(1 << 27, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = _captured([lambda: a.copy_(b)], 4)
    square = a[: 1 << 26].view(8192, 8192)
    product = _captured([lambda: square @ square], 2)
    return {
        "bytes_per_second": 2 * a.nbytes / copy * 1e6,
        "flops_per_second": 2 * 8192**3 / product * 1e6,
    }


def _captured(calls: Sequence[Callable[[], Any]], total: int = 16) -> float:
    """Microseconds on the device of one call: replays of a graph of calls with inputs in turn, median."""
    rounds = max(1, total // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = [_between(graph.replay) / (rounds * len(calls)) for _ in range(_REPEATS)]
    return round(sorted(times)[_REPEATS // 2], 2)


def _eager(calls: Sequence[Callable[[], Any]], rounds: int = 8) -> float:
    """Microseconds of one call as a pipeline makes it, launches included, median."""

    def all_of_them() -> None:
        for call in calls:
            call()

    all_of_them()

    def often() -> None:
        for _ in range(rounds):
            all_of_them()

    times = [_between(often) / (rounds * len(calls)) for _ in range(_REPEATS)]
    return round(sorted(times)[_REPEATS // 2], 1)


def _between(run: Callable[[], Any]) -> float:
    """Microseconds between two events around it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


# Reporting


def table(report: dict[str, Any]) -> str:
    """Markdown: a row per case."""
    made = report["environment"]
    lines = [
        f"{made['device']}, {report['dtype']}, torch {made['versions']['torch']}, triton {made['versions']['triton']}: "
        f"{report['bytes_per_second'] / 1e12:.2f} TB/s "
        f"in a copy, {report['flops_per_second'] / 1e12:.0f} TFLOP/s in a product; compiled in "
        f"{report['compile_seconds']} s. Microseconds: on the device, of a call from Python, of the reference, and what "
        "the bytes or products take at least.",
        "",
        "| operation | kernel | call | reference | reference / call | bound | check |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        if "error" in row:
            lines.append(f"| {name} | | | | | | {row['error']} |")
            continue
        ratio = row["reference_us"] / row["call_us"]
        lines.append(
            f"| {name} | {row['kernel_us']} | {row['call_us']} | {row['reference_us']} | {ratio:.1f} | "
            f"{row.get('bound_us', '')} | {row['check']} |"
        )
    return "\n".join(lines) + "\n"
