"""`accel bench ar --arch`: what a round of decoding takes at the sizes of published models, with random weights.

Random weights say how fast a model of this shape is, and nothing of its images: how many tokens a window makes final
is the built-in model's, and so are the milliseconds per image of windows. Ways are interleaved, pass by pass; a row is
written as soon as it is measured, and a bench that is continued measures only the rows that are missing.

Shapes: B images, R rows (2 B: all with guidance), W tokens of a window, N slots, V codes, D width.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from accel.core.decoding import Sampling
from accel.core.rounds import CudaGraphs, Rounds
from accel.methods.speculation import SpeculativeDecodingConfig
from accel.methods.speculation.decoder import SpeculativeDecoder
from accel.pipelines.autoregressive.adapter import CheckpointAdapter, Layout, Prefix
from accel.pipelines.autoregressive.kept import compiled
from accel.pipelines.autoregressive.llamagen import LlamaGenClasses
from accel.pipelines.autoregressive.llamagen_model import Gpt, GptShape
from accel.pipelines.autoregressive.model import PromptedModel
from accel.pipelines.autoregressive.stack import merge

GUIDANCE = 5.0
PROMPT = 16  # tokens
#: Slots that one forward of a window makes final on the built-in model, bfloat16, 30 prompts (docs/measured).
ACCEPTED = {1: 1.0, 8: 256 / 75, 16: 256 / 56, 32: 256 / 51, 64: 256 / 51}
TRANSFORMERS, EAGER, COMPILED, CAPTURED = "transformers", "eager", "compiled", "captured"
PASSES = 3


@dataclass(frozen=True)
class Architecture:
    """Sizes of a published model, as its configuration has them.

    Attributes:
        inner: width of the feed-forward layer.
        code: width of an image token's own embedding before its projection; 0: embedded at full width.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    codes: int
    rows: int
    columns: int
    code: int = 0
    llamagen: bool = False


ARCHITECTURES = {
    "janus-1b": Architecture(24, 2048, 16, 16, 5632, 16384, 24, 24, code=8),
    "janus-7b": Architecture(30, 4096, 32, 32, 11008, 16384, 24, 24, code=8),
    "llamagen-xl": Architecture(36, 1280, 20, 20, 3584, 16384, 24, 24, llamagen=True),
    "emu3": Architecture(32, 4096, 32, 8, 14336, 32768, 90, 90),
}


def tiny(architecture: Architecture) -> Architecture:
    """The same kinds of layers in a size for a dry run on a CPU."""
    return replace(
        architecture, layers=2, width=64, heads=4, kv_heads=2, inner=96, codes=64, rows=4, columns=4
    )


class RandomLlama(CheckpointAdapter):
    """A Llama with an embedding and a head for image codes, as Janus has them; random weights, no pixels."""

    name = "random weights"
    makes_pixels = False

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=64,
            hidden_size=architecture.width,
            intermediate_size=architecture.inner,
            num_hidden_layers=architecture.layers,
            num_attention_heads=architecture.heads,
            num_key_value_heads=architecture.kv_heads,
            max_position_embeddings=16384,
        )
        a = architecture
        into: nn.Module = nn.Identity()
        out: nn.Module = nn.Identity()
        with torch.device(device), default_dtype(dtype):
            llama = LlamaModel(config)
            embedding = nn.Embedding(a.codes, a.code or a.width)
            head = nn.Linear(a.width, a.codes, bias=False)
            if a.code:
                into = nn.Sequential(nn.Linear(a.code, a.width), nn.GELU(), nn.Linear(a.width, a.width))
                out = nn.Sequential(nn.Linear(a.width, a.width), nn.GELU())
        parts = {"llama": llama, "embedding": embedding, "into": into, "out": out, "head": head}
        super().__init__(nn.ModuleDict(parts).eval().requires_grad_(False))
        self._architecture = architecture

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> RandomLlama:
        raise NotImplementedError("made of random numbers")

    @property
    def backbone(self) -> nn.Module:
        return self.model["llama"]

    @property
    def vocabulary(self) -> int:
        return self._architecture.codes

    def layout(self, height: int | None, width: int | None) -> Layout:
        return Layout.plain(self._architecture.rows, self._architecture.columns)

    def prefix(self, prompts: Sequence[Any], layout: Layout, guided: bool) -> Prefix:
        rows = [[1] * PROMPT] * (len(prompts) * (2 if guided else 1))
        embedding = self.model["llama"].embed_tokens
        return Prefix.of_tokens(rows, embedding, embedding.weight.device)

    def embed(self, token_BW: Tensor) -> Tensor:
        return self.model["into"](self.model["embedding"](token_BW))

    def logits(self, hidden_RWD: Tensor) -> Tensor:
        return self.model["head"](self.model["out"](hidden_RWD))


