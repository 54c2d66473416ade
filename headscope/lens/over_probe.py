"""Direct logit attribution of every head, averaged over a probe."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope import capture
from headscope.base.statistics import Design
from headscope.errors import InputError
from headscope.lens.checks import check_first, need_readout, over_heads, tolerance
from headscope.lens.splitting import Split, rows_of
from headscope.models.blocks import BlockStates
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores
from headscope.table.lens import check_sum

Against = Literal["foil", "mean", "nothing"]


@own_types()
@torch.no_grad()
def head_attribution(
    model: HeadModel,
    probe: Probe,
    against: Against | None = None,
    *,
    mark: str | None = None,
    batch_size: int | None = None,
) -> HeadScores:
    """What every head adds directly to the logit of a probe's targets, averaged over the probe.

    As :func:`attribute`, at every position with a target: the mean over an example's positions,
    then over examples; tested against no effect. With ``mean`` this is the scorer
    ``direct_logit_attribution`` (which reads the second copy alone, where there is one), with
    ``foil`` the scorer ``direct_logit_difference``. Unlike these it also holds where a norm
    follows attention, and its sums are checked.

    Args:
        model: from :func:`headscope.load`.
        probe: with targets.
        against: what is taken off the target's logit: that of the ``foil``, the ``mean`` over the
            vocabulary, or ``nothing``; default: the foil if the probe has foils, else the mean.
        mark: read only positions with this mark of the probe.
        batch_size: examples per pass.

    Raises:
        InputError: if the probe does not fit the model or has nothing to read.
        UnsupportedModelError: as of :func:`attribute`.
        HeadscopeError: if the parts do not sum to the whole.

    Example:
        >>> scores = hs.lens.head_attribution(model, probe)
        >>> scores.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
        >>> scores.unit
        'logits'
    """
    need_readout(model)
    chosen: Against = against or ("mean" if probe.foils is None else "foil")
    if chosen == "foil" and probe.foils is None:
        raise InputError("this probe has no foils: use against='mean', or a probe of pairs.")
    capture.check_fits(model, probe, answers=True)
    if mark is not None:
        probe = replace(probe, targets=probe.targets.where(probe.mark(mark), -1))
    if not bool(_read(probe, chosen).any()):
        raise InputError("the probe has no targets to attribute.")
    check_first(model, probe)
    values = np.full((model.shape.n_layers, model.shape.n_heads, len(probe)), np.nan)
    for where, split in _splits(model, probe, chosen, batch_size):
        if len(split.example):
            values[..., where] = _per_example(model, split, where.stop - where.start)
    return HeadScores.from_effects(
        "direct_attribution",
        values,
        kv_heads=model.shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        unit="logits",
        description=f"What each head adds directly to the target's logit, less {_WORDS[chosen]}.",
        source="Elhage et al. 2021, direct path; Wang et al. 2022, direct effect",
        provenance=origin(model, probe, reading="attribution", against=chosen, mark=mark),
    )


_WORDS = {"foil": "the foil's", "mean": "the mean over the vocabulary", "nothing": "nothing"}


@dataclass
class _Relay:
    """Hands blocks to the observer of the batch that is running."""

    split: Split | None = None

    def on_block(self, states: BlockStates) -> None:
        if self.split is not None:
            self.split.on_block(states)


def _splits(
    model: HeadModel, probe: Probe, against: Against, batch_size: int | None
) -> Iterator[tuple[slice, Split]]:
    """Each batch of a probe, split and checked."""
    relay = _Relay()

    def make(batch: Probe, _halvings: int) -> Split:
        example, position = (one.to(model.device) for one in rows_of(_read(batch, against)))
        direction = _directions(model, batch, example, position, against)
        relay.split = Split(model, example, position, direction)
        return relay.split

    with model.parts.blocks_shown(relay):
        for where, split in capture.stream(model, probe, make, batch_size=batch_size):
            if len(split.example):
                total, whole, largest = (
                    one.cpu().double().numpy() for one in (split.total, split.whole, split.largest)
                )
                check_sum(total, whole, largest, tolerance(model), f"attribution on {model.name}")
            yield where, split


def _read(probe: Probe, against: Against) -> Tensor:
    read = probe.real & (probe.targets >= 0)
    return read & (probe.foils >= 0) if against == "foil" and probe.foils is not None else read


def _directions(
    model: HeadModel,
    probe: Probe,
    example: Int[Tensor, " row"],
    position: Int[Tensor, " row"],
    against: Against,
) -> Float[Tensor, "row d_model"]:
    readout = model.readout
    direction = readout.directions(probe.to(model.device).targets[example, position])
    if against == "mean":
        return direction - readout.mean_direction
    if against == "foil" and probe.foils is not None:
        return direction - readout.directions(probe.foils.to(model.device)[example, position])
    return direction


def _per_example(
    model: HeadModel, split: Split, examples: int
) -> Float[np.ndarray, "layer head example"]:
    """Mean over each example's rows; NaN where it has none."""
    heads = over_heads(model, split.heads)
    example = split.example.cpu().numpy()
    member = np.eye(examples)[example]
    count = member.sum(0)
    return np.asarray(heads @ member / np.where(count > 0, count, np.nan))
