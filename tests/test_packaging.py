"""What users install. Repository folders named `kernels` or `evaluation` must never become top-level packages:
`kernels` would shadow Hugging Face's, and then diffusers fails to import FLUX with an error about something else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("accel", "pipelines", "kernels", "evaluation", "configs")

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="tests run without the source tree around them"
)


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)],
        check=True,
        cwd=out,  # `build/` of an earlier run must not leak in
    )
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_only_accel_is_installed_at_top_level(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"accel"}


def test_every_source_file_is_in_the_wheel(wheel_names):
    """A new folder that is missing from `packages` works in an editable install and fails for users."""
    installed = set(wheel_names)
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix()
            expected = inside if folder == "accel" else f"accel/{inside}"
            assert expected in installed, f"{inside}: add its folder to `packages` in pyproject.toml"


def test_data_files_are_in_the_wheel(wheel_names):
    names = set(wheel_names)
    assert "accel/py.typed" in names
    assert any(name.startswith("accel/configs/") and name.endswith(".yaml") for name in names)
    for part in (
        "model_index.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
        "turbo.safetensors",
        "textured.safetensors",
        "chunking.safetensors",
    ):
        assert f"accel/pipelines/builtin/scenes-flux/{part}" in names
    for part in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert f"accel/pipelines/builtin/scenes-janus/{part}" in names
    for suffix in ("safetensors", "json"):
        assert f"accel/evaluation/extractors/scenes_extractor.{suffix}" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))]


def test_import_is_light():
    """`import accel` must not import torch; `import accel.kernels` not transformers."""
    code = (
        "import sys, accel\n"
        "assert 'torch' not in sys.modules\n"
        "import accel.kernels\n"
        "assert 'transformers' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_a_clone_is_importable_as_it_is():
    """`python -m accel` in a clone, or a worker process started there, finds the folder `accel` before the
    installed package; its subpackages lie beside it."""
    code = "import accel.evaluation.scenes, accel.pipelines.builtin as b; print(b.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert Path(out.strip()) == ROOT / "pipelines" / "builtin" / "__init__.py"
