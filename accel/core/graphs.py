"""CUDA graphs of a denoiser's calls: recorded once for each kind of call, then replayed in place of its launches.

Small models and images are bound by the launches of their kernels, not by the kernels (FLUX.1's 57 blocks: 60 ms a
step on an H100, whatever the size). A graph is one launch. It reads and writes fixed places, so that what a call takes
(arguments, and what hooks find in the methods' state) is copied there, and what it makes is cloned from there.

A kind of call runs as it is at first, which lets libraries set themselves up, and is recorded when it comes again.
What cannot be recorded, because it waits for the device or changes shapes with what it finds, runs as it is from then on.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

#: Graphs kept at once; the one recorded first goes. They share their memory, so that what each adds is what it puts out.
LIMIT = 32
#: Kinds of calls that are remembered.
KINDS = 1000
#: A call is bound by its launches if the host takes this share of the device's time for it.
LAUNCH_BOUND = 0.7


class Held(NamedTuple):
    """What hooks read and write in a call, beside its arguments.

    Attributes:
        key: what tells kinds of calls apart, beside arguments and attributes.
        attributes: (object, name) of tensors, of what is made of tensors, and of plain values.
        fixed: tells tensors that are read and written where they are; if others take their place, calls are recorded
            anew, and run as they are once before that, so that no such place is one of a graph's.
    """

    key: tuple = ()
    attributes: tuple[tuple[Any, str], ...] = ()
    fixed: Callable[[], tuple[Tensor, ...]] = tuple

    @staticmethod
    def together(several: Sequence[Held]) -> Held:
        """Of several methods at work in one call."""
        return Held(
            tuple(held.key for held in several),
            tuple(attribute for held in several for attribute in held.attributes),
            lambda: tuple(tensor for held in several for tensor in held.fixed()),
        )


class Recorder(Protocol):
    """What records and times on a device."""

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(what replays the call, what it puts out, at the same places in every replay). Nothing has run yet."""

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float, float]:
        """(result, seconds of the host, seconds of the device)."""


class Cuda:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        # One pool for all: what a graph puts out is cloned before another one runs, so that they may overlap.
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[stream.device.index]
        random = generator.clone_state()
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                output = call()
        except BaseException:
            # One that is broken off leaves torch on the stream of the recording, and its random numbers in it: what
            # draws some, or saves their state as torch.compile does, would fail from then on.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(random)
            self._pool = torch.cuda.graph_pool_handle()  # whatever is left in that one
            raise
        return graph.replay, output

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        start.record()
        result = call()
        end.record()
        host = time.perf_counter() - began
        end.synchronize()
        return result, host, start.elapsed_time(end) / 1e3


@dataclass
class _Graph:
    """A recorded call.

    Attributes:
        inputs: the places of the tensors it takes.
        sources: what was copied there last, and its version then.
        output, after: what it returns, and what the attributes of `Held` are then, with tensors at fixed places.
    """

    replay: Callable[[], None]
    inputs: list[Tensor]
    sources: list[tuple[weakref.ref[Tensor], int]]
    output: Any
    after: list[Any]
    fixed: _Places


