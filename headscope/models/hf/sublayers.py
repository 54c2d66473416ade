"""Norms and streams around attention in encoder-decoders; decoding from any encoder layer.

Which norm comes before attention, and which behind it, is told by one small pass: what enters and
leaves every norm is compared with what attention reads and writes.

State-space models have no attention rows, but like every block theirs read the residual stream and
add to it. That is enough to ask what is stored where (:class:`MixerModel`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import InputError, UnsupportedModelError
from headscope.models.hf.hooks import (
    Call,
    Hook,
    after,
    before,
    entering,
    hooked,
    leaving,
    stream_of,
)
from headscope.models.hf.seq2seq import FEATURES, Seq2SeqModel, Sides, StackView, tiny_sides
from headscope.models.hf.weights import bias
from headscope.models.running import answer, pass_over
from headscope.models.taps import Texts


@dataclass(frozen=True, eq=False)
class Around:
    """Modules around one attention.

    Attributes:
        attention: the module itself.
        before: norm whose output attention reads; None if it reads the stream itself.
        behind: norm of the stream with attention's write added; None if there is none.
    """

    attention: nn.Module
    before: nn.Module | None
    behind: nn.Module | None


@dataclass(frozen=True, eq=False)
class Sublayer:
    """What one attention adds its write to.

    Attributes:
        bias: bias of the output projection; zeros if there is none.
        gain, offset, epsilon: parameters of the layer norm after it; None, None, 0 if there is
            none.
    """

    bias: Float[Tensor, " d_model"]
    gain: Float[Tensor, " d_model"] | None
    offset: Float[Tensor, " d_model"] | None
    epsilon: float


def _is_norm(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return (
        isinstance(weight, Tensor) and weight.ndim == 1 and not any(True for _ in part.children())
    )


@torch.no_grad()
def arounds(view: StackView) -> dict[int, Around]:
    """Norms around the attention of every layer of a stack.

    Args:
        view: a stack of an encoder-decoder.

    Raises:
        UnsupportedModelError: if something else stands there.
    """
    layers = view.layout.layers
    reads: dict[nn.Module, Tensor] = {}
    wrote: dict[nn.Module, Tensor] = {}
    norms: list[tuple[nn.Module, Tensor, Tensor]] = []

    def read(part: nn.Module, call: Call) -> None:
        reads[part] = call.stream

    def write(part: nn.Module, _call: Call, output: Any) -> None:
        wrote[part] = output

    def note(part: nn.Module, call: Call, output: Any) -> None:
        norms.append((part, call.stream, output))

    hooks = [after(part, note) for part in view.module.modules() if _is_norm(part)]
    for parts in layers.values():
        hooks += [before(parts.attention, read), after(parts.projection, write)]
    sides = tiny_sides(view.module)
    with pass_over(view.module), hooked(hooks):
        view.whole.answer(sides)
    found = {}
    for number, parts in layers.items():
        stream = reads[parts.attention]
        whole = stream + wrote[parts.projection]
        first = [one for one, _, output in norms if output is stream or _equal(output, stream)]
        behind = [one for one, given, _ in norms if _close(given, whole)]
        own = first[0] if first and parts.write_scale is not None else None
        if own is None and not behind:
            raise UnsupportedModelError(
                f"layer {number} of the {view.stack_name} of {view.name} has no plain norm around "
                "its attention."
            )
        found[number] = Around(parts.attention, own, None if own is not None else behind[0])
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def sublayer(view: StackView, around: Around, layer: int) -> Sublayer:
    """Constants of one layer's attention and of the norm behind it."""
    shape = view.shape
    own = bias(view.layout.layers[layer].projection, shape.n_heads * shape.d_head)
    constant = torch.zeros(shape.d_model, device=view.device) if own is None else own.float()
    norm: Any = around.behind
    if norm is None:
        return Sublayer(constant, None, None, 0.0)
    offset = norm.bias if norm.bias is not None else torch.zeros_like(norm.weight)
    return Sublayer(constant, norm.weight.float(), offset.float(), float(norm.eps))


