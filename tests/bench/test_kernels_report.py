"""What `accel bench kernels` does with a folder that holds rows already; the measuring itself needs a GPU."""

import json

import pytest

from accel.evaluation.bench import kernels
from accel.evaluation.errors import EvaluationError


def test_rows_that_there_was_no_time_for_are_measured_again(tmp_path):
    file = tmp_path / "kernels.json"
    kept = {"norms": {"kernel_us": 1.0}, "mean": {"error": "RuntimeError: broken"}}
    content = {"dtype": "bfloat16", "rows": {**kept, "best": {"error": "out of time"}}}
    file.write_text(json.dumps(content))
    kernels._resume(file, "bfloat16")
    assert json.loads(file.read_text())["rows"] == kept
    with pytest.raises(EvaluationError, match="made with bfloat16, not float16: choose another folder"):
        kernels._resume(file, "float16")
