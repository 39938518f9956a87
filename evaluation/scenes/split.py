"""Which combinations are kept out of training, so that a score on them measures composition.

Rules on indices, not a list: stable across versions, nothing to ship, and every shape, colour, number
and relation still occurs in training in other company. Single objects cannot be held out (there are
eight of them, and the model must have seen each); their test prompts differ from training in the seed.
"""

from __future__ import annotations


def is_held_out_pair(color: int, shape: int) -> bool:
    """Colour with shape: one colour of ten for every shape."""
    return (3 * color + 7 * shape) % 10 == 0


def is_held_out_company(first: int, second: int) -> bool:
    """Two shapes in one image, in either order: 4 of the 28 pairs."""
    return (3 * min(first, second) + 5 * max(first, second)) % 7 == 0


def is_held_out_count(shape: int, count: int) -> bool:
    """A number of one shape: 8 of the 24."""
    return count > 1 and (shape + count) % 3 == 0


def is_held_out_relation(shape: int, other: int, relation: int) -> bool:
    """`shape` in `relation` to `other`: a sixth, and every pair that is held out as company."""
    return is_held_out_company(shape, other) or (shape + 2 * other + 3 * relation) % 6 == 0


def is_held_out_binding(color: int, shape: int, other_color: int, other: int) -> bool:
    """Two coloured shapes: an eighth, and whatever contains a held-out pair."""
    return (
        is_held_out_company(shape, other)
        or is_held_out_pair(color, shape)
        or is_held_out_pair(other_color, other)
        or (color + 3 * shape + 5 * other_color + 7 * other) % 8 == 0
    )
