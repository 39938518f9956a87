"""Stable Diffusion's U-Net (1.5, 2, XL): attention at several resolutions between convolutions, which take whole grids:
only the branches are declared."""

from accel.core.capability import Adapter, Branches

ADAPTER = Adapter(name="U-Net", branches=Branches(batched="second"))
