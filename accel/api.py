"""The one verb."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from typing import Any

from . import configs, methods
from .core import compiling
from .handle import Handle, make_room
from .pipelines import registry


def accelerate(
    pipe: Any,
    config: Any | str | PathLike | Mapping[str, Any] | None = None,
    *,
    replace: bool = False,
    compile: bool | str = False,
) -> Handle:
    """Make a pipeline faster, in place, until the handle is removed.

    Args:
        pipe: a diffusers pipeline of a known model family; for speculative decoding, an autoregressive pipeline.
        config: a configuration (`TokenMergingConfig(...)`), a preset name, a YAML file or a mapping. Default: the
            pipeline's `default_preset`, where it has one (the built-in distilled model's is "few-step"); else "balanced".
        replace: if this method is already attached to the model, replace it.
        compile: True: torch.compile of the model's repeated blocks (of all of it, where it names none), and on a GPU
            CUDA graphs of the calls that are bound by launches. "blocks", "whole" or "graphs": that alone; with a "+"
            both. Compiled and recorded in the first calls of each size, and undone by `remove()`; what cannot be runs
            as it is, and `stats.notes` says why.

    Returns:
        A `Handle` with `stats` and `remove()`; also a context manager.

    Raises:
        UnknownNameError: unknown preset or model class.
        ConfigError: a setting or `compile` is out of range, or does not go with another method on this model.
        UnsupportedError: this pipeline cannot be accelerated that way.
        AlreadyAcceleratedError: the method is attached already and `replace` is false.

    >>> handle = accel.accelerate(pipe, accel.TokenMergingConfig(ratio=0.5))    # doctest: +SKIP
    >>> image = pipe("a red circle left of a blue square").images[0]            # doctest: +SKIP
    >>> print(handle.stats)                                                     # doctest: +SKIP
    >>> handle.remove()                                                         # doctest: +SKIP
    """
    compiling.check(compile)
    if config is None:
        config = getattr(pipe, "default_preset", "balanced")
    if isinstance(config, (str, PathLike, Mapping)):
        config = configs.load(config)
    cls = methods.of(config)
    target, stats = cls.take_apart(pipe, registry.find), cls.Stats(cls.name)
    method = cls(target, config, stats)  # refuses what it cannot do, before an attached one makes room
    make_room(target, cls, replace=replace)
    with ExitStack() as stack:  # if attaching fails half-way, everything is undone
        method.attach(stack)
        if compile is not False:
            method.compile(compile, stack)
        method.handle = Handle(method, config, target, stats, stack.pop_all())
    return method.handle
