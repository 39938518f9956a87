"""What a model family has and what a method needs, declared; one check compares.

A family is one `Adapter` in a small file of its own (`accel.pipelines.diffusion`). What it does not declare it does
not have; a denoiser nobody has described has its prediction, which is all that forecasts need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from accel.errors import ConfigError, UnsupportedError

from .keyvalues import Attention
from .site import Site

#: What there is to have, and what of an adapter declares it.
CAPABILITIES = {
    "prediction": "a prediction that can be read and written",
    "tokens": "where its image tokens are (Adapter.tokens)",
    "span": "tokens that can stay reduced from the first block to the last (not Tokens.convolutional)",
    "keys and values": "where its attentions make keys and values (Adapter.attentions)",
    "key bias": "how its attentions take a bias per key (Site.bias, Site.keys)",
    "tokens alone": "predictions of image tokens and nothing in front of them (Tokens.spread)",
    "branches": "how its calls run the branches of guidance (Adapter.branches)",
}


@dataclass(frozen=True)
class Branches:
    """How a family's pipelines run classifier-free guidance.

    Attributes:
        batched: of a call with both branches in one batch, the half that is the conditional one; None: they make
            a call for each, or it is not known.
        calls: of two calls a step, the conditional one; None: they make one call, or it is not known. Where it is
            known, calls may come and go during a run (guidance over a part of the steps).
        layers: arguments with a value for each layer first, a list or a dimension: the batch is inside of those.
    """

    batched: Literal["first", "second"] | None = None
    calls: Literal["first"] | None = None
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Where a denoiser's image tokens are.

    Attributes:
        sites: denoiser -> its blocks in the order in which they run.
        grid_source: the denoiser's arguments, by name -> what the token grid can be told from.
        grid: (denoiser, that) -> (rows, columns) of the image tokens in their order. Called once per run, outside
            of compiled code; may wait for the device.
        references: (denoiser, the same) -> how many tokens of reference images follow the image's in the same rows
            (editing models): what is predicted for them is thrown away.
        of: (denoiser, prediction, grid) -> the prediction per token (B, N, c), in the tokens' order.
        put: (denoiser, prediction, tokens (B, N, c), grid) -> the prediction with these tokens in it, the inverse
            of `of`.
        spread: (denoiser, values per token (B, N), grid) -> the same values, broadcasting to a prediction; None: there
            are others in front of the tokens in some predictions, of which they say nothing.
        shared_plan: the model can only follow one plan for the whole batch.
        convolutional: between stacks of blocks (`Site.stretch`) there are convolutions, which see every token.
        refuse: called with (denoiser's arguments by name, True if tokens stay reduced between blocks); raises
            `UnsupportedError` for what cannot work.
    """

    sites: Callable[[nn.Module], Sequence[Site]]
    grid_source: Callable[[Mapping[str, Any]], Any]
    grid: Callable[[nn.Module, Any], tuple[int, int]]
    of: Callable[[nn.Module, Tensor, tuple[int, int]], Tensor]
    put: Callable[[nn.Module, Tensor, Tensor, tuple[int, int]], Tensor]
    spread: Callable[[nn.Module, Tensor, tuple[int, int]], Tensor] | None
    shared_plan: bool
    refuse: Callable[[Mapping[str, Any], bool], None] = lambda arguments, span: None
    convolutional: bool = False
    references: Callable[[nn.Module, Any], int] = lambda denoiser, source: 0


@dataclass(frozen=True)
class Adapter:
    """The whole knowledge about one model family.

    Attributes:
        name: for messages.
        branches: how guidance runs.
        tokens: where the image tokens are; None: not described.
        attentions: denoiser -> the self-attentions whose keys and values can be kept, in any order; None: the
            model's attention cannot be hooked that way.
    """

    name: str
    branches: Branches = Branches()
    tokens: Tokens | None = None
    attentions: Callable[[nn.Module], Sequence[Attention]] | None = None

    def has(self, denoiser: nn.Module) -> frozenset[str]:
        """Keys of `CAPABILITIES`."""
        found = {"prediction"}
        sites = self.tokens.sites(denoiser) if self.tokens else ()
        if self.tokens and sites:
            found.add("tokens")
            if not self.tokens.convolutional:
                found.add("span")
            if self.tokens.spread is not None:
                found.add("tokens alone")
            if all(site.weighs for site in sites):
                found.add("key bias")
        if self.attentions is not None:
            found.add("keys and values")
        if self.branches != Branches():
            found.add("branches")
        return frozenset(found)

    def check(self, denoiser: nn.Module) -> None:
        """Whether the denoiser has what is declared: modules at their paths, arguments of these names.

        Raises:
            ConfigError: an adapter that describes another model; names the path or the argument.
        """
        for site in self.tokens.sites(denoiser) if self.tokens else ():
            site.check(self.name, denoiser)
        for attention in self.attentions(denoiser) if self.attentions else ():
            for path in (attention.path, *(f"{attention.path}.{n}" for n in attention.modules)):
                if not _has(denoiser, path):
                    raise ConfigError(
                        f"adapter {self.name!r} declares an attention at {path!r}, which {type(denoiser).__name__} "
                        f"does not have. Give Attention the path of a module."
                    )


