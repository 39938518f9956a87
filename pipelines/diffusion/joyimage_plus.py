"""JoyImage-Edit Plus: patches of images of several sizes, padded to one length, so that a sample has several grids: only
the branches are declared."""

from accel.core.capability import Adapter, Branches

ADAPTER = Adapter(name="JoyImage-Edit Plus", branches=Branches(batched="second"))
