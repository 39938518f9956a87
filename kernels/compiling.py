"""Kernels compiled for a GPU that need not be there, and what the compiler made of them.

The launches of an operation on `meta` tensors are compiled instead, so that what is looked at is what would run.
Triton's driver is replaced in this process: use one of its own (`python -m accel.kernels.compiling`, a worker).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import launch

_WIDE = (
    r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|cp\.async\.cg\S* +\[[^\]]*\], \[[^\]]*\], 0x10"
)
_PRODUCTS = r"wgmma\.mma_async|mma\.sync"


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled.

    Attributes:
        kernel: its name.
        registers: of a thread.
        spilled: bytes of a thread in local memory.
        shared: bytes of a block in shared memory.
        wide_loads: loads of 128 bits in its PTX.
        products: tensor-core instructions in its PTX.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int
    wide_loads: int
    products: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Driver:
    """What Triton asks its driver while it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton remembers what it compiled by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiled_for(capability: int) -> Iterator[list[Any]]:
    """Launches inside are compiled for this compute capability (80, 90), and listed."""
    made: list[Any] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        kinds = [a.dtype if isinstance(a, Tensor) else a for a in args]
        made.append(kernel.warmup(*kinds, grid=grid, **meta))

    triton.runtime.driver.set_active(_Driver(capability))
    launch.instead = compile_only
    try:
        yield made
    finally:
        launch.instead = None


def compile_all(run: Callable[[], Any], capability: int) -> list[Compiled]:
    """What an operation on `meta` tensors launches, each kernel once."""
    with compiled_for(capability) as made:
        run()
    return [_resources(kernel) for kernel in {kernel.hash: kernel for kernel in made}.values()]


def _resources(kernel: Any) -> Compiled:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    use = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    assert use is not None, said
    ptx = kernel.asm["ptx"]
    return Compiled(
        kernel=kernel.metadata.name,
        registers=int(use[1]),
        spilled=int(use[2]) + int(use[4]),
        shared=kernel.metadata.shared,
        wide_loads=len(re.findall(_WIDE, ptx)),
        products=len(re.findall(_PRODUCTS, ptx)),
    )
