"""Where tokens enter and leave a module, declared as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
class Keys:
    """Where a module's attention makes the keys of its image tokens, for attentions that are given no mask.

    Attributes:
        paths: inside the module, of the parts whose output the keys are made of; of alternatives apart by "|" the first
            one that there is.
        first: the image's keys are the first that attention gets, not the last.
    """

    paths: tuple[str, ...]
    first: bool = False

    def parts(self, module: nn.Module) -> list[nn.Module]:
        """The parts of a module."""
        named = dict(module.named_modules())
        return [next(named[path] for path in paths.split("|") if path in named) for paths in self.paths]


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
        bias: how to add a bias per key (proportional attention) to what the module is given; None: it is given none.
        keys: where the keys are that carry the bias otherwise; None: not known.
        read_by: path of a later module that takes this one's output, too (a skip connection).
        valid: where samples are padded to one length, the name of the argument (B, L) that says which rows are not
            padding: the image is the last of those ("last"), at another place in every sample. If it is None in a
            call, there is no padding.
        stretch: between modules of another name something takes whole grids (convolutions), so that tokens stay
            reduced only from one module to the next of the same.
        scale: the side of its tokens, in tokens of the grid: 2 where the model works at half of the resolution.
        padded: between the blocks of a span the model cuts sequences at lengths that it took before: they keep their
            length there, with zeros in place of the image tokens that are not computed.
    """

    path: str
    tokens: str = "hidden_states"
    image: Literal["all", "first", "last"] = "all"
    axis: int = 1
    output: int | None = None
    residual: bool = True
    sides: tuple[Side, ...] = ()
    bias: Side | None = None
    keys: Keys | None = None
    read_by: str | None = None
    padded: bool = False
    valid: str | None = None
    stretch: str = ""
    scale: int = 1

    @property
    def weighs(self) -> bool:
        """Its attention can be told how many tokens a key stands for."""
        return self.bias is not None or self.keys is not None

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

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Of an image's grid, the (rows, columns) of the tokens here: halves are rounded up."""
        return -(-grid[0] // self.scale), -(-grid[1] // self.scale)


Get = Callable[[str], Any]


def rows(
    name: str,
    *,
    image: Literal["all", "first", "last"] = "all",
    dims: tuple[int, ...] = (1,),
    item: int | str | None = None,
    valid: str | None = None,
) -> Side:
    """An argument with a row per token (rotary tables of any kind, modulation, masks): text rows stay, of the image's
    those of the slots' own positions are taken.

    Args:
        name: of the argument; a tensor, or a tuple or list of tensors, each of which follows. None stays None.
        image: where the image's rows are, as in `Site`.
        dims: the dimensions that count tokens; both of a square mask.
        item: follow only this element of a tuple or of a dict, which need not have it.
        valid: as in `Site`.
    """
    return Side(name, _Rows(name, image, dims, item, valid))


def rotary(name: str, **options: Any) -> Side:
    """As `rows`, for a rotary table: where a slot stands at the centre of its tokens, its row is their mean, brought
    back to a rotation. Pairs of (cos, sin) tables, complex ones, 2x2 matrices in the last dimensions, and angles.
    """
    side = rows(name, **options)
    return Side(name, replace(side.follow, rotary=True))  # type: ignore[type-var]


def padding_first(valid_BL: Tensor, tokens: int) -> Tensor:
    """Where the rows of samples [text, image, padding] are in the order [text, padding, image], (B, L)."""
    first_B1 = valid_BL.sum(1, keepdim=True) - tokens
    others = torch.arange(valid_BL.shape[1] - tokens, device=valid_BL.device)
    image = torch.arange(tokens, device=valid_BL.device)
    return torch.cat([others + tokens * (others >= first_B1), first_B1 + image], 1)


def _gather(x: Tensor, index_BL: Tensor, dim: int) -> Tensor:
    """Rows of a tensor whose first dimension is the batch."""
    x = x.expand(index_BL.shape[0], *x.shape[1:])
    index = index_BL.view(-1, *(index_BL.shape[1] if d == dim else 1 for d in range(1, x.ndim)))
    return x.gather(dim, index.expand(*(s if d != dim else index_BL.shape[1] for d, s in enumerate(x.shape))))


@dataclass(frozen=True)
class _Rows:
    name: str
    image: str
    dims: tuple[int, ...]
    item: int | str | None
    valid: str | None = None
    rotary: bool = False

    def __call__(self, get: Get, plan: TokenPlan) -> Any:
        value = get(self.name)
        valid_BL = None if self.valid is None else get(self.valid)
        if valid_BL is not None and value is not None:
            order_BL = padding_first(valid_BL, plan.tokens)
            for dim in self.dims:
                value = _gather(value, order_BL, dim % value.ndim)
        if isinstance(self.item, str):
            inner = (value or {}).get(self.item)
            return value if inner is None else {**value, self.item: self._follow(inner, plan)}
        if self.item is not None and value is not None:
            new = self._follow(value[self.item], plan)
            return (*value[: self.item], new, *value[self.item + 1 :])
        return self._follow(value, plan)

    def _follow(self, value: Any, plan: TokenPlan) -> Any:
        if isinstance(value, (tuple, list)):
            if self.rotary and plan.centroid and len(value) == 2 and _alike(*value):
                return tuple(self._centroids(value, plan))
            return type(value)(self._follow(one, plan) for one in value)
        if not isinstance(value, Tensor):
            return value
        if self.rotary and plan.centroid:
            return self._centroids([value], plan)[0]
        for dim in self.dims:
            value = self._take(value, dim % value.ndim, plan)
        return value

    def _take(self, x: Tensor, dim: int, plan: TokenPlan) -> Tensor:
        if x.shape[dim] == 1:  # the same for all tokens
            return x
        image, rest = self._apart(x, dim, plan)
        if plan.dst.shape[0] == 1 or dim == 0:  # one table for the batch goes with one plan for it
            return self._together(image.index_select(dim, plan.dst[0]), rest, dim)
        return self._together(_gather(image, plan.dst, dim), rest, dim)

    def _centroids(self, tables: Sequence[Tensor], plan: TokenPlan) -> list[Tensor]:
        """Of one table, or of a pair (cos, sin)."""
        (dim,) = (d % tables[0].ndim for d in self.dims)
        apart = [self._apart(table, dim, plan) for table in tables]
        images = _rotations([_mean(image, dim, plan) for image, _ in apart])
        return [self._together(image, rest, dim) for image, (_, rest) in zip(images, apart, strict=True)]

    def _apart(self, x: Tensor, dim: int, plan: TokenPlan) -> tuple[Tensor, Tensor]:
        """(the image's rows, the others)"""
        others = x.shape[dim] - plan.tokens
        first = others if self.image == "last" else 0
        return x.narrow(dim, first, plan.tokens), x.narrow(dim, 0 if first else plan.tokens, others)

    def _together(self, image: Tensor, rest: Tensor, dim: int) -> Tensor:
        others = rest.shape[dim]
        if not others:
            return image
        rest = rest.expand(*(image.shape[d] if d != dim else others for d in range(image.ndim)))
        return torch.cat([rest, image] if self.image == "last" else [image, rest], dim)


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape


def _mean(table: Tensor, dim: int, plan: TokenPlan) -> Tensor:
    """The mean row of each slot's tokens."""
    real = torch.view_as_real(table) if table.is_complex() else table
    rows = real.movedim(dim, 1) if dim else real[None]  # one table for the batch goes with one plan for it
    rows = rows.expand(max(rows.shape[0], plan.owner.shape[0]), *rows.shape[1:])
    mean = plan.reduce(rows.flatten(2)).unflatten(2, rows.shape[2:])
    mean = mean.movedim(1, dim) if dim else mean[0]
    return torch.view_as_complex(mean.contiguous()) if table.is_complex() else mean


def _rotations(means: list[Tensor]) -> list[Tensor]:
    """Means of rotations brought back to length 1; the mean of angles is one already."""
    if len(means) == 2:
        length = torch.hypot(*means)
        return [mean / length for mean in means]
    (mean,) = means
    if mean.is_complex():
        return [mean / mean.abs()]
    if mean.shape[-2:] == (2, 2):
        length = torch.hypot(mean[..., 0, 0], mean[..., 1, 0])
        return [mean / length[..., None, None]]
    return [mean]


#: Side input -> (the plan it followed; what it was made of, by name; what it became).
Made = dict[Side, tuple[TokenPlan, list[tuple[str, Any]], Any]]


def _once(side: Side, get: Get, plan: TokenPlan, made: Made | None) -> Any:
    if made is None:
        return side.follow(get, plan)
    if side in made:
        known, read, value = made[side]
        if known is plan and all(get(name) is one for name, one in read):
            return value
    read = []

    def noted(name: str) -> Any:
        read.append((name, get(name)))
        return read[-1][1]

    made[side] = plan, read, side.follow(noted, plan)
    return made[side][2]


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
        assert site.weighs or not bias
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

    def follow(
        self, plan: TokenPlan, args: tuple, kwargs: dict, made: Made | None = None
    ) -> tuple[tuple, dict]:
        """The arguments with every side input following the plan.

        Args:
            made: before, in this call: what modules share (rotary tables) follows a plan once, not once for each.
        """

        def get(name: str) -> Any:
            return self.get(name, args, kwargs)

        new_args, new_kwargs = args, kwargs
        for side in self.sides:
            new_args, new_kwargs = self.put(side.name, _once(side, get, plan, made), new_args, new_kwargs)
        return new_args, new_kwargs

    def order(self, tokens: int, args: tuple, kwargs: dict) -> Tensor | None:
        """Of padded samples, where the rows of a sequence with the image at its end are in the model's, (B, L)."""
        valid_BL = None if self.site.valid is None else self.get(self.site.valid, args, kwargs)
        return None if valid_BL is None else padding_first(valid_BL, tokens)

    def split(self, x: Tensor, tokens: int, order_BL: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """(the rows that are no image (B, T, C), or None; the `tokens` image rows (B, N, C)).

        Args:
            order_BL: of a sequence as the model has it; None: the image is where the site says.
        """
        x_BLC = x if self.site.axis == 1 else x.transpose(0, 1)
        if order_BL is not None:
            x_BLC = _gather(x_BLC, order_BL, 1)
        if self.site.image == "all":
            return None, x_BLC
        others = x_BLC.shape[1] - tokens
        if self.site.image == "last":
            return x_BLC[:, :others], x_BLC[:, others:]
        return x_BLC[:, tokens:], x_BLC[:, :tokens]

    def join(self, others: Tensor | None, image_BNC: Tensor, order_BL: Tensor | None = None) -> Tensor:
        """The inverse of `split`."""
        x_BLC = image_BNC
        if others is not None:
            parts = [others, image_BNC] if self.site.image == "last" else [image_BNC, others]
            x_BLC = torch.cat(parts, 1)
        if order_BL is not None:
            x_BLC = _gather(x_BLC, order_BL.argsort(1), 1)
        return x_BLC if self.site.axis == 1 else x_BLC.transpose(0, 1)

    def read(self, output: Any) -> Tensor:
        return output if self.site.output is None else output[self.site.output]

    def write(self, output: Any, tokens: Tensor) -> Any:
        i = self.site.output
        return tokens if i is None else (*output[:i], tokens, *output[i + 1 :])
