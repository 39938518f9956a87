"""Stable Cascade's U-Nets: convolutions, which take whole grids: only the branches are declared. Its own scheduler adds
fresh noise at every step, which forecasts refuse."""

from accel.core.capability import Adapter, Branches

ADAPTER = Adapter(name="Stable Cascade", branches=Branches(batched="first"))
