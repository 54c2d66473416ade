"""Runs that carry what enters every part in two: the part that comes from a source, and the rest.

The whole runs beside the rests of several sources, stacked in the batch; the relevant part is their
difference, so that both parts sum to the whole at every tap.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.edges.rules import Rules
from headscope.edges.written import EdgeBatch
from headscope.errors import UnsupportedModelError
from headscope.models.taps import Tap, TapView

_SMALL = 1e-8


@dataclass(frozen=True, eq=False)
class NodeWrite:
    """What one node writes, as the relevant part.

    Attributes:
        tap: where it is added to the stream: ``embed``, ``attn_out`` or ``mlp_out``.
        change: what the rest has there in place of what the whole has, as a difference.
    """

    tap: Tap
    change: Float[Tensor, "batch pos d_model"]

    @classmethod
    def of(cls, batch: EdgeBatch, number: int, pos: int | None = None) -> "NodeWrite":
        """A node of the wiring, by its number, at all positions or at one."""
        change = batch.change[:, number]
        if pos is not None:
            alone = torch.zeros_like(change)
            alone[:, pos] = change[:, pos]
            change = alone
        if number == 0:
            return cls(Tap("embed"), change)
        layer, place = divmod(number - 1, batch.study.wiring.n_heads + 1)
        mlp = place == batch.study.wiring.n_heads
        return cls(Tap("mlp_out" if mlp else "attn_out", layer), change)


class SplitRules(Rules):
    """Norms divide whole and rests by the scale of the whole; biases are shared by magnitude.

    Attributes:
        batch: examples; copies of them follow each other, the whole first.
        copies: of the batch, the whole included.
        share_biases: each part gets the bias in proportion to its magnitude; else the rest has it.
        sign_rule: inside MLPs, where parts have opposite signs the larger takes the whole.
    """

    def __init__(self, batch: int, copies: int, share_biases: bool, sign_rule: bool) -> None:
        """Start before the first block."""
        super().__init__()
        self.batch, self.copies = batch, copies
        self.share_biases, self.sign_rule = share_biases, sign_rule

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace norms, and maps with biases."""
        name, given = getattr(func, "__name__", ""), kwargs or {}
        if name in ("rsqrt", "sqrt") and self._stacked(args[0]):
            return self.of_whole(func(*args, **given))
        if name == "layer_norm":
            return self._layer_norm(*args, **given)
        if name == "rms_norm":
            return self._rms_norm(*args, **given)
        if name == "linear":
            return self._linear(func(*args, **given), *args[2:], **given)
        if name == "addmm":
            return self._linear(func(*args, **given), args[0])
        return func(*args, **given)

    def _stacked(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 1 and not len(value) % self.copies

    def by_copy(self, value: Tensor) -> Float[Tensor, "copy *rest"]:
        """Copies apart.

        Raises:
            UnsupportedModelError: if the model has taken the copies apart itself.
        """
        if len(value) % (self.copies * self.batch):
            raise UnsupportedModelError(
                "this model sends tokens different ways (experts), so that a part of what a layer "
                "reads does not go the way of the whole; use hs.edges.attribute."
            )
        apart: Tensor = value.unflatten(0, (self.copies, -1))
        return apart

    def of_whole(self, value: Tensor) -> Tensor:
        """The whole's value for all copies."""
        copies = self.by_copy(value)
        return copies[:1].expand_as(copies).flatten(0, 1)

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:
        over = tuple(range(-len(normalized_shape), 0))
        centred = x - x.mean(over, keepdim=True)
        scale = self.of_whole((centred.square().mean(over, keepdim=True) + eps).rsqrt())
        made = centred * scale if weight is None else centred * scale * weight
        return made if bias is None else self._with_bias(made, bias, self.by_copy(x))

    def _rms_norm(
        self,
        x: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        over = tuple(range(-len(normalized_shape), 0))
        small = torch.finfo(x.dtype).eps if eps is None else eps
        scale = self.of_whole((x.square().mean(over, keepdim=True) + small).rsqrt())
        return x * scale if weight is None else x * scale * weight

    def _linear(self, made: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        """The map's output with its bias shared, and the sign rule inside MLPs."""
        if made.ndim > 1 and (bias is not None or self.in_mlp):
            if bias is not None and self.share_biases:
                without = made - bias
                made = self._with_bias(without, bias, self.by_copy(without))
            if self.sign_rule and self.in_mlp:
                made = self.signed(made)
        return made

    def _with_bias(self, made: Tensor, bias: Tensor, by: Float[Tensor, "copy *rest"]) -> Tensor:
        """What a map makes of whole and rests, with its bias shared by two parts' magnitudes."""
        if not self.share_biases:
            return made + bias
        relevant, rest = (by[:1] - by).abs(), by.abs()
        share = 1 - relevant / (relevant + rest + _SMALL)  # 1 for the whole
        return made + (share * bias).flatten(0, 1)

    def signed(self, value: Tensor) -> Tensor:
        """Where relevant part and rest have opposite signs, the larger takes the whole."""
        copies = self.by_copy(value)
        whole, rest = copies[:1], copies
        relevant = whole - rest
        opposed = relevant * rest < 0
        taken = torch.where(relevant.abs() >= rest.abs(), torch.zeros_like(rest), whole)
        return torch.where(opposed, taken, rest).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class SplitRun:
    """What some taps hold, whole and rests.

    Attributes:
        taps: the whole first, then the rest for every source, ``[copy batch *rest]``.
        logits: at the positions that the metric reads; None where they were not asked for.
    """

    taps: Mapping[Tap, Tensor]
    logits: Float[Tensor, "row at d_vocab"] | None

    def whole(self, tap: Tap) -> Tensor:
        """What the tap holds in the whole."""
        return self.taps[tap][0]

    def relevant(self, tap: Tap) -> Float[Tensor, "source batch *rest"]:
        """The part that comes from each source."""
        return self.taps[tap][:1] - self.taps[tap][1:]


@torch.no_grad()
def run_split(
    batch: EdgeBatch,
    sources: Sequence[NodeWrite],
    reads: Sequence[Tap],
    *,
    share_biases: bool = True,
    sign_rule: bool = False,
    held: bool = True,
    logits: bool = True,
) -> SplitRun:
    """Run a batch whole and, for every source, without it.

    Args:
        batch: its texts are run.
        sources: one relevant part each.
        reads: taps to keep.
        share_biases: as of :class:`SplitRules`.
        sign_rule: likewise.
        held: hold attention patterns and the scales of norms as in the whole run; else the rests
            are runs of their own, with the source's change patched in.
        logits: compute them.
    """
    model, copies, size = batch.study.model, 1 + len(sources), len(batch.texts.tokens)
    rules = SplitRules(size, copies, share_biases, sign_rule)
    kept: dict[Tap, Tensor] = {}

    def keep(view: TapView) -> None:
        if view.tap in reads:
            kept[view.tap] = view.value.unflatten(0, (copies, size)).clone()
        if view.tap.site in ("attn_out", "mlp_out"):
            rules.in_mlp = view.tap.site == "attn_out"

    writes: dict[Tap, Callable[[Tensor, Any], Tensor]] = {
        tap: _moved([source.change if source.tap == tap else None for source in sources], size)
        for tap in {source.tap for source in sources}
    }
    layers = range(batch.study.wiring.n_layers)
    if held:
        writes |= {
            Tap(site, layer): lambda value, _span: rules.of_whole(value)
            for site in ("query", "key")
            for layer in layers
        }
    marks = {Tap(site, layer) for site in ("attn_out", "mlp_out") for layer in layers}
    logits_at = batch.measured.at if logits else torch.empty(0, dtype=torch.long)
    with rules if held else nullcontext():
        out = model.run(
            batch.texts.times(copies),
            reads=dict.fromkeys({*reads, *marks}, keep),
            writes=writes,
            logits_at=logits_at,
        )
    return SplitRun(kept, out if logits else None)


def _moved(
    changes: Sequence[Float[Tensor, "batch pos d_model"] | None], size: int
) -> Callable[[Tensor, Any], Tensor]:
    """Adds to each rest what its source changes; the whole stays."""

    def move(value: Tensor, _span: Any) -> Tensor:
        moved = value.clone()
        for number, change in enumerate(changes):
            if change is not None:
                moved[size * (number + 1) : size * (number + 2)] += change.to(value)
        return moved

    return move
