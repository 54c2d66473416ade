"""The observer behind ``hs.score``: feeds each layer's chunks to the scorers, keeps sums only."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.capture import chunks
from headscope.inputs import Rotation
from headscope.matches import Matches
from headscope.memory import chunk_bytes
from headscope.models.protocol import HeadModel, LayerView
from headscope.outputs import HeadOutputs
from headscope.probes.probe import Probe
from headscope.progress import Advance
from headscope.rows import AttentionRows
from headscope.scorers.base import Scorer

# Copies of a chunk of rows that are alive at once: scores, probabilities, one derived view.
_COPIES = 3


@dataclass(eq=False)
class Sums:
    """Sum and count of one scorer's values, per layer, head and example of a batch."""

    total: Float[Tensor, "layer head batch"]
    count: Float[Tensor, "layer head batch"]
    missing: Float[Tensor, "layer head"]

    @classmethod
    def zeros(cls, layers: int, heads: int, batch: int) -> "Sums":
        """Nothing added yet."""
        total = torch.zeros(layers, heads, batch, dtype=torch.float64)
        return cls(total, total.clone(), torch.zeros(layers, heads, dtype=torch.float64))

    def add(
        self,
        layer: int,
        values: Float[Tensor, "batch head query"],
        chosen: Bool[Tensor, "batch query"],
    ) -> None:
        """Add the values of the chosen queries; NaN counts as missing."""
        wanted = chosen[:, None].expand_as(values)
        known = wanted & ~values.isnan()
        filled = torch.where(known, values, 0.0).sum(-1, dtype=torch.float64)
        self.total[layer] += filled.T.cpu()
        self.count[layer] += known.sum(-1).T.cpu()
        self.missing[layer] += (wanted & ~known).sum((0, 2)).cpu()

    @property
    def mean(self) -> Float[Tensor, "layer head batch"]:
        """Mean over queries; NaN where no query had a value."""
        return self.total / self.count.where(self.count > 0, torch.nan)