def require(method: str, needs: Iterable[str], adapter: Adapter, denoiser: nn.Module) -> None:
    """Refuse a method whose needs a denoiser's adapter does not declare.

    Args:
        needs: keys of `CAPABILITIES`.

    Raises:
        UnsupportedError: names the missing pieces, and what to do.
    """
    missing = [need for need in needs if need not in adapter.has(denoiser)]
    if missing:
        what = "; ".join(f"{need}: {CAPABILITIES[need]}" for need in missing)
        raise UnsupportedError(
            f"{method} needs what is not known of {type(denoiser).__name__} ({what}). Forecasts need the prediction "
            "only: the presets quality, balanced, fast and draft work here. To describe the model, see "
            "accel/pipelines/diffusion/pixart.py, a complete example, and accel.pipelines.registry.register."
        )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


#: Attributes of diffusers pipelines that hold what is called at every step; the second list beside the first
#: (Ideogram 4 has its unconditional branch in a module of its own).
_DENOISERS = ("transformer", "unet", "decoder", "prior")  # what costs most first, where there are several
_BESIDE = ("unconditional_transformer",)
#: Those that hold the scheduler of that loop.
_SCHEDULERS = ("scheduler", "decoder_scheduler")


#: Pipelines that need more of the denoiser than its prediction, and what that is.
_GRADIENTS = "calls the denoiser for gradients too, of attention maps that a forecast does not have"
_READS = {
    "CycleDiffusionPipeline": "reads each step's noise back from what the denoiser predicts for the source picture",
    "StableDiffusionAttendAndExcitePipeline": _GRADIENTS,
    "StableDiffusionParadigmsPipeline": "computes a window of steps in one call, over and over until they agree: there is "
    "no step to leave out",
    "StableDiffusionPix2PixZeroPipeline": _GRADIENTS,
    "UniDiffuserPipeline": "takes three predictions from a call (a picture, its embedding, a text), and more than one counts",
    "StableDiffusionSAGPipeline": "reads attention maps out of the denoiser at every step, for all of its tokens",
}


def scheduler_of(pipe: Any) -> Any:
    """Whose steps the denoiser's loop takes; None: there is no scheduler."""
    # Not `a or b`: a scheduler may have a length.
    return next((s for name in _SCHEDULERS if (s := getattr(pipe, name, None)) is not None), None)


def denoisers_of(pipe: Any) -> list[tuple[nn.Module, nn.Module]]:
    """The modules that a diffusers pipeline calls at every step, each with the denoiser itself, the first one first.

    They differ if the pipeline's module is torch.compile's wrapper.

    Raises:
        UnsupportedError: the object has no denoiser or no scheduler.
    """
    # Not `a or b`: a compiled module has a __len__ that raises.
    names = [cls.__name__ for cls in type(pipe).__mro__]  # a subclass of one's own, too
    if (reads := next((_READS[name] for name in names if name in _READS), None)) is not None:
        raise UnsupportedError(f"{type(pipe).__name__} {reads}. Run it without acceleration.")
    candidates = [getattr(pipe, name, None) for name in _DENOISERS]
    module = next((m for m in candidates if isinstance(m, nn.Module)), None)
    if module is None or scheduler_of(pipe) is None:
        if callable(getattr(pipe, "decoder", None)) and not isinstance(pipe.decoder, nn.Module):
            raise UnsupportedError(
                f"{type(pipe).__name__} makes images token by token and has no denoiser: this method is for "
                "diffusers pipelines. Autoregressive pipelines take SpeculativeDecodingConfig."
            )
        raise UnsupportedError(
            "expected a diffusers pipeline with a transformer (or unet) and a scheduler, got "
            f"{type(pipe).__name__}. Pass the pipeline itself, not one of its parts."
        )
    beside = [getattr(pipe, name, None) for name in _BESIDE]
    modules = [module, *(m for m in beside if isinstance(m, nn.Module))]
    return [(m, getattr(m, "_orig_mod", m)) for m in modules]
