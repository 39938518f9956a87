"""Where tokens enter and leave a module, declared as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        tokens: the name of the argument that holds the image tokens (B, N, C). Image only: text tokens are
            never reduced, so a module that takes both in one tensor needs two sites or an own adapter.
        output: index of the image tokens in the output tuple; None when the output is that tensor.
        residual: the output contains the input (a whole block), so that the *change* is what is expanded.
        sides: the inputs that travel along.
        bias: how to add a bias per key (proportional attention); None when the module's attention takes none.
    """

    path: str
    tokens: str = "hidden_states"
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

    def read(self, output: Any) -> Tensor:
        return output if self.site.output is None else output[self.site.output]

    def write(self, output: Any, tokens: Tensor) -> Any:
        i = self.site.output
        return tokens if i is None else (*output[:i], tokens, *output[i + 1 :])
