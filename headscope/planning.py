"""Estimate what a study costs before loading weights: passes, FLOPs, memory and hours.

Everything is computed from the model's shape. FLOPs count matrix products, as torch's
``FlopCounterMode`` does, with attention over the full square; hours divide them, or the bytes that
decoding reads, by the device's peak rate times a utilisation factor.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headscope.base.arguments import checked
from headscope.base.files import Saved
from headscope.base.result import Glance, Shown, Tabular, number
from headscope.errors import InputError, ModelLoadError, UnsupportedModelError, nearest

if TYPE_CHECKING:
    import pandas

STUDIES = ("scan", "ablation", "lens", "decode")


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a decoder that determine its cost.

    Attributes:
        mlp_matrices: matrices in an MLP, ``d_model`` by ``d_mlp`` each: 2, or 3 if gated.
        tied: whether embedding and unembedding share one matrix.
    """

    layers: int
    heads: int
    kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    mlp_matrices: int = 3
    tied: bool = False

    @property
    def attention(self) -> int:
        """Number of attention weights in one layer."""
        return 2 * self.d_model * self.d_head * (self.heads + self.kv_heads)

    @property
    def mlp(self) -> int:
        """Number of weights in one MLP."""
        return self.mlp_matrices * self.d_model * self.d_mlp

    @property
    def parameters(self) -> int:
        """Number of weights in all matrices."""
        tables = 1 if self.tied else 2
        return self.layers * (self.attention + self.mlp) + tables * self.d_model * self.d_vocab

    def forward(self, tokens: int, keys: int | None = None) -> float:
        """FLOPs of one layer on an example's tokens, each attending to ``keys`` keys."""
        seen = tokens if keys is None else keys
        return 2.0 * tokens * (self.attention + self.mlp) + 2 * self.rows(tokens, seen)

    def rows(self, queries: int, keys: int) -> float:
        """FLOPs of all heads' attention scores in one layer."""
        return 2.0 * self.heads * self.d_head * queries * keys

    def logits(self, rows: int) -> float:
        """FLOPs of the logits of some rows."""
        return 2.0 * rows * self.d_model * self.d_vocab


SHAPES: Mapping[str, Sizes] = {
    "gpt2": Sizes(12, 12, 12, 768, 64, 3072, 50257, 2, tied=True),
    "smollm2-135m": Sizes(30, 9, 3, 576, 64, 1536, 49152, tied=True),
    "llama-3.2-1b": Sizes(16, 32, 8, 2048, 64, 8192, 128256, tied=True),
    "llama-3-8b": Sizes(32, 32, 8, 4096, 128, 14336, 128256),
    "llama-3-70b": Sizes(80, 64, 8, 8192, 128, 28672, 128256),
}


@dataclass(frozen=True)
class Machine:
    """Peak rates of a device, from its data sheet, without sparsity.

    Attributes:
        half, single: FLOPs per second in bf16 and in fp32 (no TF32).
        bandwidth: memory bandwidth in bytes per second.
        memory: bytes.
        stack_tokens: tokens of variants run together in an ablation.
        chunk_bytes: bytes of attention rows held at once.
    """

    half: float
    single: float
    bandwidth: float
    memory: float
    stack_tokens: int = 65536
    chunk_bytes: int = 512 * 2**20


