"""Where tokens enter and leave a module, declared as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accel.errors import ConfigError

from .plan import TokenPlan


@dataclass(frozen=True)
class Side:
    """An input that travels along with the tokens and must follow the plan.

    Attributes:
        name: the argument's name in the module's `forward`.
        follow: (get, plan) -> the argument's value for the planned tokens; `get(name)` reads any argument of
            the call as the model passed it, None if it did not.
    """

    name: str
    follow: Callable[[Callable[[str], Any], TokenPlan], Any]


@dataclass(frozen=True)
class Site:
    """A module whose tokens can be reduced.

    Attributes:
        path: the module's path inside the denoiser, as in `get_submodule`.
        tokens: the name of the argument that holds the image tokens (B, N, C).
        image: where they are in it. "all" of it; or the "first" or the "last" N rows of one that holds text (and
            whatever else is never reduced), too.
        axis: of the tokens in it; 0: sequence first, (L, B, C).
        output: index of the image tokens in the output tuple; None when the output is that tensor.
        residual: the output contains the input (a whole block), so that the *change* is what is expanded.
        sides: the inputs that travel along.
        bias: how to add a bias per key (proportional attention); None when the module's attention takes none.
    """

    path: str
    tokens: str = "hidden_states"
    image: Literal["all", "first", "last"] = "all"
    axis: int = 1
    output: int | None = None
    residual: bool = True
    sides: tuple[Side, ...] = ()
    bias: Side | None = None

    def check(self, family: str, denoiser: nn.Module) -> None:
        """Whether the denoiser has this site.

        Raises:
            ConfigError: no module at the path, or it takes no argument of a name that is declared.
        """
        try:
            module = denoiser.get_submodule(self.path)
        except AttributeError as error:
            raise ConfigError(
                f"adapter {family!r} declares a site at {self.path!r}, which {type(denoiser).__name__} does not have"
            ) from error
        known = _arguments(module)
        for name in (self.tokens, *(side.name for side in (*self.sides, *filter(None, [self.bias])))):
            if name not in known:
                raise ConfigError(
                    f"adapter {family!r} declares the argument {name!r} of {self.path!r}, but "
                    f"{type(module).__name__}.forward takes {', '.join(known)}"
                )


Get = Callable[[str], Any]


def rows(
    name: str,
    *,
    image: Literal["all", "first", "last"] = "all",
    dims: tuple[int, ...] = (1,),
    item: int | str | None = None,
) -> Side:
    """An argument with a row per token (rotary tables of any kind, modulation, masks): text rows stay, of the image's
    those of the slots' own positions are taken.

    Args:
        name: of the argument; a tensor, or a tuple or list of tensors, each of which follows. None stays None.
        image: where the image's rows are, as in `Site`.
        dims: the dimensions that count tokens; both of a square mask.
        item: follow only this element of a tuple, or this key of a dict (which need not be there).
    """
    return Side(name, _Rows(name, image, dims, item))


@dataclass(frozen=True)
class _Rows:
    name: str
    image: str
    dims: tuple[int, ...]
    item: int | str | None

    def __call__(self, get: Get, plan: TokenPlan) -> Any:
        value = get(self.name)
        if isinstance(self.item, str):
            found = (value or {}).get(self.item)
            return value if found is None else {**value, self.item: self._follow(found, plan)}
        if self.item is not None and value is not None:
            new = self._follow(value[self.item], plan)
            return (*value[: self.item], new, *value[self.item + 1 :])
        return self._follow(value, plan)

    def _follow(self, value: Any, plan: TokenPlan) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._follow(one, plan) for one in value)
        if not isinstance(value, Tensor):
            return value
        for dim in self.dims:
            value = self._take(value, dim % value.ndim, plan)
        return value

    def _take(self, x: Tensor, dim: int, plan: TokenPlan) -> Tensor:
        if x.shape[dim] == 1:  # the same for all tokens
            return x
        others = x.shape[dim] - plan.tokens
        first = others if self.image == "last" else 0
        image = x.narrow(dim, first, plan.tokens)
        if plan.dst.shape[0] == 1 or dim == 0:  # one table for the batch goes with one plan for it
            image = image.index_select(dim, plan.dst[0])
        else:
            if image.shape[0] == 1:
                image = image.expand(plan.dst.shape[0], *image.shape[1:])
            index = plan.dst.view(-1, *(plan.slots if d == dim else 1 for d in range(1, x.ndim)))
            image = image.gather(
                dim, index.expand(*(s if d != dim else plan.slots for d, s in enumerate(image.shape)))
            )
        if not others:
            return image
        rest = x.narrow(dim, 0 if first else plan.tokens, others)
        rest = rest.expand(*(image.shape[d] if d != dim else others for d in range(x.ndim)))
        return torch.cat([rest, image] if first else [image, rest], dim)


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


class Port:
    """A `Site` bound to the signature of its module: reads and replaces arguments by name.

    The signature is resolved here, once: a model may pass an argument by position (PixArt's tokens) or by
    keyword (FLUX's), and hooks see whichever it was.
    """

    def __init__(self, site: Site, module: nn.Module, *, bias: bool = False) -> None:
        self.site = site
        self.position = {name: i for i, name in enumerate(_arguments(module))}
        assert site.bias is not None or not bias
        self.sides = site.sides + ((site.bias,) if bias and site.bias else ())

    def get(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name in kwargs:
            return kwargs[name]
        i = self.position[name]
        return args[i] if i < len(args) else None

    def put(self, name: str, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        i = self.position[name]
        if name not in kwargs and i < len(args):
            return (*args[:i], value, *args[i + 1 :]), kwargs
        return args, {**kwargs, name: value}

    def follow(self, plan: TokenPlan, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with every side input following the plan."""

        def get(name: str) -> Any:
            return self.get(name, args, kwargs)

        new_args, new_kwargs = args, kwargs
        for side in self.sides:
            new_args, new_kwargs = self.put(side.name, side.follow(get, plan), new_args, new_kwargs)
        return new_args, new_kwargs

    def split(self, x: Tensor, tokens: int) -> tuple[Tensor | None, Tensor]:
        """(the rows that are no image (B, T, C), or None; the `tokens` image rows (B, N, C))."""
        x_BLC = x if self.site.axis == 1 else x.transpose(0, 1)
        if self.site.image == "all":
            return None, x_BLC
        others = x_BLC.shape[1] - tokens
        if self.site.image == "last":
            return x_BLC[:, :others], x_BLC[:, others:]
        return x_BLC[:, tokens:], x_BLC[:, :tokens]

    def join(self, others: Tensor | None, image_BNC: Tensor) -> Tensor:
        """The inverse of `split`."""
        x_BLC = image_BNC
        if others is not None:
            parts = [others, image_BNC] if self.site.image == "last" else [image_BNC, others]
            x_BLC = torch.cat(parts, 1)
        return x_BLC if self.site.axis == 1 else x_BLC.transpose(0, 1)

    def read(self, output: Any) -> Tensor:
        return output if self.site.output is None else output[self.site.output]

    def write(self, output: Any, tokens: Tensor) -> Any:
        i = self.site.output
        return tokens if i is None else (*output[:i], tokens, *output[i + 1 :])
