"""Suffix replay: record a clean pass, then recompute only what an edit can change.

An edit of layer l reruns blocks l to n, from its first position on. In stacked passes, a few
queries attend to keys shared by all variants and to keys of their own variant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.edits import Span, Stacked, Variant, first_layer, first_position, stack
from headscope.heads import ModelShape
from headscope.models.attention import AttentionCall, fused, visible_keys
from headscope.models.hf.hooks import Call, after, before, entering, hooked, returning, stream_of
from headscope.models.hf.interface import mask_facts, routed, with_facts
from headscope.models.hf.layout import LayerParts
from headscope.models.hf.passes import at_tap, written_attention, written_call
from headscope.models.hf.taps import replaced, written
from headscope.models.running import MEASURING, Finished, held, pass_over, use_of
from headscope.models.taps import Read, Reads, Tap, TapView, Texts, at_final, at_layers, writes_of
from headscope.views import Unembedding

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel
    from headscope.models.hf.seq2seq import StackView


@dataclass
class Recording:
    """Recorded clean pass over a batch.

    Attributes:
        blocks: how each block was called.
        z: head outputs before the output projection, by layer.
        key, value: keys and values as used by attention, by layer.
        returns: by layer, how many values the attention module returns; None: one bare tensor.
        final: input of the final norm.
    """

    batch: int
    length: int
    real: Bool[Tensor, "batch pos"] | None = None
    blocks: list[Call] = field(default_factory=list)
    z: dict[int, Float[Tensor, "batch pos head d_head"]] = field(default_factory=dict)
    key: dict[int, Float[Tensor, "batch kv_head pos d_head"]] = field(default_factory=dict)
    value: dict[int, Float[Tensor, "batch kv_head pos d_head"]] = field(default_factory=dict)
    returns: dict[int, int | None] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.empty(0))

    def is_padding_mask(self, value: Tensor) -> bool:
        """Whether a tensor is a padding mask over keys, and not per-position data."""
        if self.real is None or value.shape != self.real.shape or value.is_floating_point():
            return False
        return torch.equal(value.bool(), self.real.to(value.device))

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to record."""

        def kept_in(found: dict[int, Tensor]) -> Callable[[TapView], None]:
            return lambda view: found.update({view.layer: view.value})

        sites = {"z": self.z, "key": self.key, "value": self.value}
        kept = [at_layers(shape, kept_in(found), site) for site, found in sites.items()]
        return kept[0] | kept[1] | kept[2] | at_final(self._end)

    def _end(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        self.final = residual


@torch.no_grad()
def record(
    model: "HFModel", tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None
) -> Recording:
    """Run a batch once without edits, and record what replays need."""
    model.learn_padding(real)
    recording = Recording(len(tokens), tokens.shape[1], real)
    with ExitStack() as hooks:
        hooks.enter_context(pass_over(model.module))
        hooks.enter_context(quick_activations(model))
        at_block = _at_block(model.module, recording)
        hooks.enter_context(hooked(before(block, at_block) for block in model.layout.blocks))
        attentions = model.layout.layers.items()
        hooks.enter_context(
            hooked(
                after(one.attention, _at_attention(recording, layer)) for layer, one in attentions
            )
        )
        nothing = torch.empty(0, dtype=torch.long)
        model.run(Texts(tokens, real), reads=recording.reads(model.shape), logits_at=nothing)
    return recording


def _at_block(model: nn.Module, recording: Recording) -> Callable[[nn.Module, Call], None]:
    use = use_of(model)

    def hook(_module: nn.Module, call: Call) -> None:
        if use.running() is not MEASURING:  # measure how the family counts padding, before the pass
            recording.blocks.append(call)

    return hook


def _at_attention(recording: Recording, layer: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _call: Call, output: Any) -> None:
        recording.returns[layer] = len(output) if isinstance(output, tuple) else None

    return hook


def fitted(value: Any, recording: Recording, copies: int, first: int) -> Any:
    """Adapt a block's argument to a batch stacked ``copies`` times, from position ``first`` on.

    Tensors with a batch axis first are repeated; those whose next (or only) axis is the position
    are cut, except the padding mask, which is over keys and stays whole.
    """
    if isinstance(value, tuple | list):
        return type(value)(fitted(one, recording, copies, first) for one in value)
    if isinstance(value, dict):
        return {key: fitted(one, recording, copies, first) for key, one in value.items()}
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if (facts := mask_facts(value)) is not None:  # it is marked as a mask over keys
        if facts.keys is None:
            return with_facts(repeated_batch(value, copies), facts)
        keys = repeated_batch(facts.keys, copies)
        stacked = repeated_batch(value, copies) if value.shape[0] == recording.batch else value
        return with_facts(stacked, replace(facts, keys=keys))
    if value.ndim == 1:
        return value[first:] if len(value) == recording.length else value
    if value.shape[1] == recording.length and not recording.is_padding_mask(value):
        value = value[:, first:]
    return value if value.shape[0] != recording.batch else repeated_batch(value, copies)


def repeated_batch(value: Tensor, copies: int) -> Tensor:
    """Repeat the batch axis, with whole batches one after another."""
    if copies == 1:
        return value
    spread = value.unsqueeze(0).expand(copies, *value.shape)
    return spread.reshape(-1, *value.shape[1:])


@contextmanager
def quick_activations(model: "HFModel") -> Iterator[None]:
    """Within a scope, run the tanh form of GELU in one fused kernel, equal to 2e-7.

    transformers' version makes eight passes over memory, about 15% of a block's time on a CPU.
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    fused = torch.nn.GELU(approximate="tanh")
    with held(model.module), ExitStack() as stack:
        for module in set(model.layout.blocks.modules()):
            if type(module) in (NewGELUActivation, FastGELUActivation):
                stack.enter_context(replaced(module, "forward", fused.forward))
        yield


@dataclass(frozen=True, eq=False)
class Resumable:
    """Recorded clean pass from which later passes take their first blocks.

    For models whose blocks cannot run separately: encoders with heads of several layers, image
    models, encoder-decoders. Blocks before the first edit return their recorded outputs, and
    everything else is the model's own forward; a stack that feeds the edited one, such as a
    decoder's encoder, is not rerun.

    Attributes:
        batch: number of examples.
        outputs: recorded output of each block.
        attended: what attention of each layer returned, less the first tensor.
        z: head outputs before the output projection, by layer.
    """

    model: "HFModel | StackView"
    batch: int
    outputs: Mapping[nn.Module, Any]
    attended: Mapping[int, Any]
    z: Mapping[int, Float[Tensor, "batch pos head d_head"]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: "HFModel | StackView", texts: Texts) -> "Resumable | None":
        """Run a batch once without edits; None if a block runs more than once, or not at all.

        Args:
            model: model to run.
            texts: batch to run.
        """
        blocks = model.blocks_before(model.shape.n_layers)
        use, found, runs = use_of(model.module), dict[nn.Module, Any](), list[nn.Module]()
        attended, z = dict[int, Any](), dict[int, Tensor]()

        def keep(module: nn.Module, _call: Call, output: Any) -> None:
            if use.running() is not MEASURING:
                found[module] = output
                runs.append(module)

        def attention(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _call: Call, output: Any) -> None:
                if use.running() is not MEASURING:
                    rest = output if isinstance(output, Tensor) else output[1:]
                    attended[layer] = None if isinstance(output, Tensor) else rest

            return hook

        if len(set(blocks)) != len(blocks):
            return None
        layers = model.layout.layers
        hooks = [after(block, keep) for block in blocks]
        hooks += [after(one.attention, attention(layer)) for layer, one in layers.items()]
        reads = at_layers(model.shape, lambda view: z.update({view.layer: view.value}))
        with hooked(hooks):
            model.run(texts, reads=reads, logits_at=torch.zeros(1, dtype=torch.long))
        if len(runs) != len(blocks) or set(runs) != set(blocks):
            return None
        return cls(model, len(texts.tokens), found, attended, z)

    @contextmanager
    def before(self, layer: int, copies: int) -> Iterator[None]:
        """Scope in which blocks before a layer return their recorded outputs.

        Args:
            layer: first layer that runs.
            copies: number of stacked copies of the batch.
        """
        with held(self.model.module), ExitStack() as scope:
            for block in self.model.blocks_before(layer):
                output = self._times(self.outputs[block], copies)
                scope.enter_context(replaced(block, "forward", partial(_given, output)))
            yield

    @contextmanager
    def edited(
        self, layer: int, edits: Sequence[Stacked], rows: Int[Tensor, " row"] | None = None
    ) -> Iterator[None]:
        """Within a scope, run no more of a stack of variants than their edits can change.

        Attention of the first edited layer is not computed where only head outputs are edited,
        since these are known. The last block is computed at some rows alone, where it is told that
        only they are read.

        Args:
            layer: first layer that runs.
            edits: of all variants, for the positions of the pass.
            rows: positions of the last block that are read; None: all. Others become 0.
        """
        blocks, layers = self.model.layout.blocks, self.model.layout.layers
        copies, last = len(edits[0].variants) if edits else 1, len(blocks) - 1
        changed = [edit for edit in edits if layer in edit.layers]
        is_given = layer in layers and bool(changed) and all(one.site == "z" for one in changed)
        alone = is_given and layer == last  # attention of the last block is known
        cut = rows if layer <= last and (alone or self._can_cut(edits)) else None
        with self.before(layer, copies), ExitStack() as scope:
            if is_given:
                shown = cut if alone else None
                known = partial(self._known, layers[layer], changed[0], copies, shown)
                scope.enter_context(replaced(layers[layer].attention, "forward", known))
            if cut is not None:
                few = _FewRows(layers[last], blocks[last].forward, cut)
                scope.enter_context(replaced(blocks[last], "forward", few.block))
                if not alone:
                    scope.enter_context(replaced(layers[last].attention, "forward", few.attend))
            yield

    def _can_cut(self, edits: Sequence[Stacked]) -> bool:
        """Whether the last block runs at some rows: attention's input is known, nothing edited."""
        last = len(self.model.layout.blocks) - 1
        parts = self.model.layout.layers.get(last)
        if parts is None or any(last in edit.layers for edit in edits):
            return False
        return parts.input_norm is not None or parts.reads_residual

    def _known(
        self,
        parts: LayerParts,
        edit: Stacked,
        copies: int,
        rows: Int[Tensor, " row"] | None,
        *_args: Any,
        **_kwargs: Any,
    ) -> Any:
        """What attention of a layer returns with its head outputs edited."""
        z = edit.spread(parts.layer, self.z[parts.layer])
        flat = (z if rows is None else z[:, rows]).flatten(-2)
        inside = any(module is parts.projection for module in parts.attention.modules())
        made = parts.projection(flat) if inside else flat
        rest = self.attended[parts.layer]
        return made if rest is None else (made, *self._times(tuple(rest), copies))

    def _times(self, value: Any, copies: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._times(one, copies) for one in value)
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != self.batch:
            return value
        return repeated_batch(value, copies)


@dataclass
class _FewRows:
    """A block that is computed at some rows, and 0 at the others.

    Attributes:
        parts: its attention.
        forward: its own.
        rows: positions that are computed.
    """

    parts: LayerParts
    forward: Callable[..., Any]
    rows: Int[Tensor, " row"]
    attention: Callable[..., Any] = field(init=False)
    stream: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        """Keep the forward of its attention, which sees all positions."""
        self.attention = self.parts.attention.forward

    def block(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the block."""
        call = Call(args, kwargs)
        self.stream = call.stream
        some = call.giving(self.stream[:, self.rows])
        output = self.forward(*some.args, **some.kwargs)
        made = stream_of(output)
        whole = made.new_zeros(*self.stream.shape[:2], made.shape[-1])
        whole[:, self.rows] = made
        return returning(output, whole)

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for its attention."""
        norm = self.parts.input_norm
        call = Call(args, kwargs).giving(self.stream if norm is None else norm(self.stream))
        output = self.attention(*call.args, **call.kwargs)
        return returning(output, stream_of(output)[:, self.rows])


def _given(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return output


# Up to this many queries, separate scores are cheaper than copying the shared keys and values.
_FEW = 32
_SCORE_ENTRIES = 1 << 23


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of the positions before the replayed ones, shared by all variants."""

    key: Float[Tensor, "batch kv_head prefix d_head"]
    value: Float[Tensor, "batch kv_head prefix d_value"]
    copies: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.key.shape[2]


def joined(call: AttentionCall, prefix: Prefix) -> AttentionCall:
    """Prepend the shared keys and values to a call's own."""
    if prefix.length == 0:
        return call
    key = torch.cat([repeated_batch(prefix.key, prefix.copies), call.key], dim=2)
    value = torch.cat([repeated_batch(prefix.value, prefix.copies), call.value], dim=2)
    return replace(call, key=key, value=value)


def attend(
    call: AttentionCall, prefix: Prefix, queries: Int[Tensor, " query"] | None = None
) -> Float[Tensor, "stacked query head d_value"]:
    """Attention output of a replayed layer.

    Args:
        call: queries, keys and values of the replayed positions; its padding mask is whole.
        prefix: shared keys and values before them.
        queries: replayed positions to use, counted from the first; None: all.
    """
    n_queries = call.n_queries if queries is None else len(queries)
    n_keys = prefix.length + call.n_keys
    entries = call.query.shape[0] * call.query.shape[1] * n_queries * n_keys
    if n_queries > _FEW or entries > _SCORE_ENTRIES or (queries is None and prefix.length == 0):
        z = fused(joined(call, prefix))
        return z if queries is None else z[:, queries]
    if queries is None:
        queries = torch.arange(call.n_queries, device=call.query.device)
    return _few(call, prefix, queries)


def _few(
    call: AttentionCall, prefix: Prefix, queries: Int[Tensor, " query"]
) -> Float[Tensor, "stacked query head d_value"]:
    """Exact softmax over both sets of keys, without a copy of the shared ones."""
    stacked, kv_heads, own, d_head = call.key.shape
    copies, group = prefix.copies, call.query.shape[1] // kv_heads
    batch = stacked // copies
    query = call.query[:, :, queries].float() * call.scaling
    rows = group * len(queries)
    by_group = query.reshape(copies, batch, kv_heads, rows, d_head)
    shared = by_group.permute(1, 2, 0, 3, 4).reshape(batch, kv_heads, copies * rows, d_head)
    before = torch.matmul(shared, prefix.key.float().mT)
    before = before.reshape(batch, kv_heads, copies, rows, -1).permute(2, 0, 1, 3, 4)
    after = torch.matmul(by_group.flatten(0, 1), call.key.float().mT)
    scores = torch.cat([before.reshape(stacked, kv_heads, rows, -1), after], dim=-1)
    n_keys = prefix.length + own
    visible = visible_keys(
        prefix.length + queries, slice(0, n_keys), stacked, mask=call.mask, real=call.real
    )
    pattern = call.softmax(scores.reshape(stacked, -1, len(queries), n_keys), visible)
    pattern = pattern.reshape(copies, batch, kv_heads, rows, n_keys).to(call.value.dtype)
    over = pattern[..., : prefix.length].permute(1, 2, 0, 3, 4)
    over = torch.matmul(over.reshape(batch, kv_heads, copies * rows, -1), prefix.value)
    z = over.reshape(batch, kv_heads, copies, rows, -1).permute(2, 0, 1, 3, 4).flatten(0, 1)
    z = z + torch.matmul(pattern[..., prefix.length :].flatten(0, 1), call.value)
    return z.reshape(stacked, -1, len(queries), z.shape[-1]).transpose(1, 2)


# The last block is only cut to the positions read if that saves at least half of them.
_LEAN_SHARE = 0.5
_NOTHING: Mapping[Tap, Read] = MappingProxyType({})


class _HeadOutputs(Exception):  # noqa: N818  # carries a result out of a module, no error
    def __init__(self, z: Tensor) -> None:
        self.z = z


@dataclass(frozen=True, eq=False)
class Replay:
    """Runs variants of a recorded pass.

    Attributes:
        read: mask of the positions whose last residual stream is needed.
        prefix: reuse positions before the first edit.
        lean: compute the last block only at the positions read.
    """

    model: "HFModel"
    recording: Recording
    read: Bool[Tensor, "batch pos"]
    prefix: bool = True
    lean: bool = True

    @cached_property
    def on_host(self) -> Bool[Tensor, "batch pos"]:
        """``read`` on the CPU, moved there once to avoid device syncs per stack."""
        return self.read.cpu()

    def start(self, variant: Variant) -> tuple[int, int]:
        """First block and first position that a variant must run."""
        layer = first_layer(variant)
        at = self.model.shape.n_layers - 1 if layer is None else layer
        if not (
            self.prefix and self.model.mask.causal
        ):  # otherwise later edits affect earlier positions
            return at, 0
        return at, min(first_position(variant), int(self.on_host.any(0).int().argmax()))

    @cached_property
    def _unembedding(self) -> Unembedding:
        return self.model.unembedding

    @torch.no_grad()
    def run(
        self, variants: Sequence[Variant], reads: Mapping[Tap, Read] = _NOTHING
    ) -> Float[Tensor, "row d_model"] | None:
        """Rerun the model with edits from the recording, equivalent to :meth:`HeadModel.run`.

        Args:
            variants: edits of each variant; they are stacked in one batch, variants outermost.
            reads: functions by tap, for queries, keys and values at all positions. The run then
                stops once all are read.

        Returns:
            Last residual stream of every variant at the positions read; None if it stopped.
        """
        starts = [self.start(variant) for variant in variants]
        layer, first = min(s[0] for s in starts), min(s[1] for s in starts)
        if reads:
            layer, first = min(layer, *(tap.layer or 0 for tap in reads)), 0
        length, real = self.recording.length, self.recording.real
        real = None if real is None else real.repeat(len(variants), 1)
        span = replace(Span.whole(length).part(first, length - first), real=real)
        edits = tuple(one.during(span) for one in stack(variants))
        run = _Suffix(self, len(variants), layer, first, edits, reads)
        layout = self.model.layout
        with (
            pass_over(self.model.module),
            quick_activations(self.model),
            routed(layout.configs, run.attend, layout.by_attention()),
            suppress(Finished),
        ):
            return run.through()
        return None

    @torch.no_grad()
    def logits(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Logits of some last residual streams, computed with the model's own modules."""
        model, unembedding = self.model, self._unembedding
        with pass_over(model.module):
            normed = model.layout.final_norm(rows) if model.layout.final_norm is not None else rows
            logits: Tensor = model.layout.unembedding(normed)
        if unembedding.logit_scale != 1:
            logits = logits * unembedding.logit_scale
        if unembedding.soft_cap is not None:
            logits = unembedding.soft_cap * torch.tanh(logits / unembedding.soft_cap)
        return logits


@dataclass
class _Suffix:
    """One stacked pass through the blocks from ``layer`` on, over positions from ``first`` on."""

    replay: Replay
    copies: int
    layer: int
    first: int
    edits: tuple[Stacked, ...]
    reads: Mapping[Tap, Read]
    queries: Int[Tensor, " read"] | None = None
    arguments: dict[int, Any] = field(default_factory=dict)
    seen: set[Tap] = field(default_factory=set)

    def through(self) -> Float[Tensor, "row d_model"]:
        recording, blocks = self.replay.recording, self.replay.model.layout.blocks
        hidden = repeated_batch(recording.blocks[self.layer].stream[:, self.first :], self.copies)
        read = self.replay.on_host[:, self.first :]
        for layer in range(self.layer, len(blocks)):
            if layer == len(blocks) - 1 and self._can_be_lean(read):
                queries = read.any(0).nonzero().squeeze(1)
                self.queries, read = queries.to(hidden.device), read[:, queries]
            hidden = self._block(layer, blocks[layer], hidden)
        by_variant = hidden.unflatten(0, (self.copies, -1))
        rows: Tensor = by_variant[:, *read.nonzero(as_tuple=True)].flatten(0, 1)
        return rows

    def _can_be_lean(self, read: Tensor) -> bool:
        parts = self.replay.model.layout.layers.get(len(self.replay.recording.blocks) - 1)
        if not self.replay.lean or parts is None or self.reads:
            return False
        plain = parts.input_norm is not None or parts.reads_residual
        return plain and int(read.any(0).sum()) <= _LEAN_SHARE * read.shape[1]

    def _block(self, layer: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run one block, with attention given or computed."""
        parts = self.replay.model.layout.layers.get(layer)
        with ExitStack() as stack_:
            if parts is not None:
                self._prepare(layer, parts, hidden, stack_)
            given = hidden if self.queries is None else hidden[:, self.queries]
            after: Tensor = stream_of(self._called(layer, block, given))
        return after

    def _prepare(self, layer: int, parts: LayerParts, hidden: Tensor, scope: ExitStack) -> None:
        """Choose how this layer's attention is computed."""
        edit = next((e for e in self.edits if e.site == "z" and layer in e.layers), None)
        if self._is_given(layer):
            z = self.replay.recording.z[layer][:, self.first :]
            z = repeated_batch(z, self.copies) if edit is None else edit.spread(layer, z)
            write = parts.projection(
                (z if self.queries is None else z[:, self.queries]).flatten(-2)
            )
            scope.enter_context(
                replaced(parts.attention, "forward", partial(self._returned, layer, write))
            )
        elif self.queries is not None:
            lean = partial(self._lean, parts, edit, parts.attention.forward, hidden)
            scope.enter_context(replaced(parts.attention, "forward", lean))
        elif edit is not None:
            hook = entering(parts.projection, partial(self._at_projection, layer, edit))
            scope.enter_context(hooked([hook]))

    def _is_given(self, layer: int) -> bool:
        """Whether attention need not run, since its output is known."""
        here = [edit for edit in self.edits if layer in edit.layers]
        if any(edit.site != "z" for edit in here) or any(tap.layer == layer for tap in self.reads):
            return False
        n_heads = self.replay.model.shape.n_heads
        return layer == self.layer or any(edit.covers(layer, n_heads) for edit in here)

    def _returned(self, layer: int, write: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """Stand in for an attention module whose output is known."""
        n = self.replay.recording.returns[layer]
        return write if n is None else (write, *[None] * (n - 1))

    def _lean(
        self,
        parts: LayerParts,
        edit: Stacked | None,
        attention: Callable[..., Any],
        hidden: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Stand in for an attention module that is called with the positions read alone."""
        normed = hidden if parts.input_norm is None else parts.input_norm(hidden)
        call = Call(args, kwargs).giving(normed)
        try:
            attention(*call.args, **call.kwargs)
        except _HeadOutputs as found:
            z = found.z
        if edit is not None:  # it is over all positions
            whole = z.new_zeros(len(z), hidden.shape[1], *z.shape[2:])
            whole[:, self.queries] = z
            z = edit(parts.layer, whole)[:, self.queries]
        return self._returned(parts.layer, parts.projection(z.flatten(-2)))

    def _at_projection(self, layer: int, edit: Stacked, given: Tensor) -> Tensor:
        shape = self.replay.model.shape
        z = given.unflatten(-1, (shape.n_heads, shape.d_head))
        return edit(layer, z).flatten(-2)

    def _called(self, layer: int, block: nn.Module, hidden: Tensor) -> Any:
        call = self.replay.recording.blocks[layer].changed(self._argument).giving(hidden)
        return block(*call.args, **call.kwargs)

    def _shown(self, tap: Tap, value: Tensor) -> Tensor:
        """Pass a tap to its reader; end the run once everything is read."""
        if tap in self.reads:
            self.reads[tap](TapView(tap, Span.whole(self.replay.recording.length), None, value))
            self.seen.add(tap)
            if len(self.seen) == len(self.reads):
                raise Finished
        return value

    def _argument(self, value: Any) -> Any:
        """Argument adapted to this stack, cached since blocks share most arguments."""
        if id(value) not in self.arguments:
            recording = self.replay.recording
            self.arguments[id(value)] = fitted(value, recording, self.copies, self.first)
        return self.arguments[id(value)]

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Compute attention of one layer, including edits of queries, keys, values and patterns."""
        layer = self.replay.model.layout.by_attention()[module].layer
        recording, before = self.replay.recording, slice(0, self.first)
        call = replace(call, layer=layer)
        # Edits were cut to the positions that run, so they treat these as the whole text.
        span = Span.whole(call.n_queries)
        sources = [writes_of(self.edits)]
        call = written_call(
            call,
            span,
            lambda tap, value, here: self._shown(tap, written(tap, value, sources, here)),
        )
        prefix = Prefix(
            recording.key[layer][:, :, before], recording.value[layer][:, :, before], self.copies
        )
        if writes := at_tap(Tap("pattern", layer), sources):
            z = written_attention(joined(call, prefix), writes, span)
            z = z if self.queries is None else z[:, self.queries]
        else:
            z = attend(call, prefix, self.queries)
        if self.queries is not None:
            raise _HeadOutputs(z)
        return z
