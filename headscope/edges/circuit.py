"""Run a circuit: some edges carry what their source writes in the circuit, the others are out."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.edges.passes import measured_with, values_with
from headscope.edges.written import ENTRIES, EdgeBatch, heads_write
from headscope.models.taps import Tap


@torch.no_grad()
def circuit_value(
    batch: EdgeBatch, kept: Bool[np.ndarray, "target source"]
) -> Float[Tensor, " batch"]:
    """The metric of a circuit on every example.

    The nodes run in order. The input of every slot is the clean run's, less what its sources write
    there, plus what those of kept edges write in this run and those of the others once corrupted.
    With all edges that is the clean run.

    Args:
        batch: the batch.
        kept: edges of the circuit, as :meth:`Wiring.kept` has them.
    """
    return _Circuit(batch, torch.from_numpy(kept).to(batch.change.device)).run()


@dataclass(eq=False)
class _Circuit:
    batch: EdgeBatch
    kept: Bool[Tensor, "target source"]
    moved: Float[Tensor, "batch source pos d_model"] = field(init=False)

    def __post_init__(self) -> None:
        """Start from the clean run: no node writes anything else yet."""
        self.moved = torch.zeros_like(self.batch.change)
        self.moved[:, 0] = 0.0  # the embedding of a circuit is the clean one

    def run(self) -> Float[Tensor, " batch"]:
        wiring, clean = self.batch.study.wiring, self.batch.clean.taps
        for layer in range(wiring.n_layers):
            self._heads(layer)
            self._mlp(layer)
        last = Tap("resid_post", wiring.n_layers - 1)
        stream = clean[last] + self._entering(self.kept[-1:])
        return measured_with(self.batch, {last: stream})[0]

    def _entering(self, kept: Bool[Tensor, "row source"]) -> Float[Tensor, "row batch pos d_model"]:
        """How the input of some slots, given as rows of edges kept, differs from the clean one."""
        reach = kept.shape[1]
        share = kept.to(self.moved)
        inside = torch.einsum("rs,bspm->rbpm", share, self.moved[:, :reach])
        return inside + torch.einsum("rs,bspm->rbpm", 1 - share, self.batch.change[:, :reach])

    def _heads(self, layer: int) -> None:
        """Run the heads of a layer; slots that keep the same edges are run once."""
        batch, wiring = self.batch, self.batch.study.wiring
        rows = self.kept[wiring.inputs_of(layer), : wiring.before(layer)]
        unique, which = torch.unique(rows, dim=0, return_inverse=True)
        stream, taps = Tap("resid_pre", layer), tuple(Tap(site, layer) for site in ENTRIES)
        inputs = batch.clean.taps[stream] + self._entering(unique)
        made = values_with(batch, {stream: inputs}, taps)
        query, key, value = (
            self._own(made[tap], which.view(3, -1)[entry], entry > 0)
            for entry, tap in enumerate(taps)
        )
        z_tap = Tap("z", layer)
        z = values_with(batch, dict(zip(taps, (query, key, value), strict=True)), (z_tap,))[z_tap]
        own = torch.stack(
            [z[head % len(z), :, :, head] for head in range(wiring.n_heads)], 2
        )  # of the run in which this member of its group had its keys
        change = heads_write(batch.study.model, layer, own - batch.clean.taps[z_tap])
        self.moved[:, wiring.heads_of(layer)] = self._real(change)

    def _own(
        self, made: Float[Tensor, "row batch head pos d_head"], which: Tensor, shared: bool
    ) -> Float[Tensor, "member batch head pos d_head"]:
        """Every head's queries, keys or values from the run that had its input.

        One run per member of a group of query heads, as each sees the shared keys by its own edges.
        """
        group = self.batch.study.model.shape.group_size
        members = []
        for member in range(group):
            heads = range(made.shape[2])
            chosen = [head * group + member for head in heads] if shared else list(heads)
            parts = [made[which[own], :, head] for head, own in zip(heads, chosen, strict=True)]
            members.append(torch.stack(parts, 1))
        return torch.stack(members)

    def _mlp(self, layer: int) -> None:
        batch, wiring = self.batch, self.batch.study.wiring
        out = Tap("mlp_out", layer)
        entry = Tap("resid_pre" if wiring.parallel[layer] else "attn_out", layer)
        rows = self.kept[wiring.inputs_of(layer).stop, : wiring.before_mlp(layer)][None]
        made = values_with(batch, {entry: batch.clean.taps[entry] + self._entering(rows)}, (out,))
        change = (made[out][0] - batch.clean.taps[out])[:, None].float()
        self.moved[:, wiring.heads_of(layer).stop] = self._real(change)[:, 0]

    def _real(
        self, change: Float[Tensor, "batch node pos d_model"]
    ) -> Float[Tensor, "batch node pos d_model"]:
        real = self.batch.texts.real.to(change.device)
        return change * real[:, None, :, None]