MACHINES: Mapping[str, Machine] = {
    "h100": Machine(989e12, 67e12, 3.35e12, 80e9),
    "h200": Machine(989e12, 67e12, 4.8e12, 141e9),
    "a100": Machine(312e12, 19.5e12, 2.0e12, 80e9),
    "l4": Machine(121e12, 30e12, 0.3e12, 24e9, 30720),
    "rtx-4090": Machine(165e12, 82e12, 1.0e12, 24e9),
    "cpu-core": Machine(5e10, 5e10, 1e10, 16e9, 1024, 32 * 2**20),
}
# The device that is measured: this machine, with as many threads as torch has, or its GPU.
HERE = "here"
# Utilisation on large matrix products; small models reach less.
_REACHED = 0.5
# Rate of a study over that of its largest matrix product alone: .67 to .92 for scans, ablations and
# lenses at the widths of GPT-2 small and of a llama of 1,024, on a CPU.
_OF_PRODUCT = 0.8
_ROWS, _COPIED = 1024, 1 << 27
# Default number of tokens in one pass.
_PASS_TOKENS = 8192
_COPIES = 2.25  # of a chunk of rows: scores, probabilities, what a scorer derives
_PROOFS = 6  # whole passes of one example that an ablation proves itself by
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, eq=False, repr=False)
class Cost(Saved, Tabular, Shown):
    """Estimated cost of a study.

    Attributes:
        study: name of the study.
        passes: work in whole forward passes over one example.
        flops: FLOPs in matrix products.
        memory: peak bytes: weights, activations and what is kept of a pass.
        hours: on the device, without loading.
        device: its name.
        fits: whether the peak is below the device's memory.
    """

    study: str
    passes: float
    flops: float
    memory: float
    hours: float
    device: str
    fits: bool

    def glance(self) -> Glance:
        """One row for each number."""
        room = "fits" if self.fits else "does NOT fit: shard with device_map, or offload"
        rows = [
            ("forward passes", number(self.passes)),
            ("operations", f"{self.flops:.3g}"),
            ("memory", f"{self.memory / 1e9:.3g} GB, {room}"),
            ("time", f"{self.hours:.2g} h on one {self.device}, loading excluded"),
        ]
        return Glance(f"cost of a study: {self.study}", [], ("", ""), rows)

    def to_pandas(self) -> "pandas.DataFrame":
        """DataFrame with one row."""
        import pandas

        return pandas.DataFrame([self.__dict__])


@checked
def plan(
    shape: "str | Sizes",
    study: str = "scan",
    *,
    examples: int = 100,
    length: int = 512,
    queries: int | None = None,
    heads: int | None = None,
    steps: int = 50,
    device: str = "h100",
    dtype: str = "bfloat16",
) -> Cost:
    """Estimate what a study costs from a model's shape, without loading it.

    ``scan``: row scorers on ``queries`` of each example. ``ablation``: ``heads`` heads one by one
    at all positions, the metric read at the last one, by suffix replay. ``lens``: every layer read
    in the vocabulary at every position. ``decode``: ``steps`` tokens after a prompt of ``length``,
    one example at a time, with the rows of every step.

    FLOPs and memory are within 25% of what was counted on small shapes. Hours on a named device
    assume half of its peak rate, and are only as good as that assumption. ``device="here"``
    measures this machine on a matrix product of the model's width, which takes a second; that is
    within 25% for models of a width of 768 or more.

    Args:
        shape: a name of :data:`headscope.planning.SHAPES`, a Hugging Face name or folder whose
            config is read, ``"layers=32,heads=32,kv_heads=8,d_model=4096,..."``, or the sizes.
        study: name of the study.
        examples: number of examples.
        length: tokens per example.
        queries: positions whose rows a scan reads; default: all.
        heads: number of ablated heads; default: all.
        steps: decoded tokens.
        device: a name of :data:`headscope.planning.MACHINES`, or ``here``.
        dtype: dtype of weights and activations.

    Raises:
        InputError: if a name is unknown or a number is not positive.
        ModelLoadError: if no config of that name can be read.
        UnsupportedModelError: if the config does not give the sizes of a decoder.

    Example:
        >>> cost = hs.plan("llama-3-8b", "ablation", examples=10, length=512, device="h100")
        >>> cost.fits, cost.passes > 1000
        (True, True)
    """
    if study not in STUDIES:
        raise InputError(nearest(study, STUDIES, kind="study"))
    if device not in (*MACHINES, HERE):
        raise InputError(nearest(device, (*MACHINES, HERE), kind="device"))
    if dtype not in _BYTES:
        raise InputError(nearest(dtype, _BYTES, kind="dtype"))
    counts = {"examples": examples, "length": length, "steps": steps}
    counts |= {} if queries is None else {"queries": queries}
    counts |= {} if heads is None else {"heads": heads}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1; got {count}.")
    sizes = sizes_of(shape)
    machine = _this_machine(sizes, dtype) if device == HERE else MACHINES[device]
    asked = _Asked(sizes, machine, examples, length, min(queries or length, length), steps)
    flops, kept = {
        "scan": asked.scan,
        "ablation": lambda: asked.ablation(heads),
        "lens": asked.lens,
        "decode": asked.decode,
    }[study]()
    memory = _BYTES[dtype] * (sizes.parameters + kept)
    rate = _REACHED * (machine.single if dtype == "float32" else machine.half)
    seconds = flops / rate
    if study == "decode":  # each step reads the weights and all keys and values
        seconds += examples * steps * memory / machine.bandwidth / _REACHED
    whole = sizes.layers * sizes.forward(length)
    return Cost(
        study, flops / whole, flops, memory, seconds / 3600, device, memory < machine.memory
    )


