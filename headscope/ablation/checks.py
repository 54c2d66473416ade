"""Proof that an ablation hit: cheap measurements, once a call, recorded in the result."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.ablation.engine import Batch
from headscope.ablation.sources import ForwardSource, Plan
from headscope.edits import Variant, cut, zero
from headscope.errors import HeadscopeError
from headscope.heads import HeadIndex
from headscope.interventions import Place
from headscope.models.protocol import HeadModel
from headscope.models.taps import Reads, Tap, TapView

# The metric of a replay and of a whole pass may differ by this, beside the metric's own size.
_AGREEMENT = 1e-3
_HALF_AGREEMENT = 1e-1
_SILENT_LENGTH = 16


@dataclass
class _Layer:
    """Keeps the outputs of one layer."""

    layer: int
    z: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def reads(self) -> Reads:
        """The layer's outputs."""
        return {Tap("z", self.layer): self._keep}

    def _keep(self, view: TapView) -> None:
        self.z = view.z.float().clone()


def proofs(
    model: HeadModel, plan: Plan, batch: Batch, place: Place, heads: Sequence[HeadIndex]
) -> dict[str, Any]:
    """Measure, on one example and the head in the middle of the list, that edits do what they say.

    Returns:
        ``engine``; ``noop_error``, the change of the logits by an edit of nothing, as a share of
        the largest; ``head_checked``; ``own_output_changed``; ``other_heads_changed``, in the
        layer of the edited one (0: none); ``replay_error``, between a metric by replay and by a
        whole pass, the largest over metrics; ``heads_off_error``, how much of the logits still
        depends on other positions when all heads are zeroed (0: nothing).

    Raises:
        HeadscopeError: if an edit changed another head of its layer, or if replay and whole pass
            disagree.
    """
    head = heads[len(heads) // 2]
    changed, error = _check_head(model, plan, batch, place, head)
    return {
        "engine": "suffix replay" if plan.replays else "whole passes",
        "prefix_reuse": plan.prefix,
        "noop_error": plan.noop_error,
        "head_checked": str(head),
        "own_output_changed": changed,
        "other_heads_changed": 0,
        "replay_error": error,
        "heads_off_error": heads_off_error(model, batch),
    }


@torch.no_grad()
def _check_head(
    model: HeadModel, plan: Plan, batch: Batch, place: Place, head: HeadIndex
) -> tuple[bool, float | None]:
    """Whether a head's own output changed, and how far replay and whole pass are apart."""
    at = int(batch.read.any(1).nonzero()[0])  # an example that the metrics read
    chosen = slice(at, at + 1)
    one, read = batch.probe.examples(chosen), batch.read[chosen]
    reads = [(reading.metric, reading.read[chosen]) for reading in batch.readings]
    variant: Variant = cut((place([head]),), examples=chosen)
    after = _Layer(head.layer)
    whole_pass = ForwardSource(model, one.tokens, one.real, read, after.reads)
    whole = Batch(one, batch.metric, whole_pass, read, batch.limit, reads).all_values([variant])
    z = _clean_z(model, batch, head.layer, chosen)
    difference = (after.z - z).abs().amax((0, 1, 3))
    others = torch.arange(len(difference), device=difference.device) != head.head
    if not bool((difference[others] <= 1e-5 * (float(z.abs().max()) or 1.0)).all()):  # or NaN
        raise HeadscopeError(
            f"ablating {head} changed the output of another head of its layer: the edit does not "
            "do what it says."
        )
    changed = bool(difference[head.head] > 0)
    if not plan.replays:
        return changed, None
    source = plan.source(model, one.tokens, one.real, read)
    replayed = Batch(one, batch.metric, source, read, batch.limit, reads).all_values([variant])
    errors = (whole - replayed).abs().nan_to_num()
    error = float(errors.max())
    allowed = _AGREEMENT if model.dtype in (torch.float32, torch.float64) else _HALF_AGREEMENT
    if bool((errors > allowed * whole.abs().nan_to_num().clamp_min(1.0)).any()):
        raise HeadscopeError(
            f"ablating {head} by replay and by a whole pass gives metrics {error:.2g} apart."
        )
    return changed, error


def _clean_z(
    model: HeadModel, batch: Batch, layer: int, chosen: slice
) -> Float[Tensor, "1 pos head d_head"]:
    """Outputs of a layer on one example, unedited.

    Run alone, as the edited pass is: beside others it would be rounded differently, and a deep
    model makes more of that than the check allows.
    """
    before, one = _Layer(layer), batch.probe.examples(chosen)
    model.run(one, reads=before.reads, logits_at=torch.empty(0, dtype=torch.long))
    return before.z


@torch.no_grad()
def heads_off_error(model: HeadModel, batch: Batch) -> float | None:
    """How much the last logits still depend on earlier tokens when all heads give 0.

    With attention removed nothing can move between positions. As a share of the largest logit;
    None where it cannot be told (one token, or layers without attention that mix positions).
    """
    text = batch.probe.tokens[0, batch.probe.real[0]][:_SILENT_LENGTH]
    hybrid = len(model.shape.attention_layers) < model.shape.n_layers
    if hybrid or len(text) < 2:
        return None
    tokens = torch.stack([text, torch.cat([text[:-1].flip(0), text[-1:]])])
    last = torch.tensor([len(text) - 1])
    off = model.forward(tokens, edits=(zero(model.shape.heads),), logits_at=last).float()
    return float((off[0] - off[1]).abs().max() / off.abs().max().clamp_min(1e-12))
