"""``hs.testing.check_model``: check headscope's view of a model against the model itself."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope import circuits, lens, metrics, probes
from headscope.ablation import ablate_heads
from headscope.base.arguments import checked
from headscope.base.batches import PIXELS, Batch
from headscope.base.stacks import grid_of
from headscope.capture import collect
from headscope.edits import zero
from headscope.errors import HeadscopeError, UnsupportedModelError
from headscope.heads import HeadIndex, ModelShape
from headscope.models.hf.layout import body_of
from headscope.models.hf.seq2seq import Seq2SeqModel
from headscope.models.hf.transformers_api import attention_name
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.models.running import answer
from headscope.models.taps import Reads, Tap, TapView, Texts, at_final, at_layers, writes_of
from headscope.probes.encoding import next_tokens
from headscope.probes.probe import Probe
from headscope.pruning import prune
from headscope.scoring import score
from headscope.testing.plain import (
    PlainCall,
    PlainModel,
    PlainRun,
    Sites,
    by_position,
    flat_heads,
    hooked,
    name_of,
)
from headscope.testing.report import (
    CheckError,
    CheckReport,
    agree,
    ensure,
    relative_gap,
    run_checks,
)
from headscope.testing.stacks import check_stacks, refuse_nan

# Texts are at least this long, and longer than any window of moderate size.
_LENGTH, _LONGEST = 72, 256
# Rounding tolerance, relative to the largest number: fp32 rounding, amplified two thousandfold by
# deep stacks of wide random weights. Rows and scores are fp32 for models of any dtype.
_TOLERANCE = {torch.float32: 2.5e-4, torch.float64: 2.5e-4}
_HALF_TOLERANCE = 0.1


@checked
def check_model(model: Any, *, raises: bool = True, seed: int = 0) -> CheckReport:
    """Check headscope's view of a model against plain eager attention and hooks.

    The reference is the model run on its own eager attention with plain torch hooks, on random
    texts longer than its windows (72 to 256 tokens). Encoder-decoders run on random sources and
    targets, with the checks that apply to each stack. The checks, in order:

    ``shape``: layers, heads and head sizes are those of the attention calls. ``logits``: as the
    model's own, watched or not. ``rows``: attention of every layer and head, whole and in chunks.
    ``head outputs``: ``z``. ``values``: their average by the rows is ``z``. ``zero ablation``: of
    single heads, in one pass and by :func:`headscope.ablate_heads`. ``write``: ``z @ W_O`` is what
    a head adds to the residual stream. ``unembedding``: final norm and unembedding give the logits.
    ``attribution``: the parts of a logit sum to it. ``OV circuit``, ``QK circuit``: products of
    weights do what attention does with single inputs. ``pruning``: the smaller model is the model
    with these heads at 0. ``padding left``, ``padding right``: change nothing. ``batch size``: nor
    does that. ``scores``: as computed from whole patterns. ``hooks``: those of the model's owner
    stay and act. ``restored``: training mode, attention implementation, hooks and weights, after
    a pass and after one that fails. ``not a number``: is refused.

    Args:
        model: model from :func:`headscope.load`, or anything that it accepts.
        raises: raise at the first failure; if False, continue and list failures in the report.
        seed: seed for the texts.

    Returns:
        A report of every check: passed, limited (not supported by the model, with the reason) or
        failed.

    Raises:
        CheckError: at the first failed check, with its name and the difference.
        HeadscopeError: if :func:`headscope.load` refuses the model.

    Example:
        >>> import headscope as hs
        >>> report = hs.testing.check_model("tiny-llama")
        >>> bool(report), report.limited
        (True, {})
    """
    seen: Any = model if isinstance(model, HeadModel) else load(model)
    from transformers import PreTrainedModel

    if isinstance(seen, Seq2SeqModel):
        return check_stacks(seen, raises=raises, seed=seed)

    subject = _Subject(seen, model if isinstance(model, PreTrainedModel) else None, seed)
    return run_checks(seen.name, subject, _CHECKS, raises=raises)


@dataclass
class _Everything:
    """Reader that keeps whole rows, head outputs, values and the last residual stream."""

    chunk: int | None = None
    wants_final: bool = False
    patterns: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    wants_values: bool = True
    final: Tensor | None = None

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: every attention layer, and the last residual stream if requested."""
        layers = at_layers(shape, self._on_layer)
        return layers | at_final(self._on_final) if self.wants_final else layers

    def run(self, model: HeadModel, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """Run a model with this reader."""
        headless = "logits" in model.limits
        says = getattr(model, "answer", model.run) if headless else model.run  # hidden states
        given = Texts(tokens, real) if tokens.ndim == 2 else Batch({PIXELS: tokens}, {})
        logits: Tensor | None = says(given, reads=self.reads(model.shape))
        ensure(logits is not None, "a whole pass gives no logits.")
        assert logits is not None  # noqa: S101  for the type checker
        return logits[:, :1] if tokens.ndim == 4 and not headless else logits

    def _on_layer(self, view: TapView) -> None:
        """Keep one layer."""
        size = view.n_queries
        parts = [view.rows(part) for part in torch.arange(size).split(self.chunk or size)]
        patterns = [nn.functional.pad(p.pattern, (0, size - p.pattern.shape[-1])) for p in parts]
        self.patterns[view.layer] = torch.cat(patterns, 2)
        self.z[view.layer] = view.z.clone()
        if self.wants_values:
            self.values[view.layer] = view.values().clone()

    def _on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep the residual stream."""
        self.final = residual.clone()


class _Subject:
    """A model run both ways, with what several checks share."""

    def __init__(self, model: HeadModel, module: Any, seed: int) -> None:
        self.model = model
        wrapped: Any = model  # module is not part of the protocol, but both implementations have it
        self.inside: Any = wrapped.module
        # Without logits, the last hidden states are compared.
        headless = "logits" in model.limits
        self.module: Any = self.inside if module is None else module
        self.module = getattr(model, "speaker", self.module) if headless else self.module
        self.plain = PlainModel(self.module)
        self.seed = seed
        self.tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)

    @cached_property
    def tokens(self) -> Int[Tensor, "batch pos"] | Float[Tensor, "batch channel height width"]:
        """Two random texts, without the lowest ids, which are often special tokens; or images."""
        if self.reads_images:
            pixels = probes.random_images(self.model, 2, seed=self.seed).inputs[PIXELS]
            return pixels.to(self.model.device, self.model.dtype)
        windows = [window for window in self.model.shape.windows if window is not None]
        length = max([_LENGTH, *(2 * window + 3 for window in windows)])
        length = min(length, _LONGEST, self.model.shape.n_ctx or _LONGEST)
        turns_at = self.model.shape.turns_at
        if (
            turns_at is not None and turns_at > _LENGTH // 2
        ):  # padded texts rotate like unpadded ones
            length = min(length, turns_at)
        generator = torch.Generator().manual_seed(self.seed)
        d_vocab = min(self.model.shape.d_vocab, self.model.shape.d_vocab_out or 1 << 62)
        ids = torch.randint(min(5, d_vocab - 1), d_vocab, (2, length), generator=generator)
        return ids.to(self.model.device)

    @property
    def reads_images(self) -> bool:
        """Whether the model reads images."""
        return grid_of(self.model.stacks) is not None

    @property
    def length(self) -> int:
        """Positions of an example."""
        return self.clean.patterns[0].shape[-1]

    @property
    def probe(self) -> Probe:
        """The examples as a probe without explicit targets."""
        if self.reads_images:
            inputs = {PIXELS: self.tokens.float().cpu()}
            return probes.from_batch(inputs, model=self.model)
        return probes.from_tokens(self.tokens.cpu())

    def own(self, module: Any) -> Tensor:
        """Output of the plain module."""
        inputs = {name_of(self.tokens): self.tokens, **_no_cache(self)}
        return by_position(answer(module(**inputs)))

    def run(
        self, tokens: Tensor, edits: tuple[Any, ...] = (), logits_at: Tensor | None = None
    ) -> Tensor:
        """Output of the model itself; hidden states if it has no LM head."""
        says: Callable[..., Any] = getattr(self.model, "answer", self.model.run)
        given: Any = tokens
        if tokens.ndim == 4:
            given = Batch({PIXELS: tokens}, {})
            if logits_at is None and "logits" not in self.model.limits:
                logits_at = torch.tensor([0])
        found: Tensor = says(given, writes=writes_of(edits), logits_at=logits_at)
        return found

    @cached_property
    def clean(self) -> PlainRun:
        """The plain pass over these texts."""
        return self.plain.run(self.tokens)

    @cached_property
    def seen(self) -> _Everything:
        """Everything that headscope reports about the same pass."""
        everything = _Everything(wants_values="values" not in self.model.limits)
        with torch.no_grad():
            everything.run(self.model, self.tokens)
        return everything

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with attention."""
        return self.model.shape.attention_layers

    @cached_property
    def some_heads(self) -> tuple[HeadIndex, ...]:
        """One head each of the first, a middle and the last attention layer."""
        chosen = (self.layers[0], self.layers[len(self.layers) // 2], self.layers[-1])
        heads = self.model.shape.heads
        found = []
        for layer, place in zip(chosen, (0, 1, -1), strict=True):
            there = [head for head in heads if head.layer == layer]
            found.append(there[place % len(there)])
        return tuple(dict.fromkeys(found))

    @property
    def by_reader(self) -> bool:
        """Whether head outputs are read by the output projection and not returned by attention.

        True if a gate or a norm is in between, or attention is not a separate function.
        """
        return "values" in self.model.limits or not self.clean.calls

    def reader(self, layer: int) -> nn.Module:
        """Module with a matrix that reads the head outputs of a layer, found by its input.

        Raises:
            UnsupportedModelError: if there is none, e.g. because of a gate or a norm in between.
        """
        wanted = flat_heads(self.seen.z[layer])
        for module, given in self.sites.inputs.items():
            weight = getattr(module, "weight", None)
            is_matrix = isinstance(weight, Tensor) and weight.ndim == 2
            if is_matrix and _equal(given, wanted, self.tolerance):
                return module
        raise UnsupportedModelError(
            f"no matrix of {self.model.name} reads the head outputs of layer {layer} unchanged."
        )

    @cached_property
    def sites(self) -> Sites:
        """Inputs and outputs of every module in the plain pass."""
        sites = Sites()
        with sites.watching(self.module):
            self.plain.run(self.tokens)
        return sites

    def zeroed(self, heads: tuple[HeadIndex, ...], tokens: Tensor | None = None) -> PlainRun:
        """The plain pass with the outputs of some heads at 0."""
        ids = self.tokens if tokens is None else tokens
        by_layer: dict[int, list[int]] = {}
        for head in heads:
            by_layer.setdefault(head.layer, []).append(head.head)
        if not self.by_reader:
            order = {layer: place for place, layer in enumerate(self.layers)}
            return self.plain.run(ids, zeroed={order[n]: some for n, some in by_layer.items()})
        hooks = {self.reader(n): self._zeroing(some) for n, some in by_layer.items()}
        return self.plain.run(ids, hooks=hooks)

    def _zeroing(self, heads: list[int]) -> Callable[..., Any]:
        d_head = self.model.shape.d_head

        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given = args[0].clone()
            given.unflatten(-1, (-1, d_head))[..., heads, :] = 0
            return (given, *args[1:]), kwargs

        return hook


def _shape(subject: _Subject) -> None:
    """Layers, heads and sizes are those of the attention calls."""
    shape, calls = subject.model.shape, subject.clean.calls
    ensure(
        len(subject.clean.patterns) == len(subject.layers),
        f"headscope sees {len(subject.layers)} attention layers, the model runs "
        f"{len(subject.clean.patterns)}.",
    )
    for layer, pattern in zip(subject.layers, subject.clean.patterns, strict=True):
        ensure(
            pattern.shape[1] == shape.n_heads,
            f"layer {layer} has {pattern.shape[1]} heads, not {shape.n_heads}.",
        )
    for layer, call in zip(subject.layers, calls, strict=False):
        ensure(
            call.value.shape[-1] == shape.d_head,
            f"heads of layer {layer} write {call.value.shape[-1]} numbers, not {shape.d_head}.",
        )


@torch.no_grad()
def _logits(subject: _Subject) -> None:
    """Logits match the model's own, with and without readers."""
    own = subject.own(subject.module)
    agree(subject.clean.logits, own, subject.tolerance, "logits of its own eager attention")
    agree(subject.run(subject.tokens), own, subject.tolerance, "logits")
    everything = _Everything(wants_values=False)
    watched = everything.run(subject.model, subject.tokens)
    agree(watched, own, subject.tolerance, "logits of a watched pass")
    at = torch.tensor([0, subject.length - 2])
    some = subject.run(subject.tokens, logits_at=at)
    agree(some, own[:, at % own.shape[1]], subject.tolerance, "logits of single positions")


@torch.no_grad()
def _rows(subject: _Subject) -> None:
    """Rows match plain eager attention, whole and in chunks."""
    for layer, pattern in zip(subject.layers, subject.clean.patterns, strict=True):
        rows = subject.seen.patterns[layer]
        agree(rows, pattern.float(), subject.tolerance, f"attention rows of layer {layer}")
        ensure(bool((rows.sum(-1) < 1 + 1e-4).all()), f"rows of layer {layer} sum to more than 1.")
    parts = _Everything(chunk=7, wants_values=False)
    parts.run(subject.model, subject.tokens)
    for layer, rows in subject.seen.patterns.items():
        agree(parts.patterns[layer], rows, 1e-5, f"rows of layer {layer} in chunks and whole")


def _outputs(subject: _Subject) -> None:
    """``z`` of every layer matches plain eager attention, or the projection's input.

    The two differ if a gate or a norm is in between, as recorded in ``model.limits``.
    """
    for layer in subject.layers if subject.by_reader else ():
        subject.reader(layer)
    calls = [] if subject.by_reader else subject.clean.calls
    for layer, call in zip(subject.layers, calls, strict=False):
        agree(subject.seen.z[layer], call.z, subject.tolerance, f"head outputs of layer {layer}")


def _values(subject: _Subject) -> None:
    """Rows times values give head outputs."""
    if "values" in subject.model.limits:
        raise UnsupportedModelError(subject.model.limits["values"])
    for layer, pattern in zip(subject.layers, subject.clean.patterns, strict=True):
        value = subject.seen.values[layer].float()
        value = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
        z = einsum(pattern.float(), value, "batch head q k, batch head k d -> batch q head d")
        agree(
            subject.seen.z[layer].float(), z, subject.tolerance, f"rows x values of layer {layer}"
        )


@torch.no_grad()
def _zero_ablation(subject: _Subject) -> None:
    """Zeroing one head's output has the same effect in a full pass and by suffix replay."""
    without = {head: subject.zeroed((head,)).logits for head in subject.some_heads}
    for head, expected in without.items():
        actual = subject.run(subject.tokens, edits=(zero(head),))
        agree(actual, expected, subject.tolerance, f"logits without {head}")
    if "logits" in subject.model.limits:
        _moved_embedding(subject, without)
        return
    probe = subject.probe
    if subject.reads_images:
        targets = torch.full_like(probe.targets, -1)
        targets[:, 0] = torch.arange(len(probe)) % max(1, subject.model.shape.n_logits)
    else:  # any targets work, also for an encoder: use the next tokens
        targets = next_tokens(probe.tokens, torch.ones_like(probe.real))
    probe = replace(probe, targets=targets, next_token=False)
    try:
        effect = ablate_heads(
            subject.model, probe, metrics.loss, "zero", heads=subject.some_heads, progress=False
        )
    except HeadscopeError as refusal:  # ablate_heads itself checks replay against a full pass
        raise UnsupportedModelError(str(refusal)) from refusal
    clean = _loss(subject.clean.logits, targets)
    for head, logits in without.items():
        change = float(_loss(logits, targets) - clean)
        measured = torch.tensor(float(effect.mean[head.layer, head.head]))
        # A loss is a difference of logits, so their magnitude sets the rounding scale.
        scale = subject.clean.logits.abs().max().clamp_min(1.0).double().cpu()
        agree(
            measured / scale,
            torch.tensor(change) / scale,
            subject.tolerance,
            f"changes of the loss by ablating {head}, in replay and in whole passes,",
        )


def _moved_embedding(subject: _Subject, without: Mapping[HeadIndex, Tensor]) -> None:
    """The same for a model without logits: the shift of its mean last state."""
    effect = ablate_heads(
        subject.model,
        subject.probe,
        metrics.embedding_distance.pooled("mean"),
        "zero",
        heads=subject.some_heads,
        progress=False,
    )
    clean = subject.clean.logits.float().mean(1)
    for head, states in without.items():
        moved = (states.float().mean(1) - clean).norm(dim=1).mean()
        measured = torch.tensor(float(effect.mean[head.layer, head.head]))
        agree(measured, moved, subject.tolerance, f"shifts of the embedding by ablating {head}")


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of the targets in nats."""
    targets = targets[:, : logits.shape[1]].to(logits.device)
    return nn.functional.cross_entropy(logits[targets >= 0].float(), targets[targets >= 0])


@torch.no_grad()
def _write(subject: _Subject) -> None:
    """Zeroing a head changes some site of the residual stream by ``z @ W_O``."""
    if "linear_write" in subject.model.limits:
        raise UnsupportedModelError(subject.model.limits["linear_write"])
    for head in subject.some_heads:
        W_O = subject.model.output_weights(head.layer)[head.head].float()
        write = subject.seen.z[head.layer][:, :, head.head].float() @ W_O
        without = Sites()
        with without.watching(subject.module):
            subject.zeroed((head,))
        found = min(
            (
                relative_gap(
                    before.float().reshape(write.shape) - after.float().reshape(write.shape), write
                )
                for before, after in _residual_sites(subject, head.layer, without)
                if before.numel() == write.numel()
            ),
            default=float("inf"),
        )
        ensure(
            found <= subject.tolerance,
            f"what {head} adds to the residual stream is not z @ W_O: the closest site differs by "
            f"{found:.2g}.",
        )


def _block(subject: _Subject, layer: int) -> nn.Module:
    """Module that holds a layer: the entry of a list of modules that its projection is in."""
    reader = subject.reader(layer)
    for name, module in subject.module.named_modules():
        if name.rpartition(".")[2] == str(layer) and reader in set(module.modules()):
            block: nn.Module = module
            return block
    raise CheckError(f"layer {layer} is not a numbered module.")


def _residual_sites(
    subject: _Subject, layer: int, without: Sites
) -> Iterator[tuple[Tensor, Tensor]]:
    """Values inside a block with and without an edit, except the attention output itself.

    The attention output would change by ``z @ W_O`` in any model.
    """
    clean, block = subject.sites, _block(subject, layer)
    written = clean.outputs[subject.reader(layer)]
    seen = [(clean.inputs, without.inputs, part) for part in block.modules()]
    for before, after, part in [*seen, (clean.outputs, without.outputs, block)]:
        if part in before and part in after and not _equal(before[part], written, 1e-3):
            yield before[part], after[part]


def _equal(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors hold the same numbers, regardless of shape."""
    same_size = actual.numel() == expected.numel()
    return same_size and relative_gap(actual.reshape(expected.shape), expected) <= tolerance


@torch.no_grad()
def _unembedding(subject: _Subject) -> None:
    """Final norm and unembedding of the last residual stream give the logits."""
    if "unembedding" in subject.model.limits:
        raise UnsupportedModelError(subject.model.limits["unembedding"])
    everything = _Everything(wants_final=True, wants_values=False)
    everything.run(subject.model, subject.tokens)
    ensure(everything.final is not None, "the last residual stream was never shown.")
    assert everything.final is not None  # noqa: S101  for the type checker
    own = subject.clean.logits
    # For images, only the first position is read.
    logits = subject.model.unembedding.logits(everything.final)[:, : own.shape[1]]
    agree(logits[..., : own.shape[-1]], own.float(), subject.tolerance, "logits of the unembedding")


def _attribution(subject: _Subject) -> None:
    """The parts of a logit sum to the model's own."""
    if (reason := subject.model.limits.get("text")) is not None:
        raise UnsupportedModelError(reason)
    text = subject.tokens[0].cpu()
    target = int(text[0])
    split = lens.attribute(subject.model, text.tolist(), target, sources=False)
    own = subject.clean.logits[0, -1, target].float().cpu()
    total = torch.tensor(sum(part.value for part in split))
    parts = torch.tensor([part.value for part in split]).abs().max().clamp_min(1.0)
    whole = subject.model.unembedding.capped(total)
    agree(whole / parts, own / parts, subject.tolerance, "a logit and the sum of its parts")


@torch.no_grad()
def _ov(subject: _Subject) -> None:
    """The contribution of one input to ``z @ W_O`` is its product with the OV circuit."""
    layers = sorted({head.layer for head in subject.some_heads})
    factors = circuits.ov(subject.model, fold_norm=False, layers=layers)
    unit = _unit_inputs(subject)
    for layer in layers:
        nothing, one = (_with_input(subject, layer, x).value for x in (unit * 0, unit))
        change = (one - nothing)[0].float()
        W_O = subject.model.output_weights(layer).float()
        group = subject.model.shape.n_heads // change.shape[0]
        for head in (h.head for h in subject.some_heads if h.layer == layer):
            expected = change[head // group] @ W_O[head]
            actual = unit[0].float() @ factors.explicit((layer, head)).float()
            if "linear_write" in subject.model.limits:
                expected = _after_norm(subject, layer, expected)
                actual = nn.functional.normalize(actual, dim=-1)
            what = f"inputs through the OV circuit of layer {layer}"
            agree(actual, expected, subject.tolerance, what)


def _after_norm(
    subject: _Subject, layer: int, write: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "pos d_model"]:
    """Directions of writes after the norm that follows attention, up to the norm's scale.

    Raises:
        UnsupportedModelError: if no module reads exactly the output projection's output.
    """
    reader = subject.reader(layer)
    for module, given in subject.sites.inputs.items():
        weight = getattr(module, "weight", None)
        is_norm = isinstance(weight, Tensor) and weight.ndim == 1
        if is_norm and _equal(given, subject.sites.outputs[reader], 1e-6):
            value = write.to(subject.model.dtype)[None]
            normed: Tensor = (module(value) - module(torch.zeros_like(value)))[0].float()
            return nn.functional.normalize(normed, dim=-1)
    raise UnsupportedModelError(
        f"no norm of {subject.model.name} reads exactly what attention of layer {layer} writes."
    )


def _qk(subject: _Subject) -> None:
    """Scores of single inputs are their products with the QK circuit at that distance.

    If queries and keys are normed, they are divided by the norms' scales at these inputs.
    """
    unit, length = _unit_inputs(subject), subject.length
    layers = sorted({head.layer for head in subject.some_heads})
    calls = {layer: _with_input(subject, layer, unit) for layer in layers}
    x = torch.cat([unit[0].float(), torch.ones_like(unit[0, :, :1]).float()], -1)
    for offset in (0, 1, length // 2):
        bare = circuits.qk(subject.model, fold_norm=False, offset=offset, layers=layers)
        factors, at = circuits.with_bias(bare), torch.arange(offset, length)
        for layer in layers:
            query, key = calls[layer].query[0].float(), calls[layer].key[0].float()
            group = query.shape[0] // key.shape[0]
            over_query, over_key = _held_scales(subject, layer, unit)
            for head in (h.head for h in subject.some_heads if h.layer == layer):
                expected = (query[head, at] * key[head // group, at - offset]).sum(-1)
                product = factors.explicit((layer, head)).float()
                actual = ((x[at] @ product) * x[at - offset]).sum(-1)
                actual = actual / over_query[at, head] / over_key[at - offset, head // group]
                what = f"scores of layer {layer} at distance {offset} and their QK circuits"
                agree(actual, expected, subject.tolerance, what)


def _held_scales(
    subject: _Subject, layer: int, unit: Tensor
) -> tuple[Float[Tensor, "pos head"], Float[Tensor, "pos kv_head"]]:
    """Scales between products of weights and the model's own queries and keys at some inputs."""
    between, weights = subject.model.parts.query_key(layer), subject.model.weights(layer)
    found = []
    for norm, multiplier, weight, bias in (
        (between.query_norm, between.query_scale, weights.W_Q, weights.b_Q),
        (between.key_norm, between.key_scale, weights.W_K, weights.b_K),
    ):
        made = torch.einsum("pd,hde->phe", unit[0].float(), weight.float()) + bias.float()
        scale = torch.ones_like(made[..., 0]) if norm is None else norm.scale(made)
        found.append(scale / multiplier)
    return found[0], found[1]


def _unit_inputs(subject: _Subject) -> Float[Tensor, "batch pos d_model"]:
    """Random inputs of an attention layer, of roughly unit size."""
    generator = torch.Generator().manual_seed(subject.seed + 1)
    shape = (2, subject.length, subject.model.shape.d_model)
    value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    placed: Tensor = value.to(subject.model.device, subject.model.dtype)
    return placed


def _with_input(subject: _Subject, layer: int, given: Tensor) -> PlainCall:
    """One layer's attention call when its module gets other inputs."""
    if not subject.clean.calls:
        held = "against transformer-lens"
        if subject.model.path == "hf":
            held = "at load, against its activations"
        raise UnsupportedModelError(
            f"the plain attention of {subject.model.name} does not expose its queries and keys, so "
            f"its circuits are only checked {held}."
        )
    place = subject.layers.index(layer)
    module = subject.clean.calls[place].module
    read = subject.sites.inputs.get(module)
    if read is not None and read.shape[-1] != given.shape[-1]:
        raise UnsupportedModelError(
            f"attention of {subject.model.name} reads {read.shape[-1]} numbers a position and the "
            f"residual stream has {given.shape[-1]}, so its circuits are not maps of the stream."
        )

    def replace(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:  # ctrl passes it three times: for values, keys and queries
            return tuple(given if one is args[0] else one for one in args), kwargs
        return args, kwargs | {"hidden_states": given}

    return subject.plain.run(subject.tokens, hooks={module: replace}).calls[place]


@torch.no_grad()
def _pruning(subject: _Subject) -> None:
    """The pruned model equals the full model with these heads' outputs at 0."""
    smaller: Any = prune(subject.model, subject.some_heads)
    headless = "logits" in subject.model.limits
    logits = subject.own(body_of(smaller) if headless else smaller)
    expected = subject.zeroed(subject.some_heads).logits
    agree(logits, expected, subject.tolerance, "logits of the pruned model")


@torch.no_grad()
def _padding(subject: _Subject, side: str) -> None:
    """Real positions are unaffected by padding."""
    if (reason := subject.model.limits.get("text")) is not None:
        raise UnsupportedModelError(reason)
    length = subject.tokens.shape[1]
    real = torch.ones(2, length, dtype=torch.bool, device=subject.tokens.device)
    real[0, slice(0, 9) if side == "left" else slice(length - 9, length)] = False
    seen = _Everything(wants_values=False)
    logits = seen.run(subject.model, subject.tokens, real)
    for example in range(2):
        shown = real[example]
        alone = subject.plain.run(subject.tokens[example : example + 1, shown])
        what = f"with padding on the {side}"
        agree(logits[example, shown], alone.logits[0], subject.tolerance, f"logits {what}")
        for layer, pattern in zip(subject.layers, alone.patterns, strict=True):
            rows = seen.patterns[layer][example][:, shown][:, :, shown]
            agree(rows, pattern[0].float(), subject.tolerance, f"rows of layer {layer} {what}")
        calls = [] if subject.by_reader else alone.calls
        for layer, call in zip(subject.layers, calls, strict=False):
            z = seen.z[layer][example, shown]
            agree(z, call.z[0], subject.tolerance, f"head outputs of layer {layer} {what}")


@torch.no_grad()
def _batch_size(subject: _Subject) -> None:
    """An example gives the same results alone and at any place in a batch."""
    seen = subject.seen
    for order in ([1], [1, 0]):
        one = _Everything(wants_values=False)
        logits = one.run(subject.model, subject.tokens[order])
        agree(logits, subject.clean.logits[order], subject.tolerance, "logits of other batches")
        for layer in subject.layers:
            rows = seen.patterns[layer][order]
            agree(one.patterns[layer], rows, subject.tolerance, "rows of other batches")
    probe = subject.probe
    captured = [collect(subject.model, probe, batch_size=size) for size in (1, 2)]
    for layer in subject.layers:
        parts = (captured[0][layer].z, captured[1][layer].z)
        agree(*parts, subject.tolerance, f"captured outputs of layer {layer} by batch size")


def _scores(subject: _Subject) -> None:
    """Row scores match those from whole patterns, and every default score is within its bounds."""
    probe, grid = subject.probe, grid_of(subject.model.stacks)
    one = "previous_token" if grid is None else "current_token"
    table = score(subject.model, probe, [one, "entropy"], progress=False)
    for layer, pattern in zip(subject.layers, subject.clean.patterns, strict=True):
        rows = pattern.double().cpu()[:, :, 1 if grid is None else grid.first :]
        keys = rows if grid is None else rows[..., grid.first :]
        there = keys.diagonal(dim1=-2, dim2=-1).mean(-1).mean(0)
        expected = {one: there, "entropy": _entropy(rows).mean(-1).mean(0)}
        for name, value in expected.items():
            actual = torch.tensor(table[name].mean[layer].tolist()).double()
            agree(actual, value, subject.tolerance, f"{name} of layer {layer} and of its pattern")
    for name, scores in score(subject.model, progress=False).items():
        low, high = scores.bounds
        values = torch.tensor(scores.mean[list(subject.layers)].tolist()).double()
        values = values[~values.isnan()]
        ensure(
            bool(values.isfinite().all())
            and (low is None or bool((values >= low - 1e-4).all()))
            and (high is None or bool((values <= high + 1e-4).all())),
            f"{name} leaves its range {scores.bounds}.",
        )


def _entropy(rows: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query"]:
    """Entropy in nats of rows divided by their sum."""
    share = rows / rows.sum(-1, keepdim=True)
    entropy: Tensor = -torch.special.xlogy(share, share).sum(-1)
    return entropy


@torch.no_grad()
def _hooks(subject: _Subject) -> None:
    """A user's hook is called in every pass and is not removed."""
    calls: list[int] = []

    def louder(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * 1.5

    try:
        embeddings = {m.get_input_embeddings() for m in (subject.module, subject.inside)}
    except NotImplementedError:
        raise UnsupportedModelError(
            f"{type(subject.module).__name__} has no get_input_embeddings, which this check needs "
            "to hook the embedding."
        ) from None
    with hooked(embeddings, louder):
        plain = subject.plain.run(subject.tokens)
        count = len(calls)
        seen = _Everything(wants_values=False)
        logits = seen.run(subject.model, subject.tokens)
        ensure(len(calls) > count, "a hook on the embedding is not called.")
        agree(logits, plain.logits, subject.tolerance, "logits under a hook on the embedding")
        count = len(calls)
        subject.own(subject.inside)
        ensure(len(calls) > count, "a hook on the embedding is gone after a pass.")


def _fail(_view: TapView) -> None:
    raise ZeroDivisionError


@torch.no_grad()
def _restored(subject: _Subject) -> None:
    """A pass leaves mode, attention implementation, hooks and weights as they were."""
    before = _state(subject)
    edit = zero(subject.some_heads[0])
    subject.run(subject.tokens, edits=(edit,))
    ensure(_state(subject) == before, "a pass leaves the model changed.")
    try:
        subject.model.run(
            subject.probe, reads={Tap("z", subject.layers[-1]): _fail}, writes=writes_of((edit,))
        )
    except ZeroDivisionError:
        pass
    else:
        raise CheckError("a reader that fails goes unnoticed.")
    ensure(_state(subject) == before, "a pass that fails leaves the model changed.")
    with _training(subject.inside):
        training = _state(subject)
        try:
            logits = subject.run(subject.tokens)
        except HeadscopeError:
            logits = None
        ensure(_state(subject) == training, "a pass in training mode leaves the model changed.")
    if logits is not None:
        agree(logits, subject.clean.logits, subject.tolerance, "logits of a pass in training mode")
    with torch.no_grad():
        again = subject.own(subject.module)
    agree(again, subject.clean.logits, subject.tolerance, "the model's own logits afterwards")


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.train()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _state(subject: _Subject) -> Any:
    """State that a pass must not change, as one comparable value."""
    parts = [*subject.module.named_modules(), *subject.inside.named_modules()]
    return (
        [(name, part.training, sorted(part.__dict__), _hook_counts(part)) for name, part in parts],
        [attention_name(config) for config in subject.plain.configs],
        [(name, float(p.detach().double().sum())) for name, p in subject.module.named_parameters()],
    )


def _hook_counts(part: nn.Module) -> tuple[int, ...]:
    return (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))


def _not_a_number(subject: _Subject) -> None:
    """A model with NaN weights is refused, and NaN does not pass comparisons."""
    nan = torch.tensor([float("nan")])
    ensure(not relative_gap(nan, torch.zeros(1)) <= 1.0, "a comparison with NaN passes.")
    refuse_nan(subject.module, subject.reader(subject.layers[-1]))


_CHECKS: tuple[tuple[str, Callable[[_Subject], None]], ...] = (
    ("shape", _shape),
    ("logits", _logits),
    ("rows", _rows),
    ("head outputs", _outputs),
    ("values", _values),
    ("zero ablation", _zero_ablation),
    ("write", _write),
    ("unembedding", _unembedding),
    ("attribution", _attribution),
    ("OV circuit", _ov),
    ("QK circuit", _qk),
    ("pruning", _pruning),
    ("padding left", lambda subject: _padding(subject, "left")),
    ("padding right", lambda subject: _padding(subject, "right")),
    ("batch size", _batch_size),
    ("scores", _scores),
    ("hooks", _hooks),
    ("restored", _restored),
    ("not a number", _not_a_number),
)


def _no_cache(subject: _Subject) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in subject.plain.accepts else {}