class default_dtype:
    """`with default_dtype(torch.bfloat16)`: new parameters have it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self._before)


def build(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> CheckpointAdapter:
    """An adapter with random weights."""
    if not architecture.llamagen:
        return RandomLlama(architecture, device, dtype)
    a = architecture
    shape = GptShape(
        layers=a.layers,
        width=a.width,
        heads=a.heads,
        kv_heads=a.kv_heads,
        feed_forward=a.inner,
        vocabulary=a.codes,
        classes=1000,
        caption=None,
        prefix=1,
    )
    with torch.device(device), default_dtype(dtype):
        gpt = Gpt(shape).eval().requires_grad_(False)
    return _RandomLlamaGen(gpt, a)


class _RandomLlamaGen(LlamaGenClasses):
    """Without its VQ decoder."""

    makes_pixels = False

    def __init__(self, gpt: Gpt, architecture: Architecture) -> None:
        CheckpointAdapter.__init__(self, nn.ModuleDict({"gpt": gpt}))
        self.gpt, self._architecture = gpt, architecture

    @property
    def codebook_VD(self) -> Tensor:
        return self.gpt.tok_embeddings.weight

    def layout(self, height: int | None, width: int | None) -> Layout:
        return Layout.plain(self._architecture.rows, self._architecture.columns)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        ms: of a round: forward, guidance, draw or verification, new state; median over passes.
        least_ms: of the passes.
        forward_ms: of the model's forward alone, run in the same way; median.
        bound_ms: what reading the weights and half an image's keys and values takes at the measured bandwidth.
        image_s: for one image of the batch, if a window makes as many tokens final as on the built-in model.
        memory_mib: of the device, for caches and graphs, between rounds.
        weights_mib: of the model.
        problem: why there is no measurement; or, with one, why it was not captured.
    """

    arch: str
    way: str
    batch: int
    window: int
    ms: float | None
    least_ms: float | None
    forward_ms: float | None
    bound_ms: float
    image_s: float | None
    memory_mib: int | None
    weights_mib: int
    problem: str = ""


def cases(
    batches: Sequence[int], windows: Sequence[int], ways: Sequence[str]
) -> Iterator[tuple[int, int, list[str]]]:
    """(batch, window, ways), what is asked for first first: batches, then widths of 1 and the windows."""
    for batch in batches:
        for window in (1, *windows):
            own = [way for way in ways if window == 1 or way != TRANSFORMERS]
            yield batch, window, own


def measure(
    arch: str,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    todo: Sequence[tuple[int, int, Sequence[str]]],
    *,
    seconds: float = 600.0,
    rounds: int = 20,
) -> Iterator[Row]:
    """Rows, each as soon as it is measured; ends when the time is over.

    Args:
        todo: what `cases` gives, without what is known.
        seconds: no case is begun after these.
        rounds: timed back to back, of which the mean is one measurement.
    """
    began = time.perf_counter()
    adapter = build(architecture, device, dtype)
    per_second = bandwidth(device)
    for batch, window, ways in todo:
        if time.perf_counter() - began > seconds:
            return
        yield from _case(arch, adapter, batch, window, ways, per_second, rounds, device)
        free(device)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@torch.no_grad()
def _case(
    arch: str,
    adapter: CheckpointAdapter,
    batch: int,
    window: int,
    ways: Sequence[str],
    per_second: float,
    rounds: int,
    device: torch.device,
) -> Iterator[Row]:
    actions: dict[str, Callable[[], object]] = {}
    forwards: dict[str, Callable[[], object]] = {}
    problems: dict[str, str] = {}
    memory: dict[str, int] = {}
    slots = adapter.layout(None, None).slots
    for way in ways:
        before = _reserved(device)
        try:
            make = _transformers if way == TRANSFORMERS else _ours
            actions[way], forward = make(adapter, way, batch, window, problems)
            for _ in range(3):  # compiles, captures
                actions[way]()
            memory[way] = _reserved(device) - before
        except Exception as error:  # one way's trouble is its row's
            actions.pop(way, None)
            problems[way] = _first(error)
            continue
        try:
            if forward is not None:
                for _ in range(3):
                    forward()
                forwards[way] = forward
        except Exception as error:  # the round stands without its forward
            problems[way] = f"its forward alone: {_first(error)}"
    times: dict[str, list[float]] = {way: [] for way in actions}
    alone: dict[str, list[float]] = {way: [] for way in forwards}
    for _ in range(PASSES):
        for way, action in actions.items():
            times[way].append(_timed(action, rounds, device))
            if way in forwards:
                alone[way].append(_timed(forwards[way], rounds, device))
    bound = bytes_read(adapter, batch, slots) / per_second
    for way in ways:
        own = times.get(way)
        ms = 1000 * statistics.median(own) if own else None
        yield Row(
            arch,
            way,
            batch,
            window,
            ms,
            1000 * min(own) if own else None,
            1000 * statistics.median(alone[way]) if way in alone else None,
            1000 * bound,
            ms / 1000 * slots / ACCEPTED.get(window, ACCEPTED[64]) / batch if ms else None,
            memory[way] >> 20 if way in memory and device.type == "cuda" else None,
            sum(part.nbytes for part in adapter.model.parameters()) >> 20,
            problems.get(way, ""),
        )