def _this_machine(sizes: Sizes, dtype: str) -> Machine:
    """Rates of this machine, measured on a product of the model's width and on a copy."""
    import torch

    gpu = torch.cuda.is_available()
    kind: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": "cuda" if gpu else "cpu"}
    rows, weights = (
        torch.ones(_ROWS, sizes.d_model, **kind),
        torch.ones(sizes.d_model, sizes.d_mlp, **kind),
    )
    block = torch.zeros(_COPIED, dtype=torch.uint8, device=kind["device"])

    def seconds(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(6):
            started = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return min(taken)

    rate = 2.0 * rows.numel() * sizes.d_mlp / seconds(lambda: rows @ weights)
    peak = rate * _OF_PRODUCT / _REACHED
    bandwidth = 2 * _COPIED / seconds(block.clone)
    like = MACHINES["h100" if gpu else "cpu-core"]
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else _main_memory()
    return replace(like, half=peak, single=peak, bandwidth=bandwidth, memory=float(memory))


def _main_memory() -> float:
    """Bytes of main memory; a core's share where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return MACHINES["cpu-core"].memory


@dataclass(frozen=True)
class _Asked:
    """Parameters of a study; its methods return FLOPs and peak numbers of live tensor entries."""

    sizes: Sizes
    machine: Machine
    examples: int
    length: int
    queries: int
    steps: int

    def _whole(self) -> float:
        return self.sizes.layers * self.sizes.forward(self.length)

    def _activations(self, tokens: int) -> float:
        """Peak entries in an MLP, the largest consumer: its hidden activations and the stream."""
        gelu = self.sizes.mlp_matrices == 2
        return self._inside(tokens, 5 if gelu else 3)  # GELU by its formula has more terms

    def _inside(self, tokens: int, inner: int) -> float:
        return tokens * (inner * float(self.sizes.d_mlp) + 4 * self.sizes.d_model)

    def _batch(self, limit: int) -> int:
        """Tokens of one pass."""
        return self.length * min(self.examples, max(1, limit // self.length))

    def _chunk(self) -> float:
        """fp32 entries of the rows held at once, with the views derived from them."""
        whole = _COPIES * self._batch(_PASS_TOKENS) * self.sizes.heads * self.queries
        return min(whole, self.machine.chunk_bytes / 4)

    def scan(self) -> tuple[float, float]:
        sizes, rows = self.sizes, self.sizes.layers * self.sizes.rows(self.queries, self.length)
        # The pass ends with attention of the last layer.
        write = 2.0 * self.length * (sizes.d_model * sizes.d_head * sizes.heads + sizes.mlp)
        flops = self.examples * (self._whole() - write + rows)
        tokens = self._batch(_PASS_TOKENS)
        held = tokens * self.sizes.d_head * (self.sizes.heads + 2 * self.sizes.kv_heads)
        attending = held + 4 * tokens * self.sizes.d_model + self._chunk()
        return flops, max(self._activations(tokens), attending)

    def ablation(self, heads: int | None) -> tuple[float, float]:
        sizes, length = self.sizes, self.length
        every = sizes.layers * sizes.heads
        share = (every if heads is None else min(heads, every)) / every
        write = 2.0 * (sizes.d_model * sizes.d_head * sizes.heads + sizes.mlp)
        keys_values = 4.0 * length * sizes.d_model * sizes.d_head * sizes.kv_heads
        own = sizes.attention - 2 * sizes.d_model * sizes.d_head * sizes.kv_heads
        last = keys_values + 2.0 * (own + sizes.mlp) + 2 * sizes.rows(1, length)
        total = write  # of heads of the last layer, whose output is read at one position
        for layer in range(sizes.layers - 1):
            above = sizes.layers - 2 - layer
            total += length * write + above * sizes.forward(length) + last
        variants = share * sizes.heads * (total + sizes.layers * sizes.logits(1))
        flops = self.examples * (self._whole() + variants) + _PROOFS * self._whole()
        batch = self._batch(min(self.machine.stack_tokens, _PASS_TOKENS))
        per_token = sizes.d_model + sizes.d_head * (sizes.heads + 2 * sizes.kv_heads)
        recorded = batch * (sizes.layers * per_token + sizes.d_model)
        stack = max(self.length, self.machine.stack_tokens // batch * batch)
        stack = min(stack, batch * sizes.heads)  # variants that start in one layer
        return flops, recorded + self._inside(max(stack, batch), 3)  # replays fuse activations

    def lens(self) -> tuple[float, float]:
        sizes = self.sizes
        places = sizes.layers + 2  # the embedding, each layer, and the model's own once more
        flops = self.examples * (self._whole() + places * sizes.logits(self.length))
        states = (sizes.layers + 2) * self.length * sizes.d_model
        chunk = min(self.length * sizes.d_vocab, 1 << 24)
        return flops, states + max(self._activations(self.length), 6.0 * chunk)

    def decode(self) -> tuple[float, float]:
        sizes = self.sizes
        step = sizes.layers * (
            sizes.forward(1, self.length) + sizes.rows(1, self.length)
        ) + sizes.logits(1)
        flops = self.examples * (self._whole() + self.steps * step)
        kept = 2 * sizes.layers * (self.length + self.steps) * sizes.kv_heads * sizes.d_head
        return flops, kept + self._activations(self.length)


def sizes_of(shape: "str | Sizes") -> Sizes:
    """Get a decoder's sizes by name, from numbers, or from a model's config; see :func:`plan`.

    Example:
        >>> from headscope.planning import sizes_of
        >>> sizes_of("layers=2,heads=4,d_model=64,d_mlp=128,d_vocab=1000").d_head
        16
    """
    if isinstance(shape, Sizes):
        return shape
    if shape.lower() in SHAPES:
        return SHAPES[shape.lower()]
    return _spelled(shape) if "=" in shape else _of_config(shape)


_SPELLED = ("layers", "heads", "kv_heads", "d_model", "d_head", "d_mlp", "d_vocab", "mlp_matrices")
_NEEDED = ("layers", "heads", "d_model", "d_mlp", "d_vocab")


def _spelled(text: str) -> Sizes:
    given: dict[str, int] = {}
    for piece in text.split(","):
        name, _, value = piece.strip().partition("=")
        if name not in _SPELLED:
            raise InputError(nearest(name, _SPELLED, kind="size"))
        if not value.isdecimal() or int(value) < 1:
            raise InputError(f"{piece.strip()!r}: give a whole number from 1 on.")
        given[name] = int(value)
    if missing := [name for name in _NEEDED if name not in given]:
        raise InputError(f"{text!r} leaves out {', '.join(missing)}: give all of these.")
    heads, width = given["heads"], given["d_model"]
    return Sizes(
        layers=given["layers"],
        heads=heads,
        kv_heads=given.get("kv_heads", heads),
        d_model=width,
        d_head=given.get("d_head", max(1, width // heads)),
        d_mlp=given["d_mlp"],
        d_vocab=given["d_vocab"],
        mlp_matrices=given.get("mlp_matrices", 3),
    )


def _of_config(name: str) -> Sizes:
    """Sizes from the config of a local folder or Hub name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        known = ", ".join(SHAPES)
        raise ModelLoadError(
            f"{name!r} is neither a known shape ({known}) nor a model whose config can be read: "
            "give a folder, or layers=...,heads=...,d_model=...,d_mlp=...,d_vocab=..."
        ) from error
    if any(getattr(config, one, None) for one in ("num_experts", "num_local_experts")):
        raise UnsupportedModelError(
            f"{name} routes tokens to experts, so its cost depends on the text: give the sizes "
            "that a token passes, as layers=...,heads=...,d_mlp=..."
        )
    try:
        with torch.device("meta"):
            module: Any = AutoModelForCausalLM.from_config(config)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        width = config.hidden_size
    except (AttributeError, ValueError, TypeError) as error:
        raise UnsupportedModelError(f"the config of {name} is not that of a decoder.") from error
    d_head = getattr(config, "head_dim", None) or width // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    tied = bool(config.tie_word_embeddings)
    bare = Sizes(layers, heads, kv_heads, width, d_head, inner or 4 * width, config.vocab_size, 0)
    matrices = sum(one.numel() for one in module.parameters() if one.ndim > 1)
    tables = (1 if tied else 2) * width * config.vocab_size
    mlps = matrices - tables - layers * bare.attention
    gated = max(2, round(mlps / (layers * width * bare.d_mlp)))
    return Sizes(
        layers, heads, kv_heads, width, d_head, bare.d_mlp, config.vocab_size, gated, tied=tied
    )
