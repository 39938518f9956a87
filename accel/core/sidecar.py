"""Side-cars: low-rank changes of a model's weights in one small safetensors file, with a check that they fit.

A linear layer's weight W becomes W + B A (LoRA, Hu et al. 2021, arXiv:2106.09685, with its scale inside B). The file's
tensors are `PATH.A` (r, in) and `PATH.B` (out, r) for layers by their path, and `PATH.bias` (out,) for what is added to
a bias; A and B in bfloat16, or in int8 with the value of a unit in each row, `PATH.A.unit` (r, 1). Its metadata name its
`kind` and the fingerprints of the models that it fits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from accel.errors import WeightsError

#: How many values of each parameter a fingerprint reads.
_READ = 16
#: Ends the name of the units of a tensor in int8.
_UNIT = ".unit"


@dataclass(frozen=True)
class SideCar:
    """What a file holds.

    Attributes:
        path: where it came from, for messages.
        kind: what it is for, e.g. "textured" or "chunking".
        fits: fingerprints of the models it was trained for.
        layers: path of a linear layer -> (A (r, in), B (out, r)), float32.
        biases: path of a linear layer -> what is added to its bias, float32.
        extra: the file's other tensors, by name.
        metadata: all that it says of itself, by name.
    """

    path: Path
    kind: str
    fits: frozenset[str]
    layers: Mapping[str, tuple[Tensor, Tensor]]
    biases: Mapping[str, Tensor]
    extra: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            WeightsError: it was trained for another model, or has layers that this one has not.
        """
        name = type(model).__name__
        if fingerprint(model) not in self.fits:
            raise WeightsError(
                f"{self.path}: was trained for another model than this {name}. Use the side-car of this model, or none"
            )
        modules = dict(model.named_modules())
        for path, (a, b) in self.layers.items():
            layer = modules.get(path)
            if not isinstance(layer, nn.Linear) or layer.weight.shape != (b.shape[0], a.shape[1]):
                raise WeightsError(
                    f"{self.path}: {path} is no {b.shape[0]}x{a.shape[1]} linear layer of this {name}"
                )

    def merge(self, model: nn.Module) -> None:
        """Add the changes to the model's own weights, for good. See `check` for errors.

        The sums are rounded to bfloat16 whatever the model's precision, so that its fingerprint, by which further
        side-cars know it, is the same in all.
        """
        self.check(model)
        with torch.no_grad():
            for path, (a, b) in self.layers.items():
                weight = model.get_parameter(f"{path}.weight")
                change = (b.double() @ a.double()).float()  # whatever a machine makes of float32
                weight.copy_((weight.float() + change.to(weight.device)).bfloat16())
            for path, added in self.biases.items():
                bias = model.get_parameter(f"{path}.bias")
                bias.copy_((bias.float() + added.to(bias.device)).bfloat16())


def fingerprint(model: nn.Module) -> str:
    """What a model is, whatever its device and precision: a hash of its parameters' names, shapes and first values.

    Values are compared in bfloat16, which float32 and float16 copies of bfloat16 weights round back to.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()[:_READ].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def read(path: str | Path, kind: str) -> SideCar:
    """
    Raises:
        WeightsError: the file is missing, no safetensors file, or not a side-car of this kind.
    """
    from safetensors import safe_open

    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        what = "no such file" if not path.exists() else "not a .safetensors file; nothing else is read"
        raise WeightsError(f"{path}: {what}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # its own class, in some versions an OSError
        raise WeightsError(
            f"{path}: cannot be read as safetensors: {error}. Download or make it again"
        ) from error
    if metadata.get("kind") != kind:
        raise WeightsError(f"{path}: not a side-car for {kind} (it says {metadata.get('kind')!r})")
    layers, biases = {}, {}
    for name in [n for n in tensors if n.endswith(_UNIT)]:
        rounded = name.removesuffix(_UNIT)
        if rounded not in tensors:
            raise WeightsError(f"{path}: {name} without {rounded}. Download or make it again")
        unit = tensors.pop(name)
        if unit.shape != (len(tensors[rounded]), 1):
            raise WeightsError(f"{path}: {name} is not one number a row. Download or make it again")
        tensors[rounded] = tensors[rounded].float() * unit
    for name in [n for n in tensors if n.endswith(".A")]:
        layer = name.removesuffix(".A")
        if f"{layer}.B" not in tensors:
            raise WeightsError(f"{path}: {name} without {layer}.B. Download or make it again")
        a, b = tensors.pop(name), tensors.pop(f"{layer}.B")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise WeightsError(
                f"{path}: {layer} is in whole numbers without their unit. Download or make it again"
            )
        layers[layer] = (a.float(), b.float())
    for name in [n for n in tensors if n.endswith(".bias")]:
        biases[name.removesuffix(".bias")] = tensors.pop(name).float()
    fits = frozenset(metadata.get("fits", "").split())
    return SideCar(path, kind, fits, layers, biases, tensors, metadata)


def write(
    path: Path,
    kind: str,
    fits: list[str],
    tensors: Mapping[str, Tensor],
    *,
    int8: bool = False,
    **metadata: str,
) -> int:
    """Write a side-car at once (never half a file), in bfloat16; returns its size in bytes.

    Args:
        int8: the layers' A and B in int8, row by row: half the size, or twice the rank.
    """
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    saved = {
        name: (t.detach().to("cpu", torch.bfloat16) if t.is_floating_point() else t.cpu()).contiguous()
        for name, t in tensors.items()
    }
    if int8:
        for name in [n for n in saved if n.endswith((".A", ".B"))]:
            exact = tensors[name].detach().float().cpu()
            unit = exact.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            saved[name], saved[name + _UNIT] = (exact / unit).round().to(torch.int8).contiguous(), unit
    save_file(saved, part, {"kind": kind, "fits": " ".join(fits), **metadata})
    part.replace(path)
    return path.stat().st_size