class Graphs:
    """The graphs of one denoiser.

    Attributes:
        refused: why kinds of calls are not recorded.

    Args:
        always: record every kind of call; else those that are bound by their launches.
    """

    def __init__(self, recorder: Recorder, *, always: bool = True) -> None:
        self._recorder, self._always = recorder, always
        self._graphs: dict[Any, _Graph] = {}
        self._came: dict[
            Any, tuple[int, _Places]
        ] = {}  # how often each kind has run as it is, on which places
        self._never: set[Any] = set()
        self.refused: list[str] = []
        self._modules: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def drop(self) -> None:
        """Forget all graphs and give their memory back."""
        for kept in (self._graphs, self._came, self._never, self.refused):
            kept.clear()

    def follow(self, modules: Sequence[nn.Module]) -> None:
        """A loop starts: what was recorded of modules that have changed since (a LoRA, weights in other places, hooks,
        settings) is forgotten."""
        now = [_print_of(part) for module in modules for part in module.modules()]
        if now != self._modules:
            self.drop()
            self._modules = now

    def __call__(self, call: Callable[..., Any], args: tuple, kwargs: dict, held: Held) -> Any:
        """What `call(*args, **kwargs)` returns, and what it does to `held`, which may be replayed."""
        if torch.is_grad_enabled():
            return call(*args, **kwargs)
        before = [getattr(owner, name) for owner, name in held.attributes]
        tensors: list[Tensor] = []
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled()
        kind = (held.key, modes, _form((args, kwargs, before), tensors))
        fixed = held.fixed()
        graph = self._graphs.get(kind)
        if graph is not None and _same(graph.fixed, fixed):
            return self._replay(graph, tensors, held)
        came, places = self._came.get(kind, (0, []))
        if kind in self._never or not came or not _same(places, fixed):
            return self._as_it_is(kind, 1, held, call(*args, **kwargs))
        if not self._always and came == 1:
            result, host, device = self._recorder.timed(partial(call, *args, **kwargs))
            if host < LAUNCH_BOUND * device:
                self._never.add(kind)
            return self._as_it_is(kind, 2, held, result)
        while len(self._graphs) >= LIMIT:
            del self._graphs[next(iter(self._graphs))]
        try:
            graph = self._graphs[kind] = self._record(call, (args, kwargs, before), tensors, held)
        except Exception as error:
            self._never.add(kind)
            self.refused.append(_reason(error))
            return call(*args, **kwargs)
        return self._replay(graph, tensors, held)

    def _as_it_is(self, kind: Any, came: int, held: Held, output: Any) -> Any:
        if len(self._came) > KINDS:  # an argument that is another number in every call
            self._came.clear()
        self._came[kind] = came, _places(held.fixed())
        return output

    def _record(self, call: Callable[..., Any], values: Any, tensors: list[Tensor], held: Held) -> _Graph:
        inputs = [tensor.detach().clone() for tensor in tensors]
        args, kwargs, placed = _with(values, iter(inputs))
        _put(held, placed)
        try:
            replay, output = self._recorder.record(partial(call, *args, **kwargs))
            after = [getattr(owner, name) for owner, name in held.attributes]
        finally:
            _put(held, values[2])
        sources = [(weakref.ref(tensor), -1) for tensor in tensors]
        return _Graph(replay, inputs, sources, output, after, _places(held.fixed()))

    def _replay(self, graph: _Graph, tensors: list[Tensor], held: Held) -> Any:
        for i, (place, tensor) in enumerate(zip(graph.inputs, tensors, strict=True)):
            source, version = graph.sources[i]
            now = -2 if tensor.is_inference() else tensor._version
            if source() is not tensor or version != now:
                place.copy_(tensor)
                graph.sources[i] = (weakref.ref(tensor), now if now >= 0 else -1)
        graph.replay()
        # What the call hands on as it got it is not cloned.
        given = {id(place): tensor for place, tensor in zip(graph.inputs, tensors, strict=True)}
        output, after = _cloned((graph.output, graph.after), given)
        _put(held, after)
        return output


def _put(held: Held, values: Sequence[Any]) -> None:
    for (owner, name), value in zip(held.attributes, values, strict=True):
        setattr(owner, name, value)


#: Tensors that are kept elsewhere: nothing here keeps their memory.
_Places = list[weakref.ref[Tensor]]


def _places(tensors: Sequence[Tensor]) -> _Places:
    return [weakref.ref(tensor) for tensor in tensors]


def _same(places: _Places, tensors: Sequence[Tensor]) -> bool:
    return len(places) == len(tensors) and all(a() is b for a, b in zip(places, tensors, strict=True))


# Values made of tensors: tuples, lists, dicts and dataclasses (plans, diffusers' outputs) of them.


def _form(value: Any, tensors: list[Tensor]) -> Any:
    """What tells values apart beside the numbers in their tensors, which are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return (Tensor, value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return (type(value), *(_form(one, tensors) for one in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return (type(value), *((name, _form(one, tensors)) for name, one in fields))
    if isinstance(value, dict):
        return (type(value), *((key, _form(one, tensors)) for key, one in value.items()))
    try:
        hash(value)
    except TypeError:  # not to be told apart but by being the same object
        return (type(value), _Same(value))
    return (type(value), value)


@dataclass(frozen=True)
class _Same:
    """Equal to that of the same object only, which it keeps."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors, in the order of `_form`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        ones = [_mapped(one, change) for one in value]
        return type(value)(*ones) if hasattr(value, "_fields") else type(value)(ones)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return dataclasses.replace(value, **{n: _mapped(getattr(value, n), change) for n in names})
    if isinstance(value, dict):
        return type(value)((key, _mapped(one, change)) for key, one in value.items())
    return value


def _with(values: Any, tensors: Iterator[Tensor]) -> Any:
    return _mapped(values, lambda _: next(tensors))


def _cloned(values: Any, given: dict[int, Tensor]) -> Any:
    return _mapped(values, lambda tensor: given[id(tensor)] if id(tensor) in given else tensor.clone())


#: What torch notes in every module and what does not change what it computes, and diffusers' list of hooks (each of
#: which shows in `forward`), made at the first call.
_PASSED = frozenset(vars(nn.Module())) - {
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
} | {"_diffusers_hook"}


def _print_of(module: nn.Module) -> list[Any]:
    """Changes when the module does other than it did: parts, weights in other places, hooks, settings."""
    found: list[Any] = []
    for name, value in vars(module).items():
        if name in _PASSED:
            continue
        if isinstance(value, dict):
            found += map(_mark, value.keys())
            found += map(_mark, value.values())
        else:
            found.append(_mark(value))
    return found


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _reason(error: BaseException) -> str:
    """Of an error in a recording: its first cause in one line, and the line of the model that brought it about."""
    while error.__context__ is not None:
        error = error.__context__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}{where}"
