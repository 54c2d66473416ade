"""Encoder-decoders of transformers: three attention stacks, each as a ``HeadModel``.

Which stack an attention layer belongs to is told by one pass over a source and a target of
different lengths: queries and keys are counted. A stack is run by running the whole model, with
taps in its layers alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.base.batches import TEXT, TOKENS, Batch
from headscope.base.result import Glance, Shown
from headscope.base.stacks import MaskRule, Stack
from headscope.errors import InputError, ModelLoadError, UnsupportedModelError, nearest
from headscope.heads import ModelShape
from headscope.models.attention import AttentionCall
from headscope.models.hf.evidence import text_for
from headscope.models.hf.hooks import Call, after, before, entering, hooked
from headscope.models.hf.interface import know_cross, register
from headscope.models.hf.layout import (
    LayerParts,
    Layout,
    choose_projections,
    find_final_norm,
    number_layers,
    watching,
)
from headscope.models.hf.measured import Watch, added_scales, is_pointwise, write_scales
from headscope.models.hf.passes import AttentionTaps
from headscope.models.hf.taps import Pass, Tapped
from headscope.models.hf.transformers_api import attention_named, takes_attention_functions
from headscope.models.hf.weights import bias, projection_matrix
from headscope.models.proof import Gap, LoadCheck, Proof, gap, rounding
from headscope.models.protocol import Edit, glance_of
from headscope.models.running import Digest, all_weights, answer, need_gradients, pass_over, runs_on
from headscope.models.taps import Read, Reads, TapView, Texts, Write, at_layers
from headscope.views import HeadWeights, Unembedding

SOURCE, TARGET = "source", "target"
FEATURES = "input_features"
_SOURCE_NAMES = ("input_ids", FEATURES)
# By stack: its mask, and the sequences that queries and keys run over.
_STACKS: Mapping[str, tuple[MaskRule, str, str]] = {
    "encoder": (MaskRule("bidirectional"), SOURCE, SOURCE),
    "decoder": (MaskRule("causal"), TARGET, TARGET),
    "cross": (MaskRule("cross"), TARGET, SOURCE),
}
# Examples, source tokens and target tokens of the pass that tells stacks apart.
_TINY = (2, 5, 4)
# The same of the pass that a model is proved on.
_PROOF = (2, 24, 17)
_NEEDS_SOURCE = (
    "reads a source and a target: give a probe of both, hs.probes.translation(model, sources, "
    "targets) or hs.probes.from_batch of input_ids (or input_features) and decoder_input_ids."
)


def is_seq2seq(module: Any) -> bool:
    """Whether a transformers module has an encoder and a decoder that reads it."""
    return bool(getattr(module.config, "is_encoder_decoder", False))


@dataclass(frozen=True, eq=False)
class Sides:
    """Inputs of an encoder-decoder: source and target side.

    Attributes:
        source: token ids or, of a model of sound, features.
        source_real: False at padding; None for features.
        target: token ids that the decoder reads.
        target_real: False at padding; None: no padding.
    """

    source: Tensor
    source_real: Bool[Tensor, "batch source"] | None
    target: Int[Tensor, "batch target"]
    target_real: Bool[Tensor, "batch target"] | None

    @classmethod
    def of(cls, texts: Texts, name: str) -> "Sides":
        """Both sides of a batch whose tokens belong to either.

        Raises:
            InputError: if one is missing.
        """
        beside, mask = texts.inputs, texts.inputs.get("attention_mask")
        features = beside.get(FEATURES)
        if (decoder := beside.get("decoder_input_ids")) is not None:
            target_mask = beside.get("decoder_attention_mask")
            real = None if target_mask is None else target_mask.bool()
            source = texts.tokens if features is None else features
            return cls(source, texts.real if features is None else None, decoder, real)
        given = beside.get("input_ids") if features is None else features
        if given is None:
            raise InputError(f"{name} {_NEEDS_SOURCE}")
        source_real = None if mask is None or features is not None else mask.bool()
        return cls(given, source_real, texts.tokens, texts.real)


class Seq2SeqModel(Shown, checks=False):
    """An encoder-decoder whose attention goes through transformers' attention registry.

    Its heads are those of three stacks, ``encoder``, ``decoder`` and ``cross``; :meth:`stack` gives
    each as a model that every function of one stack takes.

    Raises:
        UnsupportedModelError: from :meth:`wrap`, where the family cannot be taken apart.
    """

    path: Literal["hf", "bridge"] = "hf"

    def __init__(
        self,
        module: Any,
        layouts: Mapping[str, Layout],
        *,
        frames: int | None = None,
        tokenizer: Any | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Keep the parts; use :meth:`wrap` to find them."""
        self.module = module
        self.tokenizer = tokenizer
        self.name = name or module.config.name_or_path or type(module).__name__
        self.revision = revision
        self.frames = frames
        self.proof = Proof()
        self._digest = Digest()
        self._shifts: dict[tuple[str, str], bool] = {}
        self._views = {one: StackView(self, one, layout) for one, layout in layouts.items()}

    @classmethod
    def wrap(cls, module: Any, **facts: Any) -> "Seq2SeqModel":
        """Take a model apart.

        Raises:
            UnsupportedModelError: if its attention does not go through the registry, or its layers
                are not those of three stacks.
        """
        register()
        if not takes_attention_functions(module):
            raise UnsupportedModelError(
                "its attention is code of its own and not one of transformers' attention functions."
            )
        watch, logits = _watched(module)
        layouts = _layouts(module, watch, logits)
        for parts in layouts["cross"].layers.values():
            know_cross(parts.attention)
        encoder = next(c for m, c in watch.calls if m in layouts["encoder"].by_attention())
        frames = encoder.query.shape[2] if module.main_input_name == FEATURES else None
        return cls(module, layouts, frames=frames, **facts)

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """Attention stacks by name."""
        return MappingProxyType({name: view.stacks[name] for name, view in self._views.items()})

    def stack(self, name: str) -> "StackView":
        """One attention stack as a model.

        Args:
            name: ``encoder``, ``decoder`` or ``cross``.

        Raises:
            InputError: if there is no such stack.
        """
        if name not in self._views:
            raise InputError(nearest(name, self._views, kind=f"stack of {self.name}"))
        return self._views[name]

    @property
    def shape(self) -> ModelShape:
        """Not available: each stack has its own shape."""
        raise self._several()

    def _several(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.name} has the attention stacks {', '.join(self._views)}: choose one, "
            "model.stack('cross')."
        )

    @property
    def unembedding(self) -> Unembedding:
        """Not available: choose a stack."""
        raise self._several()

    @property
    def parts(self) -> Any:
        """Not available: choose a stack."""
        raise self._several()

    @property
    def bridge(self) -> Any:
        """Not available: choose a stack."""
        raise self._several()

    def weights(self, layer: int) -> HeadWeights:
        """Not available: choose a stack."""
        raise self._several()

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Not available: choose a stack."""
        raise self._several()

    def edited(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """Not available: choose a stack."""
        raise self._several()

    def forward(self, tokens: Int[Tensor, "batch pos"], **options: Any) -> Tensor:
        """Not available, since tokens are only one side; :meth:`run` takes a probe."""
        raise InputError(f"{self.name} {_NEEDS_SOURCE}")

    @property
    def has_logits(self) -> bool:
        """Whether it gives a logit of every token at every position."""
        return self._views["decoder"].layout.has_logits

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embedding = self.module.get_input_embeddings()
        return runs_on(embedding, embedding.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def limits(self) -> Mapping[str, str]:
        """Analyses that do not apply to this family, with reasons; fewer apply to its stacks."""
        return self._views["decoder"].limits

    def digest(self) -> str:
        """SHA-256 that stands for the current weights."""
        return self._digest.of(all_weights(self.module))

    def glance(self) -> Glance:
        """Show the stacks and their sizes."""
        rows = [
            (name, f"{stack.n_layers} layers of {stack.n_heads} heads, d_head {stack.d_head}")
            for name, stack in self.stacks.items()
        ]
        return Glance(
            f"model {self.name}",
            [str(self.dtype).removeprefix("torch."), f"on {self.device}"],
            ("stack", ""),
            rows,
            hint="hs.score(model, hs.probes.translation(model, sources, targets))",
        )

    def run(
        self,
        batch: Any,
        *,
        reads: Mapping[Any, Read] = MappingProxyType({}),
        writes: Mapping[Any, Write] = MappingProxyType({}),
        until: Any = None,
        logits_at: Int[Tensor, " at"] | None = None,
        prompt: int | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch at d_vocab"] | None:
        """Run the model once, with taps of one stack, ``Tap("z", 0, "cross")``; see ``HeadModel``.

        Args:
            batch: a probe of source and target.
            reads: functions by tap.
            writes: functions by tap.
            until: tap after which the pass stops.
            logits_at: target positions whose logits are returned; None: all.
            prompt: target positions from this one on count as decoding.
            grad: track gradients.

        Raises:
            InputError: if taps are of several stacks, or of none.
        """
        taps = [*reads, *writes, *([] if until is None else [until])]
        named = {tap[2] if len(tap) > 2 else "" for tap in taps if not isinstance(tap, str)}
        if len(named) > 1 or "" in named:
            raise InputError(
                f"taps of {self.name} are of one stack a pass ({', '.join(self._views)}): write "
                "Tap('z', 0, 'cross')."
            )
        return self.stack(next(iter(named), "decoder")).run(
            batch,
            reads=reads,
            writes=writes,
            until=until,
            logits_at=logits_at,
            prompt=prompt,
            grad=grad,
        )

    # What the model is called with.

    def inputs(self, sides: Sides) -> dict[str, Any]:
        """Arguments of a pass.

        Raises:
            InputError: if the source is not what the model reads.
            UnsupportedModelError: if it reads padded texts in another way.
        """
        self._need_padding(SOURCE, sides.source_real)
        self._need_padding(TARGET, sides.target_real)
        target, real = self._filled(sides.target, sides.target_real)
        given = {"decoder_input_ids": target, "decoder_attention_mask": real, "use_cache": False}
        if (self.module.main_input_name == FEATURES) != sides.source.is_floating_point():
            reads = self.module.main_input_name
            raise InputError(f"{self.name} reads {reads}, and the source is something else.")
        if sides.source.is_floating_point():
            return given | {FEATURES: sides.source.to(self.device, self.dtype)}
        source, shown = self._filled(sides.source, sides.source_real)
        return given | {"input_ids": source, "attention_mask": shown}

    def _filled(self, tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens with the model's own padding, by which some families count positions."""
        shown = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        pad = getattr(self.module.config, "pad_token_id", None)
        filled = tokens.clone() if pad is None else tokens.where(shown, pad)
        return filled.to(self.device), shown.long().to(self.device)

    def _need_padding(self, side: str, real: Tensor | None) -> None:
        if real is None or bool(real.all()):
            return
        for place, column in (("before", 0), ("behind", -1)):
            if not bool(real[:, column].all()) and self._changed_by(side, place):
                other = "on the right" if place == "before" else "to one length"
                raise UnsupportedModelError(
                    f"{self.name} ({self.module.config.model_type}) reads a {side} otherwise when "
                    f"padding stands {place} it: pad {other}."
                )

    def _changed_by(self, side: str, place: str) -> bool:
        """Whether padding before or behind a sequence changes what the model says."""
        if (side, place) not in self._shifts:
            self._shifts[side, place] = False  # the pass below asks again
            try:
                self._shifts[side, place] = self._changes(side, place)
            except BaseException:
                del self._shifts[side, place]
                raise
        return self._shifts[side, place]

    @torch.no_grad()
    def _changes(self, side: str, place: str) -> bool:
        sides = tiny_sides(self.module)
        tokens = sides.source if side == SOURCE else sides.target
        wide = torch.cat(
            [tokens[:, :2], tokens] if place == "before" else [tokens, tokens[:, :2]], 1
        )
        real = torch.ones_like(wide, dtype=torch.bool)
        real[:, slice(0, 2) if place == "before" else slice(-2, None)] = False
        other = (
            replace(sides, source=wide, source_real=real)
            if side == SOURCE
            else replace(sides, target=wide, target_real=real)
        )
        with pass_over(self.module):
            alone, padded = (self.answer(one) for one in (sides, other))
        at = slice(2, None) if side == TARGET and place == "before" else slice(alone.shape[1])
        allowed = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        return not bool((padded[:, at] - alone).abs().max() <= allowed * alone.abs().max())

    def answer(self, sides: Sides) -> Tensor:
        """What the model says of every target position, in a pass that the caller holds."""
        return answer(self.module(**self.inputs(sides))).float()

    @cached_property
    @torch.no_grad()
    def pointwise_head(self) -> nn.Module | None:
        """Module that makes logits at each target position of that position alone.

        Proved by a tiny pass: given one position, it gives that position's logits. None if there is
        no such module.
        """
        if not self.has_logits:
            return None
        inputs, seen = self.inputs(tiny_sides(self.module)), list[tuple[nn.Module, Any]]()

        def note(module: nn.Module, _call: Call, output: Any) -> None:
            seen.append((module, output))

        def speak() -> Tensor:
            return answer(self.module(**inputs))

        with pass_over(self.module):
            with hooked(after(one, note) for one in self.module.modules()):
                whole = speak()
            made = [
                one for one, out in seen if isinstance(out, Tensor) and out.shape == whole.shape
            ]
            return made[0] if len(made) == 1 and is_pointwise(made[0], speak, whole) else None

    # What its decoder reads for a target.

    def decoder_inputs(
        self, labels: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
    ) -> Int[Tensor, "batch pos"]:
        """Decoder inputs that make it predict some tokens: those, shifted after a start token.

        Args:
            labels: tokens that each position should predict.
            real: False at padding.

        Raises:
            InputError: if the config names no token that a target begins with.
        """
        own = getattr(self.module, "prepare_decoder_input_ids_from_labels", None)
        filled, _ = self._filled(labels, real)
        pad = getattr(self.module.config, "pad_token_id", None)
        if callable(own) and pad is not None:
            # T5's asks the config for a start token, which the generation config may hold alone.
            with suppress(AttributeError, ValueError):
                made: Tensor = own(labels=filled)
                return made.to(labels.device)
        start = self._start
        first = torch.full_like(labels[:, :1], start)
        return torch.cat([first, labels[:, :-1]], 1)

    @property
    def _start(self) -> int:
        for config in (self.module.config, getattr(self.module, "generation_config", None)):
            if (start := getattr(config, "decoder_start_token_id", None)) is not None:
                return int(start)
        raise InputError(
            f"the config of {self.name} names no decoder_start_token_id, with which a target "
            "begins."
        )

    @torch.no_grad()
    def translate(self, source: Tensor, real: Tensor | None, length: int) -> Tensor:
        """Targets by greedy generation, the start token included.

        Args:
            source: token ids, or features.
            real: False at padding; None for features.
            length: tokens that are generated at most.
        """
        given: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": length}
        if real is None:
            given[self.module.main_input_name] = source.to(self.device)
        else:
            given["input_ids"], given["attention_mask"] = self._filled(source, real)
        with pass_over(self.module):
            made: Tensor = self.module.generate(**given)
        return made.cpu()


