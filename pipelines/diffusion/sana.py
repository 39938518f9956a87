"""Sana: every feed-forward is a 3x3 convolution over the whole grid, so that no token can be left out of a block, and
attention alone is linear and small: only the branches are declared."""

from accel.core.capability import Adapter, Branches

ADAPTER = Adapter(name="Sana", branches=Branches(batched="second"))
