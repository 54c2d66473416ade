"""Forward passes over a probe that hand on each attention layer as it completes and drop it.

This module does not know what is computed from a layer. :func:`stream` is the engine under every
scorer; :func:`collect` returns whole patterns and head outputs for use in a notebook.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from headscope.base.arguments import checked
from headscope.base.batches import PATCHES, PIXELS
from headscope.base.options import RunOptions, free_cached_memory, is_out_of_memory
from headscope.base.result import Listed
from headscope.base.stacks import all_causal, grid_of
from headscope.errors import HeadscopeError, InputError
from headscope.heads import ModelShape
from headscope.models.protocol import Edit, HeadModel, embedding_of, need_model, stack_of
from headscope.models.taps import (
    Reader,
    Reads,
    Tap,
    TapView,
    Texts,
    Write,
    at_final,
    writes_of,
)
from headscope.probes.probe import Probe
from headscope.views import Unembedding

# Default number of tokens in one forward pass.
_TOKENS_PER_PASS = 8192
_SEEN_BYTES = 1 << 27  # rows held at once when checking whether a query sees the next token
Reading = TypeVar("Reading", bound=Reader)
Found = TypeVar("Found")


@checked
def stream(
    model: HeadModel,
    probe: Probe,
    make_reader: Callable[[Probe, int], Reading],
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[slice, Reading]]:
    """Run the model over a probe batch by batch, and yield each batch's finished reader.

    When memory runs out, the batch is run again with a fresh reader: as two halves, and at a single
    example with ``halvings`` raised, by which the reader can cut its own chunks. A pass stops as
    soon as everything was read.

    Args:
        model: the model.
        probe: what to run; no longer than the model's context.
        make_reader: ``(batch of the probe, halvings) -> reader``; its method ``reads(shape)``
            returns functions by tap (:meth:`HeadModel.run`).
        batch_size: examples per pass; default: about 8192 tokens.

    Raises:
        InputError: if the probe does not fit the model.

    Example:
        >>> class Sizes:
        ...     def reads(self, shape):
        ...         return {("z", 0): self.keep}
        ...     def keep(self, view):
        ...         self.size = view.value.norm(dim=-1).mean((0, 1))
        >>> passes = hs.capture.stream(model, probe, lambda batch, halvings: Sizes(), batch_size=1)
        >>> [reader.size.shape[0] == model.shape.n_heads for _, reader in passes]
        [True, True]
    """

    def run(batch: Probe, halvings: int) -> Reading:
        reader = make_reader(batch, halvings)
        nothing = torch.empty(0, dtype=torch.long)
        model.run(batch, reads=reader.reads(model.shape), logits_at=nothing)
        return reader

    return passes(model, probe, run, batch_size=batch_size)


@checked
def passes(
    model: HeadModel,
    probe: Probe,
    run: Callable[[Probe, int], Found],
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[slice, Found]]:
    """Run a function on batches of a probe, and yield its result for each.

    When memory runs out, the batch is run again: as two halves, and at a single example with
    ``halvings`` raised, by which the function can cut its own chunks.

    Args:
        model: the model.
        probe: what to run; no longer than the model's context.
        run: ``(batch of the probe, halvings) -> result``; it runs the model.
        batch_size: examples per pass; default: about 8192 tokens.

    Raises:
        InputError: if the probe does not fit the model.

    Example:
        >>> found = hs.capture.passes(model, probe, lambda batch, _: len(batch), batch_size=1)
        >>> [size for _, size in found]
        [1, 1]
    """
    options = RunOptions(batch_size)
    probe = seen_by(model, probe)
    check_fits(model, probe)
    probe = probe.on_grid(grid_of(model.stacks))
    size = options.per_pass(probe.length, _TOKENS_PER_PASS)
    start, halvings, turns_at = 0, 0, model.shape.turns_at
    while start < len(probe):
        chosen = slice(start, min(start + size, start + _alike(probe, start, turns_at)))
        batch = probe.examples(chosen)
        full = False
        try:
            found = run(batch, halvings)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            full = True
        if full:
            free_cached_memory()
            size, halvings = _halved(len(batch), halvings, probe)
            continue
        yield chosen, found
        start = chosen.stop


def _alike(probe: Probe, start: int, turns_at: int | None) -> int:
    """Number of examples from ``start`` on that get the same rotary angles in one pass."""
    if turns_at is None:
        return len(probe) - start
    beyond = (probe.host.real[start:].sum(1) > turns_at).tolist()
    return next((at for at, one in enumerate(beyond) if one != beyond[0]), len(beyond))


def _halved(size: int, halvings: int, probe: Probe) -> tuple[int, int]:
    """Halve the batch or, at one example, the chunks."""
    if size > 1:
        return size // 2, halvings
    if halvings >= 10:
        raise HeadscopeError(
            f"one example of {probe.length} positions does not fit in memory, even with the "
            "smallest chunks: use shorter texts or a device with more memory."
        )
    return size, halvings + 1


@checked
def on_grid_of(model: HeadModel, probe: Probe) -> Probe:
    """Cut a probe's images into patches as the model does; text probes are unchanged.

    Args:
        model: the model that will read it.
        probe: any probe.

    Raises:
        InputError: if either argument has the wrong type.

    Example:
        >>> hs.capture.on_grid_of(model, probe) is probe
        True
    """
    need_model(model)
    need_probe(probe)
    return probe.on_grid(grid_of(model.stacks))


@checked
def need_probe(probe: object) -> None:
    """Refuse anything but a probe, such as a text or a token tensor.

    Args:
        probe: value to check.

    Raises:
        InputError: with how to make a probe.

    Example:
        >>> need_probe(probe)
    """
    if not isinstance(probe, Probe):
        raise InputError(
            f"a {type(probe).__name__} is not a probe: make one with hs.probes, for example "
            "hs.probes.text(model, texts) or hs.probes.from_tokens(ids)."
        )


@checked
def seen_by(model: HeadModel, probe: Probe) -> Probe:
    """The probe that a stack's queries belong to: in an encoder, the source.

    Args:
        model: model of one attention stack.
        probe: any probe.

    Example:
        >>> hs.capture.seen_by(model, probe) is probe
        True
    """
    need_model(model)
    need_probe(probe)
    (stack,) = model.stacks.values()
    return probe.of_source if stack.queries == "source" and not _is_source(probe) else probe


def _is_source(probe: Probe) -> bool:
    return "decoder_input_ids" in probe.inputs


@checked
def check_fits(model: HeadModel, probe: Probe, *, answers: bool = False) -> None:
    """Raise InputError if the probe is longer than the model's context or has unknown tokens.

    Args:
        model: the model that will read the probe.
        probe: any probe.
        answers: whether logits of its tokens and targets are needed; some models have logits for
            fewer tokens than they read.

    Raises:
        InputError: if the probe does not fit the model.

    Example:
        >>> hs.capture.check_fits(model, probe)
    """
    need_model(model)
    need_probe(probe)
    if (check := getattr(model, "check_batch", None)) is not None:
        check(Texts.of(probe))
    grid = grid_of(model.stacks)
    misfit = probe.batch.misfit(model.name, model.shape.n_ctx, model.shape.d_vocab, grid)
    if misfit is not None:
        raise InputError(misfit)
    if probe.grid is not None and probe.grid != grid:
        raise InputError(
            f"the images of the probe are cut into patches for another model, not as {model.name} "
            "cuts them: make the probe with this model."
        )
    if answers and probe.next_token and not all_causal(model.stacks):
        raise InputError(
            f"the probe's targets are the next tokens, which {model.name} sees, since it reads "
            "in both directions: hide tokens with hs.probes.masked, or give targets=."
        )
    if answers and probe.next_token and PIXELS in probe.inputs:
        _need_unseen_targets(model, probe)
    known = [probe.targets] if probe.foils is None else [probe.targets, probe.foils]
    if probe.sequence != PATCHES:
        known.append(probe.tokens.masked_fill(~probe.real, 0))
    highest = max(int(ids.max()) for ids in known)
    if answers and highest >= model.shape.n_logits:
        if probe.sequence == PATCHES:
            raise InputError(
                f"the probe has the label {highest}, but {model.name} has classes 0 to "
                f"{model.shape.n_logits - 1}."
            )
        raise InputError(
            f"the probe has token {highest}, but {model.name} has logits of tokens 0 to "
            f"{model.shape.n_logits - 1} only: take tokens and targets among those."
        )


@torch.no_grad()
def _need_unseen_targets(model: HeadModel, probe: Probe) -> None:
    """Refuse next-token targets that the model can see, as in a bidirectional prefix.

    Raises:
        InputError: with the number of such targets.
    """
    parts = [reader.seen for _, reader in stream(model, probe, lambda *_: _NextSeen())]
    leaks = int((torch.cat(parts) & (probe.host.targets[:, :-1] >= 0)).sum())
    if leaks:
        raise InputError(
            f"the probe's targets are the next tokens, and {model.name} sees {leaks} of them, "
            "since tokens of an image or a prefix see each other: give targets=, -1 at those "
            "positions."
        )


@dataclass
class _NextSeen:
    """Check whether queries of the first attention layer see the token that follows."""

    seen: Bool[Tensor, "batch query"] = field(default_factory=lambda: torch.zeros(0, 0).bool())

    def reads(self, shape: ModelShape) -> Reads:
        return {Tap("z", shape.attention_layers[0]): self._read}

    def _read(self, view: TapView) -> None:
        batch, length, heads = view.z.shape[:3]
        self.seen = torch.zeros(batch, length - 1, dtype=torch.bool)
        queries = torch.arange(length - 1)
        for part in chunks(queries, 4 * batch * heads * length, _SEEN_BYTES):
            visible = view.rows(part).visible
            inside = part[part + 1 < visible.shape[-1]]
            self.seen[:, inside] = visible[:, inside - int(part[0]), inside + 1].cpu()


@checked
@torch.no_grad()
def losses_by_position(
    model: HeadModel, probe: Probe, edits: Sequence[Edit] = ()
) -> Float[Tensor, "batch pos"]:
    """Cross-entropy per position in nats, on the CPU; NaN where the probe has no target.

    Takes one pass up to the last residual stream, and never holds the logits of all positions, so
    that peak memory does not grow with length times vocabulary. Logits are not rounded to half
    precision, unlike those that a half-precision model returns. If the unembedding cannot be read,
    the model's own logits are used.

    Args:
        model: from :func:`headscope.load`.
        probe: with targets; -1 if there are none.
        edits: head edits.

    Example:
        >>> losses = hs.capture.losses_by_position(model, probe)
        >>> losses.shape == probe.tokens.shape
        True
    """
    targets = probe.host.targets
    wanted = targets >= 0
    found = torch.full(targets.shape, torch.nan)
    rows, unembedding = final_rows(model, probe, wanted, writes=writes_of(edits))
    asked = targets[wanted].to(rows.device)
    if unembedding is None:
        found[wanted] = cross_entropy(rows.float(), asked, reduction="none").cpu()
    else:
        found[wanted] = unembedding.losses(rows.float(), asked).cpu()
    return found


@checked
def loss_sum(
    model: HeadModel,
    probe: Probe,
    targets: Int[Tensor, "batch pos"],
    *,
    reads: Mapping[Tap, Callable[[TapView], Any]] | None = None,
    writes: Mapping[Tap, Write] | None = None,
) -> Float[Tensor, ""]:
    """Sum of the cross-entropy of some targets in nats, to take gradients of.

    As in :func:`losses_by_position`, logits of all positions exist nowhere: those of a few are made
    again when the gradient passes through them.

    Args:
        model: from :func:`headscope.load`.
        probe: texts.
        targets: token asked for at every position; -1 if there is none.
        reads: what else to read of the pass.
        writes: what to change in it.

    Example:
        >>> total = hs.capture.loss_sum(model, probe, probe.targets)
        >>> bool(total > 0)
        True
    """
    rows, unembedding = final_rows(model, probe, targets >= 0, reads=reads, writes=writes)
    asked = targets[targets >= 0].to(rows.device)
    if unembedding is None:
        return cross_entropy(rows.float(), asked, reduction="sum")
    return unembedding.losses(rows, asked).sum()


@checked
def logits_where(
    model: HeadModel,
    probe: Probe,
    where: Bool[Tensor, "batch pos"],
    *,
    reads: Mapping[Tap, Callable[[TapView], Any]] | None = None,
    writes: Mapping[Tap, Write] | None = None,
) -> Float[Tensor, "row d_vocab"]:
    """Logits of some positions, in fp32; of others none are computed.

    Args:
        model: from :func:`headscope.load`.
        probe: texts.
        where: positions that are wanted; rows are in their order.
        reads: what else to read of the pass.
        writes: what to change in it.

    Example:
        >>> last = torch.nn.functional.one_hot(probe.last, probe.length).bool()
        >>> hs.capture.logits_where(model, probe, last).shape[0] == len(probe)
        True
    """
    rows, unembedding = final_rows(model, probe, where, reads=reads, writes=writes)
    return rows.float() if unembedding is None else unembedding.logits(rows)


@checked
def final_rows(
    model: HeadModel,
    probe: Probe,
    where: Bool[Tensor, "batch pos"],
    *,
    reads: Mapping[Tap, Callable[[TapView], Any]] | None = None,
    writes: Mapping[Tap, Write] | None = None,
) -> tuple[Float[Tensor, "row width"], Unembedding | None]:
    """Last residual stream at some positions, with what makes logits of it.

    Args:
        model: from :func:`headscope.load`.
        probe: texts.
        where: positions that are wanted; rows are in their order.
        reads: what else to read of the pass.
        writes: what to change in it.

    Returns:
        Rows in fp32 and the unembedding; the model's own logits and None if its unembedding cannot
        be read.

    Example:
        >>> rows, unembedding = hs.capture.final_rows(model, probe, probe.targets >= 0)
        >>> unembedding.logits(rows).shape[1] == model.shape.d_vocab
        True
    """
    taken, made, grad = dict(reads or {}), dict(writes or {}), torch.is_grad_enabled()
    at = where.cpu().nonzero(as_tuple=True)
    if "unembedding" in model.limits:
        places = at[1].unique()
        logits = model.run(probe, reads=taken, writes=made, logits_at=places, grad=grad)
        assert logits is not None  # noqa: S101  # they were asked for
        return logits[at[0], torch.searchsorted(places, at[1])], None
    last: list[Tensor] = []
    nothing = torch.empty(0, dtype=torch.long)
    taken |= at_final(last.append)
    model.run(probe, reads=taken, writes=made, logits_at=nothing, grad=grad)
    return last[0][at].float(), model.unembedding


@checked
def chunks(
    positions: Int[Tensor, " query"], bytes_per_query: int, budget: int
) -> Iterator[Int[Tensor, " query"]]:
    """Cut query positions into runs whose rows fit a budget, at least one query each.

    Args:
        positions: query positions.
        bytes_per_query: memory of one query's rows over all examples and heads.
        budget: bytes.

    Example:
        >>> [len(chunk) for chunk in hs.capture.chunks(torch.arange(10), 100, 450)]
        [4, 4, 2]
    """
    return iter(positions.split(max(1, budget // max(1, bytes_per_query))))


@dataclass(frozen=True, eq=False, repr=False)
class CapturedLayer(Listed):
    """Whole patterns and head outputs of one layer, in fp32 on the CPU.

    Attributes:
        heads: which heads the head axes hold.
        pattern: attention probabilities.
        z: attention-weighted values before the output projection.
    """

    heads: tuple[int, ...]
    pattern: Float[Tensor, "batch head query key"]
    z: Float[Tensor, "batch pos head d_head"]


@dataclass
class _Collector:
    heads: Mapping[int, tuple[int, ...]]
    layers: dict[int, CapturedLayer] = field(default_factory=dict)

    def reads(self, _shape: ModelShape) -> Reads:
        return {Tap("z", layer): self._keep for layer in self.heads}

    def _keep(self, view: TapView) -> None:
        chosen = self.heads[view.layer]
        index = list(chosen)
        rows = view.rows(torch.arange(view.n_queries))
        self.layers[view.layer] = CapturedLayer(
            heads=chosen,
            pattern=rows.pattern[:, index].cpu(),
            z=view.z[:, :, index].float().cpu().clone(),
        )


@checked
def collect(
    model: HeadModel,
    probe: Probe,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    *,
    stack: str | None = None,
    batch_size: int | None = None,
) -> dict[int, CapturedLayer]:
    """Collect whole attention patterns and head outputs of some layers and heads.

    Takes ``4 * batch * heads * length^2`` bytes per layer, so use it for a few heads.

    Args:
        model: the model.
        probe: examples to run.
        layers: layers to use. Default: all with attention.
        heads: which heads of each; default: all.
        stack: attention stack, in a model with several.
        batch_size: examples per pass.

    Returns:
        ``{layer: CapturedLayer}`` with ``.pattern [batch head query key]``, ``.z [batch pos head
        d_head]``.

    Raises:
        InputError: if the model has no such layer or head.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> acts = collect(model, hs.probes.repeated_tokens(model, length=5, batch=2), layers=[1])
        >>> acts[1].pattern.shape[0]
        2
    """
    need_model(model)
    model = stack_of(model, stack=stack)
    shape = model.shape
    asked: dict[str, object] = {"layers": layers, "heads": heads}
    for name, given in asked.items():
        if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
            raise InputError(f"{name}={given!r}: give a list of numbers, as {name}=[0, 1].")
    wanted_layers = tuple(shape.attention_layers if layers is None else layers)
    wanted_heads = tuple(range(shape.n_heads) if heads is None else heads)
    for layer in wanted_layers:
        if layer not in shape.attention_layers:
            raise InputError(f"{model.name} has no attention in layer {layer}.")
    for head in wanted_heads:
        if not 0 <= head < shape.n_heads:
            raise InputError(f"{model.name} has heads 0 to {shape.n_heads - 1}, not {head}.")
    chosen = dict.fromkeys(wanted_layers, wanted_heads)
    parts = [
        reader.layers
        for _, reader in stream(
            model, probe, lambda _batch, _halvings: _Collector(chosen), batch_size=batch_size
        )
    ]
    return {
        layer: CapturedLayer(
            heads=wanted_heads,
            pattern=torch.cat([part[layer].pattern for part in parts]),
            z=torch.cat([part[layer].z for part in parts]),
        )
        for layer in sorted(wanted_layers)
    }


@checked
@torch.no_grad()
def embeddings(
    model: HeadModel, probe: Probe, pooling: str | None = None, *, batch_size: int | None = None
) -> Float[Tensor, "batch width"]:
    """One embedding per example, in fp32 on the CPU.

    Args:
        model: the model; needs no attention heads.
        probe: examples to run.
        pooling: how the vector is pooled; see :class:`headscope.metrics.EmbeddingMetric`.
        batch_size: examples per pass.

    Raises:
        UnsupportedModelError: if the model does not return the requested vector.

    Example:
        >>> hs.capture.embeddings(model, probe).shape == (len(probe), model.shape.d_model)
        True
    """
    speaker, first = embedding_of(model, pooling), torch.tensor([0])
    runs = passes(
        model, probe, lambda batch, _: speaker.run(batch, logits_at=first), batch_size=batch_size
    )
    return torch.cat([said[:, 0].float().cpu() for _, said in runs if said is not None])
