"""Keys and values of all tokens, kept from step to step, while only some tokens are computed.

The computed tokens then still attend to the whole image (CAT Pruning, arXiv:2502.00433, section 3.3). No
attention processor is copied: hooks on the modules that make keys and values write the new rows into the kept
tensors and return those. Where there is a rotary table, the hooks apply it, row by row, and the processor gets
none, so that every attention backend keeps working.

Shapes: B batch, L rows (text and computed image tokens, or one of them), K computed slots, N tokens, T text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError

from .around import compiled
from .plan import TokenPlan

#: The rotary table that belongs to some rows, in the family's own form.
Table = Any
#: Of a table (cos, sin) the first or the last rows; "all" of a table of any form; the element of a tuple of tables.
Rows = Literal["first", "last", "all"] | int


@dataclass(frozen=True)
class Attention:
    """A self-attention whose keys and values can be kept, as data.

    Attributes:
        path: the attention module's path inside the denoiser.
        keys, values: its submodules whose outputs are all keys and all values of the image tokens, (B, L, ...);
            there may be text in the same tensors.
        image: whether the image's rows come first or last in those.
        heads_first: what those submodules put out is (B, H, L, d); `rotate` is given it turned round.
        table: the argument that holds the rotary table; None without one.
        rotated: the submodules whose outputs the table applies to, and which part of it is theirs: the "first" or
            the "last" L rows of (cos, sin), (L, d) each; "all"; or an element of a tuple.
        rotate: (x (B, L, H, d), table rows) -> the rotated x, exactly as the attention processor does it.
        refused: arguments of the module with which its processor goes wrong on kept keys -> what to say.
        masks: sides of the block with a column per key: they stay as they are while all keys are kept.
    """

    path: str
    keys: str
    values: str
    table: str | None = None
    rotated: Mapping[str, Rows] = field(default_factory=dict)
    rotate: Callable[[Tensor, Table], Tensor] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    image: Literal["first", "last"] = "last"
    masks: tuple[str, ...] = ()
    heads_first: bool = False

    @property
    def kind(self) -> tuple:
        """Equal for attentions that differ in their path alone."""
        rotated = tuple(sorted((name, str(rows)) for name, rows in self.rotated.items()))
        refused = tuple(sorted(self.refused.items()))
        names = (self.keys, self.values, self.table, self.image, self.heads_first)
        return (*names, rotated, self.rotate, refused)

    @property
    def modules(self) -> frozenset[str]:
        """The submodules whose outputs are taken."""
        return frozenset({*self.rotated, self.keys, self.values})

    def check(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UnsupportedError: keys and values are made by one projection.
        """
        if getattr(denoiser.get_submodule(self.path), "fused_projections", False):
            raise UnsupportedError(
                f"{self.path} has fused projections. Call pipe.transformer.unfuse_qkv_projections() first, or use "
                "keys_values='none'."
            )


@dataclass
class _Rows:
    """What is kept of a submodule, for one of the calls of a step; None: nothing yet.

    Attributes:
        seen: the last call that stored has kept something here; fixed rows are there from one run to the next.
    """

    rows: Tensor | None = None
    seen: bool = False


#: Where a hook finds the `_Rows` of its submodule while a call runs. Hooks are shared by all layers: one that knew its
#: layer would be compiled once per layer.
_PLACE = "_accel_rows"