@dataclass(eq=False)
class Accumulator:
    """Scores one batch during its forward pass.

    Args:
        model: the running model.
        batch: the examples of this pass.
        scorers: what to compute; all share each chunk of rows.
        flat: also score attention spread evenly, for scorers whose control that is.
        memory: bytes that a chunk may take; None: what suits the device.
        halvings: by how many powers of two to cut the chunks, after running out of memory.
        advance: called after each layer.
        tokens: queries that a chunk may hold, over all examples; None: as many as fit.
    """

    model: HeadModel
    batch: Probe
    scorers: tuple[Scorer, ...]
    flat: bool
    memory: int | None
    halvings: int
    advance: Advance
    tokens: int | None = None
    sums: dict[str, Sums] = field(init=False)
    flat_sums: dict[str, Sums] = field(init=False)
    _rotations: dict[int, Rotation] = field(default_factory=dict)
    _held: list[tuple[Scorer, int, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make room for the sums; measure what cannot be measured during the pass."""
        if any("rotary" in scorer.needs for scorer in self.scorers):
            rotation = self.model.parts.rotation
            self._rotations = {
                layer: rotation(layer) for layer in self.model.shape.attention_layers
            }
        shape, batch = self.model.shape, len(self.batch)

        def room() -> Sums:
            return Sums.zeros(shape.n_layers, shape.n_heads, batch)

        self.sums = {scorer.name: room() for scorer in self.scorers}
        self.flat_sums = {
            scorer.name: room()
            for scorer in self.scorers
            if self.flat and scorer.kind == "row" and scorer.control == "flat"
        }

    @property
    def wants_final(self) -> bool:
        """Whether some scorer is divided by the final norm's scale."""
        return any(scorer.per_final_scale for scorer in self.scorers)

    @cached_property
    def selected(self) -> dict[str, Bool[Tensor, "batch pos"]]:
        """Which queries count, for every scorer."""
        return {s.name: s.queries(self.batch) & self.batch.real for s in self.scorers}

    @cached_property
    def positions(self) -> Int[Tensor, " query"]:
        """Queries that any scorer asked for in any example."""
        wanted = torch.stack([mask.any(0) for mask in self.selected.values()]).any(0)
        return wanted.nonzero().squeeze(-1)

    @cached_property
    def _flat(self) -> dict[tuple[str, int | None, int], Tensor]:
        return {}

    @cached_property
    def _probes(self) -> dict[torch.device, Probe]:
        return {}

    def on_layer(self, view: LayerView) -> None:
        """Feed one layer to every scorer, chunk by chunk."""
        device = view.z.device
        if device not in self._probes:
            self._probes[device] = self.batch.to(device)
        rotation = self._rotations.get(view.layer)
        layer = _Layer(self.model, view, self._probes[device], rotation)
        row = _COPIES * 4 * len(self.batch) * self.model.shape.n_heads * self.batch.length
        budget = chunk_bytes(device, self.memory)
        if self.tokens is not None:
            budget = min(budget, self.tokens // len(self.batch) * row)
        budget >>= self.halvings
        for positions in chunks(self.positions, row, budget):
            self._on_chunk(layer, positions)
        self.advance()

    def _on_chunk(self, layer: "_Layer", positions: Int[Tensor, " query"]) -> None:
        chunk = _Chunk(layer, positions.to(layer.device))
        for scorer in self.scorers:
            chosen = self.selected[scorer.name][:, positions]
            if not bool(chosen.any()):
                continue
            chosen = chosen.to(layer.device)
            values = scorer(chunk.seen(scorer), layer.probe)
            if scorer.per_final_scale:
                self._held.append((scorer, layer.number, values.cpu(), positions))
            else:
                self.sums[scorer.name].add(layer.number, values, chosen)
            if scorer.name in self.flat_sums:
                spread = self._flat_values(scorer, layer, chunk).to(layer.device)
                spread = spread.expand(-1, self.model.shape.n_heads, -1)
                self.flat_sums[scorer.name].add(layer.number, spread, chosen)

    def _flat_values(
        self, scorer: Scorer, layer: "_Layer", chunk: "_Chunk"
    ) -> Float[Tensor, "batch head_or_one query"]:
        """Score attention spread evenly: the same in all layers that see equally far back."""
        if scorer.view == "value_weighted":
            return scorer(chunk.flat_rows(scorer), layer.probe)
        window = self.model.shape.windows[layer.number]
        key = (scorer.name, window, int(chunk.positions[0]))
        if key not in self._flat:
            self._flat[key] = scorer(chunk.flat_rows(scorer), layer.probe)
        return self._flat[key]

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Divide what was held back by the final norm's scale."""
        scale = self.model.readout.scale(residual).cpu()
        for scorer, layer, values, positions in self._held:
            chosen = self.selected[scorer.name][:, positions]
            self.sums[scorer.name].add(layer, values / scale[:, None, positions], chosen)
        self._held.clear()


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer with what scorers may derive from it once."""

    model: HeadModel
    view: LayerView
    probe: Probe
    rotation: Rotation | None

    @property
    def number(self) -> int:
        return self.view.layer

    @property
    def device(self) -> torch.device:
        return self.view.z.device

    @cached_property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.model.output_weights(self.number).float()

    @cached_property
    def value_norms(self) -> Float[Tensor, "batch head key"]:
        """``|v_j W_O|`` through the Gram matrix of ``W_O``."""
        values = self.view.values().float()
        gram = (self.W_O @ self.W_O.mT).unflatten(0, (values.shape[1], -1))
        squared = torch.einsum("bgkd,gjde,bgke->bgjk", values, gram, values)
        return squared.clamp_min(0).sqrt().flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some queries of one layer; every derived form is computed once, if asked for."""

    layer: _Layer
    positions: Int[Tensor, " query"]

    @cached_property
    def rows(self) -> AttentionRows:
        return self.layer.view.rows(self.positions)

    @cached_property
    def even(self) -> AttentionRows:
        return self.rows.uniform()

    @cached_property
    def no_sink(self) -> AttentionRows:
        return self.rows.without_first(self.layer.probe.first)

    @cached_property
    def value_weighted(self) -> AttentionRows:
        return self.rows.weighted(self.layer.value_norms[..., : self.rows.pattern.shape[-1]])

    @cached_property
    def outputs(self) -> HeadOutputs:
        return HeadOutputs(
            layer=self.layer.number,
            query_pos=self.positions,
            z=self.layer.view.z[:, self.positions].float(),
            W_O=self.layer.W_O,
            readout=self.layer.model.readout,
            make_rows=lambda: self.rows,
            make_values=self.layer.view.values,
            make_matches=lambda: self.matches,
        )

    @cached_property
    def matches(self) -> Matches:
        seen = self.layer.view.matches(self.positions)
        return replace(seen, rotation=self.layer.rotation)

    def seen(self, scorer: Scorer) -> AttentionRows | HeadOutputs | Matches:
        """What this scorer reads."""
        if scorer.kind == "match":
            return self.matches
        if scorer.kind == "output":
            return self.outputs
        return {"plain": lambda: self.rows, "no_sink": lambda: self.no_sink}.get(
            scorer.view, lambda: self.value_weighted
        )()

    def flat_rows(self, scorer: Scorer) -> AttentionRows:
        """Attention spread evenly, in the form that this scorer reads."""
        even = self.even
        if scorer.view == "no_sink":
            return even.without_first(self.layer.probe.first)
        if scorer.view == "value_weighted":
            return even.weighted(self.layer.value_norms[..., : even.pattern.shape[-1]])
        return even


def joined(parts: Iterable[Sums]) -> Sums:
    """Batches of one scorer, one after another."""
    listed = list(parts)
    return Sums(
        torch.cat([part.total for part in listed], -1),
        torch.cat([part.count for part in listed], -1),
        torch.stack([part.missing for part in listed]).sum(0),
    )