@contextmanager
def keeping_streams(
    view: StackView, kept: dict[int, Tensor], known: dict[int, Around]
) -> Iterator[None]:
    """Scope in which passes keep the residual stream that each attention adds its write to.

    Args:
        view: a stack.
        kept: filled by layer, before the layer's taps are read.
        known: from :func:`arounds`.
    """

    def keep(layer: int) -> Any:
        def act(_part: nn.Module, call: Call) -> None:
            kept[layer] = call.stream.detach().float()

        return act

    with hooked(
        before(one.before if one.before is not None else one.attention, keep(layer))
        for layer, one in known.items()
    ):
        yield


# The decoder on an intermediate layer of the encoder.


@dataclass(frozen=True, eq=False)
class EncoderStates:
    """Outputs of every layer of an encoder.

    Attributes:
        layers: what enters the first layer, then what leaves each, ``[batch pos d_model]``.
        norm: the encoder's final norm; None if it has none.
        final: what the decoder reads.
    """

    layers: Sequence[Float[Tensor, "batch pos d_model"]]
    norm: nn.Module | None
    final: Float[Tensor, "batch pos d_model"]

    def at(self, layer: int, norm: bool) -> Float[Tensor, "batch pos d_model"]:
        """The state that a decoder is to read: of a layer, through the final norm if wanted."""
        if layer == len(self.layers) - 1 and norm:
            return self.final
        state = self.layers[layer]
        made: Tensor = self.norm(state) if norm and self.norm is not None else state
        return made


@torch.no_grad()
def encoder_states(model: Seq2SeqModel, texts: Texts) -> EncoderStates:
    """Run the encoder and keep what leaves each of its layers.

    Args:
        model: an encoder-decoder.
        texts: a source and a target.

    Raises:
        UnsupportedModelError: if something else than a norm follows its last layer.
    """
    view = model.stack("encoder")
    blocks = view.layout.blocks
    entered: list[Tensor] = []
    left: list[Tensor] = []
    norms: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [before(blocks[0], lambda _part, call: entered.append(call.stream))]
    hooks += [
        after(block, lambda _part, _call, output: left.append(stream_of(output)))
        for block in blocks
    ]
    hooks += [
        after(part, lambda part, call, output: norms.append((part, call.stream, output)))
        for part in view.module.modules()
        if _is_norm(part)
    ]
    sides = Sides.of(texts, model.name)
    with pass_over(model.module), hooked(hooks):
        final = model.module(**model.inputs(sides)).encoder_last_hidden_state
    last = left[len(blocks) - 1]
    found = [one for one, given, made in norms if _equal(given, last) and _equal(made, final)]
    norm = found[0] if found else None
    if norm is None and not _close(last, final):
        raise UnsupportedModelError(
            f"what follows the last layer of the encoder of {model.name} is not a norm."
        )
    return EncoderStates([entered[0], *left[: len(blocks)]], norm, final)