class KeyValues:
    """The kept keys and values of a denoiser.

    Attributes:
        plan: the tokens that are computed in this call; None: all.
        storing: keep what a call with all tokens computes.
        fixed: keep it where it was kept before, also in the runs after this one: CUDA graphs know the places.

    Args:
        ours: whether the running call of the denoiser is the followed loop's.
    """

    def __init__(self, ours: Callable[[], bool]) -> None:
        self.ours = ours
        self.layers, self.fixed = 0, False
        self._hooks = ExitStack()
        self._hooked: dict[str, nn.Module] = {}  # by path
        self._keeping: list[nn.Module] = []  # those whose outputs are keys or values
        self._calls: list[list[_Rows]] = []  # each call of a step (the branches of guidance) has its own
        self._running: list[_Rows] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but fixed places."""
        self.plan: TokenPlan | None = None
        self.storing = False
        self.leave()
        self.free()

    def fix(self, fixed: bool) -> None:
        self.fixed = fixed
        self.free()

    def free(self) -> None:
        """Give the memory back, unless the places are fixed."""
        if not self.fixed:
            self._calls, self._running = [], []

    @property
    def active(self) -> bool:
        # What is mostly false, and costs nothing to ask, first.
        return (self.storing or self.plan is not None) and self.ours()

    @property
    def kept(self) -> list[Tensor]:
        return [held.rows for call in self._calls for held in call if held.rows is not None]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.kept)

    def enter(self, call: int) -> None:
        """The call of this index within its step is about to run."""
        if not self.layers or not (self.storing or self.plan is not None):
            return
        while len(self._calls) <= call:
            self._calls.append([_Rows() for _ in self._keeping])
        self._running = self._calls[call]
        for part, held in zip(self._keeping, self._running, strict=True):
            if self.storing and not self.fixed:
                held.rows = None  # the memory is needed now
            if self.storing:
                held.seen = False
            vars(part)[_PLACE] = held  # past nn.Module.__setattr__, which takes longer

    def leave(self) -> None:
        """It is over."""
        self._table: Table = None
        # Not what another pipeline's call of the same denoiser is using now, in its own thread.
        for part, held in zip(self._keeping, self._running, strict=False):
            if vars(part).get(_PLACE) is held:
                del vars(part)[_PLACE]

    @property
    def running(self) -> tuple[Tensor, ...]:
        """What is kept for the running call."""
        rows = [held.rows for held in self._running] if self.storing or self.plan is not None else []
        return tuple(tensor for tensor in rows if tensor is not None)

    @property
    def passed(self) -> tuple[bool, ...]:
        """Which hooks have kept something in the running call that stores; set where it is replayed without them."""
        return tuple(held.seen for held in self._running) if self.storing else ()

    @passed.setter
    def passed(self, seen: tuple[bool, ...]) -> None:
        for held, one in zip(self._running, seen, strict=False):
            held.seen = one

    def clone(self) -> None:
        """What was stored in the last call must outlive it."""
        for held in self._running if self.storing else ():
            held.rows = None if held.rows is None else held.rows.clone()

    def check(self, calls: int) -> None:
        """After a step that stored in this many calls: every attention must have passed through the hooks.

        Raises:
            UnsupportedError: an attention processor that makes its keys or values another way.
        """
        for attention in self._attentions:
            processor = type(
                getattr(self._denoiser.get_submodule(attention.path), "processor", None)
            ).__name__
            if "PAG" in processor:  # makes keys and values twice a call, for parts of the batch
                raise UnsupportedError(
                    f"{attention.path} has a {processor}: perturbed-attention guidance makes keys and values of its "
                    "branches apart. Use keys_values='none', or pag_scale=0."
                )
        seen = sum(held.seen for call in self._calls[:calls] for held in call)
        if seen != 2 * self.layers * calls:
            raise UnsupportedError(
                f"keys and values of {seen} of {2 * self.layers * calls} projections were seen: a custom "
                "attention processor or fused projections. Use keys_values='none', or the default processors."
            )

    def attach(self, denoiser: nn.Module, attentions: list[Attention], stack: ExitStack) -> None:
        self.layers = len(attentions)
        self._denoiser, self._attentions = denoiser, attentions
        stack.callback(self._detach)
        self._hook()

    def follow(self) -> None:
        """A run starts: a LoRA that was loaded or taken out since has put other modules in the places of some."""
        if any(self._denoiser.get_submodule(path) is not module for path, module in self._hooked.items()):
            self._detach()
            self._hook()
            if any(compiled(module) for module in self._denoiser.modules()):
                torch.compiler.reset()

    def _detach(self) -> None:
        self.leave()
        self._hooks.close()
        self._hooked.clear()
        self._keeping.clear()

    def _hook(self) -> None:
        hooks: dict[tuple, Callable] = {}
        for attention in self._attentions:
            attention.check(self._denoiser)
            module = self._denoiser.get_submodule(attention.path)
            alike = (*attention.kind, type(module))
            if attention.table is not None:
                take = hooks.setdefault(alike, self._take_table(attention))
                self._hooks.callback(module.register_forward_pre_hook(take, with_kwargs=True).remove)
            for name in attention.modules:
                made, part = (
                    hooks.setdefault((*alike, name), self._made(attention, name)),
                    module.get_submodule(name),
                )
                self._hooks.callback(part.register_forward_hook(made).remove)
                self._hooked[f"{attention.path}.{name}"] = part
                if name in (attention.keys, attention.values):
                    self._keeping.append(part)

    # Inside the denoiser, possibly traced.

    def _take_table(self, attention: Attention) -> Callable:
        name, refused = attention.table, attention.refused
        assert name is not None

        def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.active:
                return None
            for argument, reason in refused.items():
                if kwargs.get(argument) is not None:
                    raise UnsupportedError(f"{argument} in {type(module).__name__}: {reason}")
            self._table = kwargs[name]
            return args, {**kwargs, name: None}

        return take

    def _made(self, attention: Attention, name: str) -> Callable:
        rows, rotate, image = attention.rotated.get(name), attention.rotate, attention.image
        keeps = name in (attention.keys, attention.values)
        turned = attention.heads_first and rows is not None

        def made(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not self.active:
                return None
            output = output.transpose(1, 2) if turned else output
            if rows is not None:
                assert rotate is not None
                output = rotate(output, _part(self._table, rows, output.shape[1]))
            if keeps:
                output = self._keep(getattr(module, _PLACE), output, image)
            return output.transpose(1, 2) if turned else output

        return made

    def _keep(self, held: _Rows, new_BL: Tensor, image: str) -> Tensor:
        plan = self.plan
        if plan is None:
            held.seen = True
            kept = held.rows
            if self.fixed and kept is not None and (kept.shape, kept.dtype) == (new_BL.shape, new_BL.dtype):
                kept.copy_(new_BL)
            else:
                held.rows = new_BL
            return new_BL
        kept_BL = held.rows
        assert kept_BL is not None
        text = new_BL.shape[1] - plan.slots
        if image == "first":
            kept_BL[:, plan.tokens :].copy_(new_BL[:, plan.slots :])
            plan.write(kept_BL[:, : plan.tokens], new_BL[:, : plan.slots])
            return kept_BL
        if text:
            kept_BL[:, :text].copy_(new_BL[:, :text])
        plan.write(kept_BL[:, text:], new_BL[:, text:])
        return kept_BL


def _part(table: Table, rows: Rows, L: int) -> Table:
    """What of a table belongs to the L rows of a submodule's output."""
    if rows == "all":
        return table
    if isinstance(rows, int):
        return table[rows]
    cos, sin = table
    part = slice(L) if rows == "first" else slice(cos.shape[0] - L, None)
    return cos[part], sin[part]
