"""What families share: predictions per token, grids, blocks by name. A family's file says which of these it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.core.keyvalues import Attention
from accel.core.site import Site
from accel.errors import UnsupportedError

Grid = tuple[int, int]


class Form(TypedDict):
    """How a prediction holds its tokens: the part of `Tokens` that is about predictions."""

    of: Callable[[nn.Module, Tensor, Grid], Tensor]
    put: Callable[[nn.Module, Tensor, Tensor, Grid], Tensor]
    spread: Callable[[nn.Module, Tensor, Grid], Tensor] | None


#: The prediction is (B, N, c) already, but for the tokens of reference images behind.
PACKED = Form(
    of=lambda denoiser, prediction, grid: prediction[:, : prod(grid)],
    put=lambda denoiser, prediction, x_BNc, grid: torch.cat([x_BNc, prediction[:, prod(grid) :]], 1),
    spread=lambda denoiser, x_BN, grid: x_BN[..., None],
)

#: The same behind tokens that are none of the image, in as many of its predictions as have them.
LAST = Form(
    of=lambda denoiser, prediction, grid: prediction[:, -prod(grid) :],
    put=lambda denoiser, prediction, x_BNc, grid: torch.cat([prediction[:, : -prod(grid)], x_BNc], 1),
    spread=None,
)


def patches(size: Callable[[Any], int], channels: Callable[[Any], int] | None = None) -> Form:
    """The prediction is (B, C, H, W), of which a token is a square patch; those at the last row and column may be cut.

    Args:
        size: denoiser -> side of a patch.
        channels: denoiser -> how many of the channels are the prediction (the others: a learned variance); None: all.
    """

    def of(denoiser: Any, prediction: Tensor, grid: Grid) -> Tensor:
        mean = prediction if channels is None else prediction[:, : channels(denoiser)]
        side, (height, width) = size(denoiser), mean.shape[2:]
        whole = F.pad(mean, (0, -width % side, 0, -height % side), mode="replicate")
        return F.pixel_unshuffle(whole, side).flatten(2).transpose(1, 2)

    def put(denoiser: Any, prediction: Tensor, x_BNc: Tensor, grid: Grid) -> Tensor:
        image = F.pixel_shuffle(x_BNc.transpose(1, 2).unflatten(2, grid), size(denoiser))
        image = image[..., : prediction.shape[2], : prediction.shape[3]]
        if channels is None:
            return image
        return torch.cat([image, prediction[:, channels(denoiser) :]], 1)

    def spread(denoiser: Any, x_BN: Tensor, grid: Grid) -> Tensor:
        x_B1hw = x_BN[:, : prod(grid)].unflatten(1, grid)[:, None]  # of references nothing is predicted
        side = size(denoiser)
        return x_B1hw.repeat_interleave(side, 2).repeat_interleave(side, 3)

    return Form(of=of, put=put, spread=spread)


def latent_grid(name: str, size: Callable[[Any], int]) -> dict[str, Any]:
    """`grid_source` and `grid` of a denoiser whose argument `name` is latents (B, C, H, W), of which a token is a
    square patch."""

    def grid(denoiser: Any, latents: Tensor) -> Grid:
        side = size(denoiser)
        return latents.shape[-2] // side, latents.shape[-1] // side

    return {"grid_source": lambda arguments: arguments[name], "grid": grid}


def blocks(denoiser: nn.Module, group: str, template: Site, inner: str = "") -> list[Site]:
    """A site for every block of a module list.

    Args:
        group: the list's path; one that the model has not is empty.
        template: the site, but for its path.
        inner: path of the block proper inside an element of the list.
    """
    found = None
    with suppress(AttributeError):
        found = denoiser.get_submodule(group)
    names = [] if found is None else [name for name, _ in found.named_children()]
    return [replace(template, path=".".join(filter(None, [group, name, inner]))) for name in names]


#: Where the attention processor makes the mask itself, of as many image columns as it gets queries.
PADDED = (
    "prompts of different lengths in one batch need a mask over keys, which keys_values='all' keeps for all tokens. "
    "Use keys_values='none', or one prompt a call."
)


def rotate_halves(x_BLHd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """The last rows, those of the image, rotated by a table whose pairs are the halves of d."""
    from diffusers.models.embeddings import apply_rotary_emb

    text = x_BLHd.shape[1] - len(table[0])
    image = apply_rotary_emb(x_BLHd[:, text:], table, sequence_dim=1, use_real_unbind_dim=-2)
    return torch.cat([x_BLHd[:, :text], image], 1)


def attentions_of(
    denoiser: nn.Module, group: str, rotate: Callable[[Tensor, Any], Tensor], **options: Any
) -> list[Attention]:
    """The self-attention `attn1` of every block of a module list, where one rotary table serves queries and keys.

    Args:
        rotate, options: as in `Attention`.
    """
    return [
        Attention(
            path=f"{group}.{name}.attn1",
            keys="norm_k",
            values="to_v",
            table="image_rotary_emb",
            rotated={"norm_q": "all", "norm_k": "all"},
            rotate=rotate,
            **options,
        )
        for name, _ in denoiser.get_submodule(group).named_children()
    ]


def refuse_arguments(*reasons: tuple[str, str]) -> Callable[[Mapping[str, Any], bool], None]:
    """Refuses calls with any of these arguments: (name, why)."""

    def refuse(arguments: Mapping[str, Any], span: bool) -> None:
        for name, why in reasons:
            if arguments.get(name) is not None:
                raise UnsupportedError(f"{name}: {why}")

    return refuse


def row_major(ids: Sequence[Sequence[int]] | Tensor, what: str) -> Grid:
    """(rows, columns) of tokens from their (row, column) ids (N, 2).

    Raises:
        UnsupportedError: they are not one row-major grid.
    """
    ids_N2 = torch.as_tensor(ids).cpu()
    row, column = (one.unique(return_inverse=True)[1] for one in ids_N2.T)  # any origin, any distance
    height, width = int(row[-1]) + 1, int(column[-1]) + 1
    index = torch.arange(len(ids_N2))
    whole = height * width == len(ids_N2) and width > 0
    if not (whole and torch.equal(row, index // width) and torch.equal(column, index % width)):
        raise UnsupportedError(
            f"the {len(ids_N2)} image tokens are not one row-major grid ({what}); token reduction needs one"
        )
    return height, width


def image_of(
    form: Form, image: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor | None], Tensor]
) -> Form:
    """A form for predictions of more dimensions, of which a part is the image.

    Args:
        form: of the image (B, C, H, W).
        image: prediction -> the image.
        back: (image, prediction or None) -> that prediction with this image in it; with None, the image in a shape
            that broadcasts to predictions.
    """

    spread = form["spread"]
    assert spread is not None

    def put(denoiser: Any, prediction: Tensor, x_BNc: Tensor, grid: Grid) -> Tensor:
        return back(form["put"](denoiser, image(prediction), x_BNc, grid), prediction)

    return Form(
        of=lambda denoiser, prediction, grid: form["of"](denoiser, image(prediction), grid),
        put=put,
        spread=lambda denoiser, x_BN, grid: back(spread(denoiser, x_BN, grid), None),
    )


def one_frame(frames: int) -> None:
    """Refuses video.

    Raises:
        UnsupportedError: more than one frame.
    """
    if frames != 1:
        raise UnsupportedError(f"{frames} frames: token reduction is for images, not for video")


def id_grid(name: str, what: str) -> dict[str, Any]:
    """`grid_source`, `grid` and `references` of a denoiser whose argument `name` holds an id per image token, (N, axes)
    or (B, N, axes): the first axis numbers the images, the image to make first; the second and third are row and column.

    Args:
        what: makes another order of them, for the message.
    """

    def first(ids: Tensor) -> Tensor:
        one = ids[0] if ids.ndim == 3 else ids
        others = (one[:, 0] != one[0, 0]).cpu()
        return one[: int(others.int().argmax())] if others.any() else one

    return {
        "grid_source": lambda arguments: arguments[name],
        "grid": lambda denoiser, ids: row_major(first(ids)[:, 1:3], what),
        "references": lambda denoiser, ids: ids.shape[-2] - len(first(ids)),
    }


def framed(form: Form, when: Callable[[Any], bool] = lambda denoiser: True) -> Form:
    """A form whose predictions have a dimension for frames, of which there is one: (B, C, 1, H, W).

    Args:
        when: denoiser -> whether it has that dimension.
    """

    def of(denoiser: Any, prediction: Tensor, grid: Grid) -> Tensor:
        return form["of"](denoiser, prediction.squeeze(2) if when(denoiser) else prediction, grid)

    def put(denoiser: Any, prediction: Tensor, x_BNc: Tensor, grid: Grid) -> Tensor:
        if not when(denoiser):
            return form["put"](denoiser, prediction, x_BNc, grid)
        return form["put"](denoiser, prediction.squeeze(2), x_BNc, grid).unsqueeze(2)

    of_image = form["spread"]
    assert of_image is not None

    def spread(denoiser: Any, x_BN: Tensor, grid: Grid) -> Tensor:
        values = of_image(denoiser, x_BN, grid)
        return values.unsqueeze(2) if when(denoiser) else values

    return Form(of=of, put=put, spread=spread)


def refuse_residuals(*names: str) -> Callable[[Mapping[str, Any], bool], None]:
    """Refuses ControlNet's residuals, the arguments `names`, where tokens stay reduced between blocks."""

    def refuse(arguments: Mapping[str, Any], span: bool) -> None:
        for name in names:
            if span and arguments.get(name) is not None:
                raise UnsupportedError(
                    f"{name}: ControlNet adds full-size residuals between blocks, where span scope has fewer "
                    "tokens. Use scope='block', or run without ControlNet."
                )

    return refuse


def refuse_inside(name: str, keys: Sequence[str]) -> Callable[[Mapping[str, Any], bool], None]:
    """Refuses calls whose argument `name`, a dict, has any of these keys: they say something about positions."""

    def refuse(arguments: Mapping[str, Any], span: bool) -> None:
        for key in keys:
            if key in (arguments.get(name) or {}):
                raise UnsupportedError(
                    f"{name}[{key!r}]: what it says about positions does not follow reduced tokens. Run without "
                    "it, or without acceleration."
                )

    return refuse


def refuse_each(
    *refusals: Callable[[Mapping[str, Any], bool], None],
) -> Callable[[Mapping[str, Any], bool], None]:
    """All of these."""

    def refuse(arguments: Mapping[str, Any], span: bool) -> None:
        for one in refusals:
            one(arguments, span)

    return refuse
