"""What the compiler makes of the kernels for an A100 and an H100, which need not be there. Bounds, not values: they
change with Triton's version. A process of its own, because Triton's driver is replaced in it."""

import json
import subprocess
import sys

import pytest

_RUN = """
import json
from accel.evaluation.bench.kernels import compile_cases, compiled_table
if __name__ == "__main__":
    print(json.dumps(compile_cases(("bfloat16", "float32"), (80, 90), workers=2)))
"""

#: Kernels that move rows: at least as many 128-bit loads as the rows they read at once, at 16 bits a value.
ROWS = {"norms": 1, "mean": 2, "add_change": 3, "parts": 30, "newton": 2, "corrected": 4, "drawn": 16}
REGISTERS = {"best": 255, "parts": 128, "choose": 128, "rank": 128, "scaled": 128, "drawn": 128}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    pytest.importorskip("triton")
    script = tmp_path_factory.mktemp("compiled") / "run.py"
    script.write_text(_RUN)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_nothing_spills(kernels):
    assert [k for k in kernels if k["spilled"]] == []


def test_registers_and_shared_memory(kernels):
    assert [k for k in kernels if k["registers"] > REGISTERS.get(k["kernel"], 64)] == []
    # 163 KB on an A100, 227 on an H100; half of them where two blocks are to fit.
    assert [k for k in kernels if k["shared"] > {80: 163, 90: 227}[k["arch"]] * 1024] == []


def test_rows_are_read_128_bits_at_a_time(kernels):
    found = {(k["kernel"], k["arch"]): k["wide_loads"] for k in kernels if k["dtype"] == "bfloat16"}
    assert {name for name, _ in found} > set(ROWS)
    assert [(k, n) for k, n in found.items() if n < ROWS.get(k[0], 0)] == []


def test_similarities_come_from_tensor_cores(kernels):
    best = [k for k in kernels if k["kernel"] == "best"]
    assert all((k["products"] > 0) == (k["dtype"] == "bfloat16") for k in best)
    assert {k["arch"] for k in best} == {80, 90}