def _ours(
    adapter: CheckpointAdapter, way: str, batch: int, window: int, problems: dict[str, str]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A round in the middle of an image, run by the decoder itself; and its forward alone."""
    device = next(adapter.model.parameters()).device
    stack = adapter.stack()
    assert stack is not None, "an architecture of this bench is one that `Stack` knows"
    if way != EAGER:
        merge(stack)
        stack.wrap(compiled)
    capture = None
    if way == CAPTURED:
        capture = CudaGraphs.on(device, lambda reason: problems.update({way: reason}))
    prompts = [0] * batch
    model = PromptedModel(
        adapter, adapter.layout(None, None), prompts, GUIDANCE, grow=True, stack=stack, rounds=Rounds(capture)
    )
    decoder = SpeculativeDecoder(SpeculativeDecodingConfig(window=max(2, window), auto_disable=False))
    token_BW = torch.zeros(batch, window, dtype=torch.int64, device=device)
    at_B = torch.full((batch,), model.layout.slots // 2, device=device)

    def forward() -> None:
        model.forward(token_BW, at_B)

    turn = decoder.round(model, Sampling(), window)
    return turn, lambda: model.rounds.run(("forward",), forward)


def _transformers(
    adapter: CheckpointAdapter, way: str, batch: int, window: int, problems: dict[str, str]
) -> tuple[Callable[[], object], None]:
    """A token by transformers' own forward with its own dynamic cache, guided and drawn as its `generate` does.

    Not by `generate` itself: in transformers 5.17 Janus's calls `_prepare_static_cache` without an argument.
    """
    from transformers import DynamicCache

    backbone: Any = adapter.backbone
    device, half = backbone.embed_tokens.weight.device, adapter.layout(None, None).slots // 2
    cache = DynamicCache(config=backbone.config)
    name = adapter.cache_argument
    token_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    backbone(
        inputs_embeds=adapter.embed(token_B1.expand(-1, half)).repeat(2, 1, 1),
        use_cache=True,
        **{name: cache},
    )

    def token() -> Tensor:
        embedding = adapter.embed(token_B1).repeat(2, 1, 1)
        hidden = backbone(inputs_embeds=embedding, use_cache=True, **{name: cache}).last_hidden_state
        conditional, unconditional = adapter.logits(hidden[:, -1]).chunk(2)
        logits_BV = unconditional + GUIDANCE * (conditional - unconditional)
        return torch.multinomial(logits_BV.float().softmax(-1), 1)

    return token, None


def bytes_read(adapter: CheckpointAdapter, batch: int, slots: int) -> int:
    """What a forward cannot do without: the layers and the head, keys and values up to the image's middle."""
    embeddings = [part.weight for part in adapter.model.modules() if isinstance(part, nn.Embedding)]
    weights = sum(part.nbytes for part in adapter.model.parameters())
    weights -= sum(part.nbytes for part in embeddings)
    stack = adapter.stack()
    assert stack is not None
    shape = stack.shape
    numbers = 2 * adapter.layers * 2 * batch * (PROMPT + slots // 2) * shape.kv_heads * shape.head
    return weights + numbers * embeddings[0].element_size()


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of a large buffer reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_timed(lambda: target.copy_(source), 5, device) for _ in range(3))


def _timed(action: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Mean seconds of rounds back to back."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(rounds):
        action()
    _wait(device)
    return (time.perf_counter() - began) / rounds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reserved(device: torch.device) -> int:
    """Bytes that cannot be given back: of tensors that are there and of graphs."""
    _wait(device)
    free(device)
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    """Give back what a case held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
