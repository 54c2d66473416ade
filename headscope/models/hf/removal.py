"""What a removal of heads comes to: which rows of which matrices stay, written down as data.

It is saved in the smaller model's config, as no config of transformers can say different numbers
of heads per layer.
"""

from collections import Counter
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.hf.hooks import Call, after, hooked
from headscope.models.hf.layout import tiny_tokens
from headscope.models.hf.owners import Owner

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel

# By attention module and matrix, the outputs that stay.
Rows = dict[tuple[str, str], Tensor]


class LayerRemoval(BaseModel):
    """What is left of one attention layer.

    Attributes:
        attention, projection: where the module is in the model, and its output projection in it.
        heads, kv_heads: those left, by old number; see :class:`headscope.models.hf.removed.Kept`.
        outputs: by input projection, how many outputs are left.
        blocks: by input projection, which block of d_head outputs stands at each place, where
            some repeat.
        returns: how many values the attention module returns; None: one bare tensor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: str
    projection: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    outputs: dict[str, int]
    blocks: dict[str, tuple[int, ...]]
    returns: int | None


class Removal(BaseModel):
    """What was removed from a model with ``n_heads`` heads a layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_heads: int
    n_kv_heads: int
    d_head: int
    layers: tuple[LayerRemoval, ...]

    @model_validator(mode="after")
    def _whole(self) -> "Removal":
        """Check what the modules will be told."""
        for layer in self.layers:
            heads, kv_heads = layer.heads, layer.kv_heads
            even = not heads if not kv_heads else len(heads) % len(kv_heads) == 0
            known = all(0 <= head < self.n_heads for head in heads)
            if not (even and known and all(0 <= kv < self.n_kv_heads for kv in kv_heads)):
                raise ValueError(f"the heads of {layer.attention} cannot be those that are named")
        return self


def removal_of(
    model: "HFModel", removed: tuple[HeadIndex, ...], owners: dict[int, dict[str, list[Owner]]]
) -> tuple[Removal, Rows]:
    """The removal, and which outputs of each input projection stay.

    Args:
        model: to remove heads from.
        removed: these.
        owners: from :func:`headscope.models.hf.owners.find_owners`.
    """
    shape = model.shape
    names = {module: name for name, module in model.module.named_modules()}
    layers: list[LayerRemoval] = []
    rows: Rows = {}
    for layer, parts in model.layout.layers.items():
        heads = tuple(h for h in range(shape.n_heads) if HeadIndex(layer, h) not in removed)
        if len(heads) == shape.n_heads:
            continue
        stored, given = _kv_heads(heads, shape.group_size)
        attention = names[parts.attention]
        outputs, blocks = {}, {}
        for name, owned in owners[layer].items():
            here = [
                i
                for i, (site, head) in enumerate(owned)
                if head in (heads if site == "query" else stored)
            ]
            rows[attention, name] = torch.tensor(here, dtype=torch.long)
            outputs[name] = len(here)
            if stored != given and heads:
                places = _blocks([owned[i] for i in here], given, shape.d_head)
                if len(places) * shape.d_head != len(here):
                    blocks[name] = places
        layers.append(
            LayerRemoval(
                attention=attention,
                projection=names[parts.projection].removeprefix(f"{attention}."),
                heads=heads,
                kv_heads=given,
                outputs=outputs,
                blocks=blocks,
                returns=_returns(model, parts.attention),
            )
        )
    kept = Removal(
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        d_head=shape.d_head,
        layers=tuple(layers),
    )
    return kept, rows


def _kv_heads(heads: tuple[int, ...], group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Key/value heads whose weights stay, and those that attention is given.

    Attention takes equally large groups. Where query heads went unevenly, the largest size that
    divides all groups is taken, and a key/value head stands once for each such part of its group.
    """
    counts = Counter(head // group for head in heads)
    size = gcd(*counts.values())
    stored = tuple(sorted(counts))
    return stored, tuple(kv for kv in stored for _ in range(counts[kv] // size))


def _blocks(owners: list[Owner], given: tuple[int, ...], d_head: int) -> tuple[int, ...]:
    """Which block of d_head outputs stands at each place, key/value heads repeated as given."""
    firsts = owners[::d_head]
    whole = [owner for owner in firsts for _ in range(d_head)] == owners
    if not whole:
        raise UnsupportedModelError(
            "it stores a head's rows apart, so grouped heads can only be removed by whole groups."
        )
    times = Counter(given)
    return tuple(
        i
        for i, (site, head) in enumerate(firsts)
        for _ in range(1 if site == "query" else times[head])
    )


def _returns(model: "HFModel", attention: nn.Module) -> int | None:
    found: list[int | None] = []

    def look(_module: nn.Module, _call: Call, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple) else None)

    with hooked([after(attention, look)]):
        model.forward(tiny_tokens(model.module)[:1, :2])
    return found[0]