class StackView(Tapped, Shown, checks=False):
    """One attention stack of an encoder-decoder as a model; passes run the whole model.

    Positions are those of its queries: of the source in the encoder, else of the target. Logits are
    the decoder's.
    """

    path: Literal["hf", "bridge"] = "hf"

    def __init__(self, whole: Seq2SeqModel, name: str, layout: Layout) -> None:
        """Keep the parts."""
        self.whole = whole
        self.layout = layout
        self.shape = layout.shape
        self.stack_name = name
        self.module = whole.module
        self.name, self.revision = whole.name, whole.revision
        self.tokenizer: Any | None = whole.tokenizer

    @property
    def mask(self) -> MaskRule:
        """Rule of the stack."""
        return self.layout.mask

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """This stack alone."""
        shape, name = self.shape, self.stack_name
        mask, queries, keys = _STACKS[name]
        sizes = (shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.d_head)
        return MappingProxyType({name: Stack(name, *sizes, mask, queries, keys, shape.windows)})

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.whole.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.whole.dtype

    @property
    def has_logits(self) -> bool:
        """Whether the model gives a logit of every token at every target position."""
        return self.layout.has_logits

    @property
    def limits(self) -> Mapping[str, str]:
        """What the stack cannot be asked, and why."""
        family = f"{self.name} ({self.module.config.model_type})"
        later = f"circuits of {family}, an encoder-decoder, are not read from its weights yet."
        names = ("ov_circuit", "qk_circuit", "qk_size", "embedding", "unembedding", "rotary")
        limits = dict.fromkeys(names, later)
        if not self.mask.causal:
            limits["causal"] = f"queries of the {self.stack_name} of {family} see all its keys."
        if self.mask.kind == "cross":
            limits["one_sequence"] = (
                f"queries of the cross-attention of {family} are target tokens and its keys are "
                "source tokens, so that their positions are not of one text."
            )
        if any(parts.write_scale is None for parts in self.layout.layers.values()):
            limits["linear_write"] = limits["attention_write"] = (
                f"{family} applies a norm after the {self.stack_name}'s attention, so a head's "
                "write into the residual stream is not z @ W_O."
            )
        if not self.has_logits:
            limits["logits"] = f"{family} has no language-model head, so it gives no logits."
        return limits | self.whole.proof.limits

    def blocks_before(self, layer: int) -> tuple[nn.Module, ...]:
        """Modules that run before a layer: its own stack's, and the encoder's before a decoder's.

        Args:
            layer: layer of this stack.
        """
        own = tuple(self.layout.blocks[:layer])
        if self.stack_name == "encoder":
            return own
        return (*self.whole.stack("encoder").layout.blocks, *own)

    def _refused(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{what} of {self.name} ({self.module.config.model_type}), an encoder-decoder, is not "
            "supported yet: rows, head outputs, scores, ablation and alignment are."
        )

    @property
    def unembedding(self) -> Unembedding:
        """Not supported yet."""
        raise self._refused("the unembedding")

    def weights(self, layer: int) -> HeadWeights:
        """Not supported yet."""
        raise self._refused("reading weights by head")

    @property
    def bridge(self) -> Any:
        """Not supported."""
        raise self._refused("a bridge")

    def edited(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """Not supported yet."""
        raise self._refused("a scope of edits")

    @property
    def parts(self) -> "StackParts":
        """Blocks and projections; nothing else is measured."""
        return StackParts(self)

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """``W_O`` as it reaches the residual stream, the family's multiplier included."""
        parts = self.layout.layers[layer]
        weight = projection_matrix(parts.projection, self.shape.n_heads * self.shape.d_head)
        scale = 1.0 if parts.write_scale is None else parts.write_scale
        return weight.reshape(-1, self.shape.d_head, weight.shape[-1]) * scale

    @property
    def final_entry(self) -> nn.Module | None:
        """Module whose input is the decoder's last residual stream; None if it cannot be told."""
        return self.layout.final_norm

    def digest(self) -> str:
        """That of the model."""
        return self.whole.digest()

    def glance(self) -> Glance:
        """Size of the stack and what it cannot be asked."""
        return glance_of(self)

    def n_queries(self, texts: Texts) -> int:
        """Source positions in the encoder, else target positions."""
        sides = Sides.of(texts, self.name)
        if self.stack_name != "encoder":
            return int(sides.target.shape[1])
        frames = self.whole.frames
        return int(sides.source.shape[1]) if frames is None else frames

    def check_batch(self, texts: Texts) -> None:
        """Refuse a batch that the model cannot read, before it runs.

        Raises:
            InputError: if a side is missing or too long, or holds unknown tokens.
        """
        sides = Sides.of(texts, self.name)
        self.whole.inputs(sides)
        embedding = self.module.get_input_embeddings().weight.shape[0]
        for side, tokens, real in (
            (SOURCE, sides.source, sides.source_real),
            (TARGET, sides.target, sides.target_real),
        ):
            if tokens.is_floating_point():
                continue
            shown = torch.ones_like(tokens, dtype=torch.bool) if real is None else real.bool()
            batch = Batch({TOKENS: tokens}, {TEXT: shown})
            limit = _limit(self.module.config, side)
            if (misfit := batch.misfit(self.name, limit, embedding)) is not None:
                raise InputError(misfit.replace("the probe", f"the {side} of the probe"))

    def attention_taps(self, run: Pass) -> AbstractContextManager[None]:
        """Scope in which attention runs with the taps of a pass."""
        return AttentionTaps(run, self.layout).attached()

    def compute(
        self,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"] | None,
        logits_at: Int[Tensor, " at"] | None,
        run: Pass,
    ) -> Float[Tensor, "batch at d_vocab"]:
        """Logits of a pass of the whole model."""
        inputs = self.whole.inputs(Sides.of(Texts(tokens, real, run.inputs), self.name))
        if run.grad:
            need_gradients(self.module, self.name)
        at = None if logits_at is None else logits_at.to(self.device)
        head = None if at is None else self.whole.pointwise_head
        rows = [] if head is None else [entering(head, lambda stream: stream[:, at])]
        with run.attached(), hooked(rows), torch.set_grad_enabled(run.grad):
            logits = answer(self.module(**inputs))
            return logits if at is None or rows else logits[:, at]


@dataclass(frozen=True, eq=False)
class StackParts:
    """Modules of one stack; what is measured of decoders is refused."""

    view: StackView

    def block(self, layer: int) -> nn.Module:
        """Module that is one layer."""
        return self.view.layout.blocks[layer]

    def projection(self, layer: int) -> nn.Module:
        """Output projection of one layer's attention."""
        return self.view.layout.layers[layer].projection

    def writer(self, _layer: int, site: str) -> tuple[nn.Module, float]:
        """Refused: a block of a decoder adds three writes."""
        raise self.view._refused(f"reading {site}")

    def __getattr__(self, name: str) -> Any:
        """Delegate everything else to the measured parts."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise self.view._refused(f"reading {name.replace('_', ' ')}")


# Taking a model apart.


def tiny_sides(module: Any) -> Sides:
    """A small source and target of different lengths."""
    return _sides(module, *_TINY)


def _sides(module: Any, batch: int, source: int, target: int) -> Sides:
    """A source and a target of tokens that differ, or of random features."""
    config = module.config
    embedding = module.get_input_embeddings()
    device = runs_on(embedding, embedding.weight)
    limit = _limit(config, TARGET)
    lengths = [source, target if limit is None else min(target, limit)]
    n_ctx = batch * sum(lengths)
    drawn = text_for(config, embedding.weight.shape[0], None, [])[0]
    text = drawn.repeat(-(-n_ctx // len(drawn)))[:n_ctx].to(device)
    ids, rest = text[: batch * lengths[1]], text[batch * lengths[1] :]
    decoder = ids.view(batch, -1)
    if module.main_input_name != FEATURES:
        limit = _limit(config, SOURCE)
        tokens = rest.view(batch, -1)[:, :limit]
        return Sides(tokens, torch.ones_like(tokens, dtype=torch.bool), decoder, None)
    frames = 2 * config.max_source_positions  # two convolutions, the second of stride two
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(batch, config.num_mel_bins, frames, generator=draw)
    return Sides(features.to(device, module.dtype), None, decoder, None)


def _limit(config: Any, side: str) -> int | None:
    """Longest source or target; None: no limit."""
    for name in (f"max_{side}_positions", "max_position_embeddings"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return None


def _arguments(sides: Sides) -> dict[str, Any]:
    name = FEATURES if sides.source.is_floating_point() else "input_ids"
    return {name: sides.source, "decoder_input_ids": sides.target, "use_cache": False}


def _configs(module: Any) -> tuple[Any, ...]:
    found = (getattr(part, "config", None) for part in module.modules())
    return tuple({id(config): config for config in found if config is not None}.values())


def _watched(module: Any) -> tuple[Watch, Tensor]:
    """One pass over a tiny source and target: what modules did, and what the model says.

    Raises:
        UnsupportedModelError: if it reads neither token ids nor features of sound.
    """
    if (reads := module.main_input_name) not in _SOURCE_NAMES:
        raise UnsupportedModelError(
            f"its encoder reads {reads}, and headscope gives it token ids or {FEATURES}."
        )
    with watching(module, _configs(module)) as watch:
        return watch, answer(module(**_arguments(tiny_sides(module))))


def _layouts(module: Any, watch: Watch, logits: Tensor) -> dict[str, Layout]:
    """Layouts of the three stacks.

    Raises:
        UnsupportedModelError: if the attention calls are not those of three stacks.
    """
    names = {part: name for name, part in module.named_modules()}
    by_stack: dict[str, list[tuple[nn.Module, AttentionCall]]] = {name: [] for name in _STACKS}
    length = _sides(module, *_TINY).target.shape[1]
    for part, call in watch.calls:
        queries, keys = call.query.shape[2], call.key.shape[2]
        kind = "encoder" if queries != length else "decoder" if keys == length else "cross"
        by_stack[kind].append((part, call))
    if missing := [name for name, calls in by_stack.items() if not calls]:
        raise UnsupportedModelError(
            f"it has no attention of its {' and '.join(missing)} that can be told from the rest."
        )
    choose_projections(watch, names)
    return {
        name: _layout(module, watch, name, calls, names, logits) for name, calls in by_stack.items()
    }


def _layout(
    module: Any,
    watch: Watch,
    name: str,
    calls: list[tuple[nn.Module, AttentionCall]],
    names: dict[nn.Module, str],
    logits: Tensor,
) -> Layout:
    mask, queries, _ = _STACKS[name]
    if name != "cross" and {call.mask.kind for _, call in calls} != {mask.kind}:
        raise UnsupportedModelError(f"its {name} does not mask its keys as {mask} attention does.")
    blocks, numbers = number_layers(module, [part for part, _ in calls], names, watch.uses)
    sizes = {
        (c.query.shape[1], c.key.shape[1], c.query.shape[3], c.value.shape[3]) for _, c in calls
    }
    if len(sizes) != 1 or (size := next(iter(sizes)))[2] != size[3]:
        raise UnsupportedModelError(f"the layers of its {name} differ in number or size of heads.")
    windows: list[int | None] = [None] * len(blocks)
    for (_, call), number in zip(calls, numbers, strict=True):
        windows[number] = call.mask.window
    embedding = module.get_input_embeddings().weight
    has_logits = module.get_output_embeddings() is not None
    shape = ModelShape(
        n_layers=len(blocks),
        n_heads=size[0],
        n_kv_heads=size[1],
        d_model=watch.inputs[blocks[numbers[0]]].shape[-1],
        d_head=size[2],
        d_vocab=embedding.shape[0],
        n_ctx=_limit(module.config, queries),
        attention_layers=tuple(numbers),
        windows=tuple(windows),
        d_vocab_out=logits.shape[-1] if has_logits else None,
        stack=name,
    )
    placed = {n: (blocks[n], part) for (part, _), n in zip(calls, numbers, strict=True)}
    scales = added_scales(watch, placed) if name == "cross" else write_scales(watch, placed)
    layers = {
        n: LayerParts(n, part, watch.projections[part], scales[n], None, False)
        for n, (_, part) in placed.items()
    }
    final = None if name == "encoder" else find_final_norm(module, watch, blocks)
    return Layout(shape, layers, blocks, final, _configs(module), mask=mask, has_logits=has_logits)


# Proof at load.


@dataclass
class _Look:
    """Reader that holds rows and head outputs of one stack against the model's own attention."""

    view: StackView
    patterns: Sequence[Tensor]
    real: Bool[Tensor, "batch pos"] | None
    checks: list[LoadCheck]
    score: float = 0.0

    def reads(self, shape: ModelShape) -> Reads:
        """Head outputs of all layers."""
        return at_layers(shape, self._check)

    def _check(self, view: TapView) -> None:
        where = f"of layer {view.layer} of the {self.view.stack_name}"
        number = self.view.shape.attention_layers.index(view.layer)
        rows = view.rows(torch.arange(view.n_queries)).pattern
        own = self.patterns[number].float()
        shown = slice(None) if self.real is None else self.real.to(rows.device)
        seen, expected = (one.transpose(1, 2)[shown] for one in (rows, own))
        matches = view.query_keys(torch.arange(view.n_queries))
        score = float(matches.scores.abs().max())
        self.score = max(self.score, score)
        allowed = max(1e-5, rounding(self.view.dtype, rows.shape[-1], score))
        self.checks.append(
            LoadCheck("rows = the model's own attention", gap(seen, expected, allowed), (), where)
        )
        repeated = view.values().float().repeat_interleave(self.view.shape.group_size, 1)
        z = torch.matmul(rows, repeated).transpose(1, 2)
        self.checks.append(
            LoadCheck("rows x values = z", gap(z, view.z.float(), allowed), ("values", "ov"), where)
        )


@torch.no_grad()
def proof_of(model: Seq2SeqModel) -> tuple[list[LoadCheck], int]:
    """Hold rows, head outputs and logits against a pass of the model on eager attention.

    Every attention layer is given what it was given in that pass, so that a difference belongs to
    the layer that shows it.

    Returns:
        What was compared, and how many tokens there were.

    Raises:
        ModelLoadError: if the model does not run, or gives numbers that are not finite.
    """
    module, sides = model.module, _proof_sides(model)
    views = [model.stack(name) for name in _STACKS]
    reads: dict[nn.Module, Tensor] = {}
    writes: dict[nn.Module, Tensor] = {}

    def read(part: nn.Module, call: Call) -> None:
        reads[part] = call.stream

    def wrote(part: nn.Module, _call: Call, output: Any) -> None:
        writes[part] = output

    every = [parts for view in views for parts in view.layout.layers.values()]
    hooks = [
        hook
        for parts in every
        for hook in (before(parts.attention, read), after(parts.projection, wrote))
    ]
    with pass_over(module), hooked(hooks), attention_named(views[0].layout.configs, "eager"):
        try:
            output = module(**model.inputs(sides), output_attentions=True)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise ModelLoadError(
                f"{model.name} does not run: {type(error).__name__} ({error})."
            ) from error
    own = answer(output).float()
    if not bool(torch.isfinite(own).all()):
        raise ModelLoadError(
            f"{model.name} gives logits that are not finite: its weights hold NaN or infinite "
            "values, or its dtype is too narrow for them (try dtype='float32')."
        )
    patterns = {
        "encoder": output.encoder_attentions,
        "decoder": output.decoder_attentions,
        "cross": output.cross_attentions,
    }
    checks: list[LoadCheck] = []
    texts = _as_texts(sides)
    for view in views:
        shown = sides.source_real if view.stack_name == "encoder" else sides.target_real
        checks += _watched_stack(view, texts, reads, writes, patterns[view.stack_name], shown)
    with pass_over(module):
        logits = model.stack("decoder").answer(texts)
    assert logits is not None  # noqa: S101  # they were asked for
    deep = 4 * len(every)
    allowed = max(1e-3, rounding(model.dtype, deep, 8.0 * deep))
    real = torch.ones_like(sides.target, dtype=torch.bool)
    real = real if sides.target_real is None else sides.target_real
    checks.append(
        LoadCheck("logits = the model's own", gap(logits.float()[real], own[real], allowed), ())
    )
    return checks, int(sides.target.shape[1])


def _watched_stack(
    view: StackView,
    texts: Texts,
    given: Mapping[nn.Module, Tensor],
    wrote: Mapping[nn.Module, Tensor],
    patterns: Sequence[Tensor],
    real: Tensor | None,
) -> list[LoadCheck]:
    """Checks of one stack, whose layers are given what they were given before."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def forced(part: nn.Module, call: Call) -> Call:
        return call.giving(given[part])

    def write(part: nn.Module, call: Call, output: Any) -> None:
        seen[part] = (call.stream, output)

    look = _Look(view, patterns, real, [])
    layers = view.layout.layers
    hooks = [
        hook
        for parts in layers.values()
        for hook in (before(parts.attention, forced), after(parts.projection, write))
    ]
    with pass_over(view.module), hooked(hooks):
        # Written as they are, so that the pass goes on after the last layer was read.
        same = {("z", layer): (lambda z, _span: z.clone()) for layer in layers}
        view.answer(texts, reads=look.reads(view.shape), writes=same)
    checks = look.checks
    if len(checks) != 2 * len(layers):
        checks.append(LoadCheck("every attention layer is seen", Gap(float("inf"), 0.0)))
    return [*checks, *_projections(view, seen, wrote, real, look.score)]


def _projections(
    view: StackView,
    seen: Mapping[nn.Module, tuple[Tensor, Tensor]],
    wrote: Mapping[nn.Module, Tensor],
    real: Tensor | None,
    score: float,
) -> Iterator[LoadCheck]:
    """Whether each projection is its matrix, and writes what it writes without headscope."""
    width = view.shape.n_heads * view.shape.d_head
    for layer, parts in view.layout.layers.items():
        z, made = seen[parts.projection]
        shown = slice(None) if real is None else real.to(made.device)
        weight, constant = projection_matrix(parts.projection, width), bias(parts.projection, width)
        expected = z.float() @ weight.float()
        expected = expected if constant is None else expected + constant.float()
        where = f"layer {layer} of the {view.stack_name}"
        yield LoadCheck(
            "z @ W_O + bias = what the output projection returns",
            gap(expected, made, rounding(view.dtype, width)),
            (),
            f"{where} adds something to z @ W_O (an adapter, or quantised weights)",
        )
        yield LoadCheck(
            "every layer attends as without headscope",
            gap(
                made[shown],
                wrote[parts.projection][shown],
                max(1e-4, rounding(view.dtype, width, score)),
            ),
            (),
            f"{where} attends in a way that headscope does not see",
        )


def _proof_sides(model: Seq2SeqModel) -> Sides:
    """A source and a target of which the second example is padded, on the right."""
    sides = _sides(model.module, *_PROOF)
    target_real = torch.ones_like(sides.target, dtype=torch.bool)
    target_real[1, sides.target.shape[1] - 3 :] = False
    if sides.source_real is None:
        return replace(sides, target_real=target_real)
    source_real = sides.source_real.clone()
    source_real[1, sides.source.shape[1] - 5 :] = False
    return replace(sides, source_real=source_real, target_real=target_real)


def _as_texts(sides: Sides) -> Texts:
    if sides.source_real is None:
        return Texts(sides.target, sides.target_real, {FEATURES: sides.source})
    inputs = {"input_ids": sides.source, "attention_mask": sides.source_real.long()}
    return Texts(sides.target, sides.target_real, inputs)
