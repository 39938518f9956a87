"""FLUX: dual-stream, then single-stream blocks; text and image tokens come in and go out separately.

All blocks share one rotary table, text rows first, broadcast over the batch: so one plan for the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from accel.core.capability import Adapter, Branches, Tokens
from accel.core.keyvalues import Attention, Rows
from accel.core.site import Site, rotary
from accel.errors import UnsupportedError

from .common import PACKED, blocks, id_grid
from .key_bias import key_bias


def _sites(denoiser: nn.Module) -> list[Site]:
    site = Site(
        "",
        output=1,
        sides=(rotary("image_rotary_emb", image="last", dims=(0,)),),
        bias=key_bias("joint_attention_kwargs", key="attention_mask", table="image_rotary_emb", image="last"),
    )
    return [
        *blocks(denoiser, "transformer_blocks", site),
        *blocks(denoiser, "single_transformer_blocks", site),
    ]


def rotate(x_BLHd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x_BLHd, table, sequence_dim=1)  # what FLUX's attention processors call


#: The processor of diffusers' IP-Adapter attends to the adapter's tokens with what `norm_q` gives, before it applies
#: the rotary table; the hooks have applied it by then, also at dense steps.
_IP_ADAPTER = (
    "an IP-Adapter needs queries before the rotary embedding, and keys_values='all' keeps those after it. Use "
    "keys_values='none', or run without the adapter (pipe.unload_ip_adapter())."
)


def _attentions(denoiser: nn.Module) -> list[Attention]:
    # Dual-stream blocks normalise text and image apart and put the text first; single-stream ones get both in
    # one, in that order.
    dual: dict[str, Rows] = {
        "norm_q": "last",
        "norm_k": "last",
        "norm_added_q": "first",
        "norm_added_k": "first",
    }
    single: dict[str, Rows] = {"norm_q": "last", "norm_k": "last"}
    groups = {"transformer_blocks": dual, "single_transformer_blocks": single}
    return [
        Attention(
            path=f"{group}.{name}.attn",
            keys="norm_k",
            values="to_v",
            table="image_rotary_emb",
            rotated=rotated,
            rotate=rotate,
            refused={"ip_hidden_states": _IP_ADAPTER},
        )
        for group, rotated in groups.items()
        for name, _ in denoiser.get_submodule(group).named_children()
    ]


def _refuse(arguments: Mapping[str, Any], span: bool) -> None:
    if "ip_adapter_masks" in (arguments.get("joint_attention_kwargs") or {}):
        raise UnsupportedError(
            "joint_attention_kwargs['ip_adapter_masks']: masks over the image do not follow reduced tokens. "
            "Run without the masks, or without acceleration."
        )
    controlled = [
        name
        for name in ("controlnet_block_samples", "controlnet_single_block_samples")
        if arguments.get(name) is not None
    ]
    if span and controlled:
        raise UnsupportedError(
            f"{controlled[0]}: ControlNet adds full-size residuals between blocks, where span scope has "
            "fewer tokens. Use scope='block', or run without ControlNet."
        )


ADAPTER = Adapter(
    name="FLUX",
    branches=Branches(calls="first"),
    tokens=Tokens(
        sites=_sites,
        **id_grid("img_ids", "custom img_ids"),
        **PACKED,
        shared_plan=True,
        refuse=_refuse,
    ),
    attentions=_attentions,
)
