"""Keys and values in preallocated memory, each row written at its own places.

transformers' own static cache has one counter for the whole batch, which rows that advance at different paces
cannot share, and its dynamic one copies everything at every token. Here a forward says which places it writes;
going back is writing the same places again. A key is seen by the queries at its place and after it: a mask from
places alone, in which whatever was written further on counts as not there.

Shapes: R rows, S places, H heads, W tokens of a window, D per head, K = S places that a forward looks at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from accel.core.rounds import to_front


class PlacedCache(Cache):
    """The keys and values of all layers: 2 x layers x R x S x H x D numbers, linear in places.

    Attributes:
        rows, places: R and S.
    """

    def __init__(self, layers: int, rows: int, places: int) -> None:
        self.rows, self.places = rows, places
        self._layers = [_Layer(rows, places) for _ in range(layers)]
        super().__init__(layers=list(self._layers))

    @property
    def index(self) -> Tensor:
        """(R W,) where the next forward writes, in rows of the memory."""
        return self._layers[0].index

    def memory(self, layer: int, heads: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (R S, H, D) each, for a forward that writes to `index` itself."""
        own = self._layers[layer]
        if not own.is_initialized:
            states = like.new_empty(1, heads, 1, width)
            own.lazy_initialization(states, states)
        return own._keys.flatten(0, 1), own._values.flatten(0, 1)

    def only(self, index_R: Tensor) -> PlacedCache:
        """Some rows, in the memory of all."""
        part = PlacedCache(len(self._layers), len(index_R), self.places)
        for mine, own in zip(part._layers, self._layers, strict=True):
            if own.is_initialized:
                mine._keys, mine._values = to_front(own._keys, index_R), to_front(own._values, index_R)
                mine.is_initialized = True
        return part

    def aim(self, place_RW: Tensor, seen: int) -> Tensor:
        """Say where the next forward writes and how far it looks: places 0 ... `seen` - 1.

        Returns:
            (R, 1, W, seen) bool: which places each query sees.
        """
        first_R1 = torch.arange(0, self.rows * self.places, self.places, device=place_RW.device)[:, None]
        index = (place_RW + first_R1).flatten()
        for layer in self._layers:
            layer.index, layer.seen = index, seen
        return (torch.arange(seen, device=place_RW.device) <= place_RW[:, :, None])[:, None]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(layer.nbytes for layer in self._layers)


class _Layer(CacheLayerMixin):
    """One layer's. Memory is (R, S, H, D), so that a token's keys are one contiguous row to copy."""

    is_compileable = True
    is_sliding = False
    index: Tensor
    seen: int

    def __init__(self, rows: int, places: int) -> None:
        super().__init__()
        self.rows, self.places = rows, places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: what is not seen is multiplied by 0, which does not make a NaN vanish.
        for name, states in (("_keys", key_states), ("_values", value_states)):
            buffer = states.new_zeros(self.rows, self.places, states.shape[1], states.shape[3])
            setattr(self, name, buffer)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(R, H, W, D) new keys and values → (R, H, seen, D) to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self._keys, key_states), self._write(self._values, value_states)

    def _write(self, buffer_RSHD: Tensor, new_RHWD: Tensor) -> Tensor:
        buffer_RSHD.flatten(0, 1).index_copy_(0, self.index, new_RHWD.transpose(1, 2).flatten(0, 1))
        return buffer_RSHD[:, : self.seen].transpose(1, 2)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen, 0

    def get_seq_length(self) -> int:
        raise NotImplementedError(
            "rows have lengths of their own: pass position_ids and a 4-D attention mask"
        )

    def get_max_length(self) -> int:
        return self.places

    get_max_cache_shape = (
        get_max_length  # its name in transformers 5.0, which asks for it as an abstract method
    )