@torch.no_grad()
def read_state(
    model: Seq2SeqModel,
    state: Float[Tensor, "batch source d_model"],
    texts: Texts,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a decoder that reads a state in place of its encoder's output.

    Args:
        model: an encoder-decoder.
        state: from :meth:`EncoderStates.at`.
        texts: a source, of which only the mask is used, and a target.
    """
    from transformers.modeling_outputs import BaseModelOutput

    given = model.inputs(Sides.of(texts, model.name))
    given = {name: one for name, one in given.items() if name not in ("input_ids", FEATURES)}
    with pass_over(model.module):
        said = model.module(encoder_outputs=BaseModelOutput(last_hidden_state=state), **given)
    return answer(said).float()


@torch.no_grad()
def write_from(
    model: Seq2SeqModel,
    state: Float[Tensor, "batch source d_model"],
    texts: Texts,
    length: int,
) -> Int[Tensor, "batch length"]:
    """Greedy output of a decoder that reads a given state, without the start token.

    Args:
        model: an encoder-decoder.
        state: from :meth:`EncoderStates.at`.
        texts: a source and a target, of which only the first token is used.
        length: length of the written text.
    """
    sides = Sides.of(texts, model.name)
    written = sides.target[:, :1].to(model.device)
    for _ in range(length):
        now = replace(sides, target=written, target_real=None)
        logits = read_state(model, state, _texts_of(now))
        written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
    return written[:, 1:].cpu()


def _texts_of(sides: Sides) -> Texts:
    beside: dict[str, Tensor] = {}
    if sides.source_real is None:
        beside[FEATURES] = sides.source
    else:
        beside = {"input_ids": sides.source, "attention_mask": sides.source_real.long()}
    return Texts(sides.target, sides.target_real, beside)


def need_encoder_decoder(model: Any) -> Seq2SeqModel:
    """The whole encoder-decoder that a model is, or is a stack of.

    Raises:
        InputError: if it is none.
    """
    whole = getattr(model, "whole", model)
    if not isinstance(whole, Seq2SeqModel):
        raise InputError(
            f"{getattr(model, 'name', type(model).__name__)} is not an encoder-decoder: it has no "
            "source that a decoder reads."
        )
    return whole


MIXER_SITES = ("resid_pre", "mixer_out", "mlp_out", "resid_post")
# What families call the part of a block that moves information between positions, and the other.
_MIXERS = (
    "mixer", "self_attn", "attn", "attention", "self_attention", "mamba", "linear_attn", "conv",
    "temporal_block", "time_mixer", "operator",
)  # fmt: skip
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "mlp_block", "moe")
SublayerName = tuple[str, int]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MixerModel:
    """A transformers language model as a sequence of blocks.

    Attributes:
        name: name of the model.
        module: the model.
        blocks: in order.
    """

    name: str
    module: nn.Module
    blocks: tuple[nn.Module, ...]

    @classmethod
    def of(cls, module: Any, name: str | None = None) -> "MixerModel":
        """Find the blocks of a model.

        Raises:
            UnsupportedModelError: if there is not one row of blocks.
        """
        title = name or type(module).__name__
        count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
        rows = [
            tuple(part)
            for part in module.modules()
            if isinstance(part, nn.ModuleList) and len(part) == count
        ]
        rows = [row for row in rows if all(_named(block, _MIXERS) is not None for block in row)]
        if len(rows) != 1:
            raise UnsupportedModelError(
                f"{title}: no single row of {count} blocks with a mixer each was found, so what "
                "enters and leaves its mixers cannot be told."
            )
        return cls(title, module, rows[0])

    def places(self) -> list[SublayerName]:
        """Sites and layers that can be read and written."""
        found = []
        for site in MIXER_SITES:
            for layer, block in enumerate(self.blocks):
                if site != "mlp_out" or _named(block, _MLPS) is not None:
                    found.append((site, layer))
        return found

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        reads: Mapping[SublayerName, Callable[[Tensor], Any]] | None = None,
        writes: Mapping[SublayerName, Change] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a pass with values at some places read or changed."""
        hooks = [
            _hook(self._module(place), place[0], _reader(read))
            for place, read in (reads or {}).items()
        ]
        hooks += [
            _hook(self._module(place), place[0], change) for place, change in (writes or {}).items()
        ]
        device = next(self.module.parameters()).device
        with self._pass(hooks):
            output: Any = self.module(input_ids=tokens.to(device), use_cache=False)
        logits: Tensor = output.logits
        return logits.float()

    @contextmanager
    def _pass(self, hooks: list[Hook]) -> Iterator[None]:
        with torch.no_grad(), pass_over(self.module), hooked(hooks):
            yield

    def _module(self, place: SublayerName) -> nn.Module:
        site, layer = place
        block = self.blocks[layer]
        if site in ("resid_pre", "resid_post"):
            return block
        found = _named(block, _MIXERS if site == "mixer_out" else _MLPS)
        assert found is not None  # noqa: S101  # places() names no other
        return found


def _named(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The one part of a block that has such a name; None if none or several have."""
    found = [part for name, part in block.named_children() if name in names]
    return found[0] if len(found) == 1 else None


def _reader(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor | None]:
    def act(value: Tensor) -> None:
        read(value)

    return act


def _hook(module: nn.Module, site: str, act: Callable[[Tensor], Tensor | None]) -> Hook:
    return entering(module, act) if site == "resid_pre" else leaving(module, act)
