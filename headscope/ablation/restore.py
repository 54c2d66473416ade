"""Restore studies: where a model holds what a corrupt token took away, by component and position.

They work on every model of blocks, also on those without attention rows.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.ablation.patching import aligned_pair
from headscope.ablation.run import Metricish
from headscope.base.options import RunOptions
from headscope.errors import InputError, UnsupportedModelError
from headscope.metrics import answer_probability, as_metric
from headscope.models.hf.mixers import MIXER_SITES, MixerModel
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe
from headscope.table import EffectGrid, Provenance

_TOKENS_PER_PASS = 4096


@own_types()
@torch.no_grad()
def restore(
    model: HeadModel | Any,
    probe: Probe,
    metric: Metricish = answer_probability,
    *,
    positions: tuple[str, ...] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> EffectGrid:
    """Restore one component at one position of a corrupt run, and see what comes back.

    The corrupt run is repeated with the value of one component in one layer, at the positions of
    one mark, taken from the clean run. Components are ``resid_pre`` and ``resid_post`` (what enters
    and leaves the block), ``mixer_out`` (what attention, or the state-space part, adds or hands
    on) and ``mlp_out``. An effect is the metric with less that without; differences, not ratios,
    which are unstable where nothing was lost.

    With a corrupted key of :func:`headscope.probes.recall`, a model that stores pairs in place
    (induction) gets the answer back from ``mixer_out`` at the value; one that looks the pair up
    when it is asked (a pointer, or a short convolution of Mamba at its last state) gets it from
    the query alone.

    Args:
        model: of :func:`headscope.load`, or a language model of transformers, with or without
            attention (Mamba, hybrids).
        probe: with a ``corrupt`` pair; without padding.
        metric: default: probability of the answer.
        positions: marks; default: all that the probe has.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Axes ``component``, ``layer`` and ``position``; NaN where a block has no such component.

    Raises:
        InputError: if the probe has no aligned pair, or has padding.
        UnsupportedModelError: if the model is not one row of blocks.

    Source:
        Meng et al. 2022 (arXiv 2202.05262), restoring; by component and position of associative
        recall as in mechanistic evaluations of state-space models.

    Example:
        >>> made = hs.compiled.from_library("recall")
        >>> probe = hs.probes.recall(range(1, 4), range(4, 7), pairs=2, batch=4)
        >>> grid = hs.ablation.restore(made.model, probe)
        >>> at = dict(zip(grid.labels[2], grid.mean[1, 0].tolist(), strict=True))  # L0, mixer_out
        >>> round(at["value"], 2), round(at["query"], 2)
        (1.0, 0.0)
    """
    options = RunOptions(batch_size, progress=progress)
    mixers = _mixers(model)
    clean, corrupt = aligned_pair(probe, "denoise")
    if not bool(clean.real.all()):
        raise InputError("restore takes texts of one length without padding.")
    names = positions or tuple(clean.marks)
    if not names:
        raise InputError("the probe has no marks: say which positions to restore.")
    where = [clean.mark(name) for name in names]
    chosen = as_metric(metric)
    places = mixers.places()
    shape = (len(MIXER_SITES), len(mixers.blocks), len(names), len(probe))
    effects, plain = np.full(shape, np.nan), np.empty((2, len(probe)))
    size = options.per_pass(probe.length, _TOKENS_PER_PASS)
    with options.track(len(places) * len(probe), "restoring") as advance:
        for start in range(0, len(probe), size):
            part = slice(start, start + size)
            batch, tokens = clean.examples(part), corrupt.tokens[part]
            values: dict[tuple[str, int], Tensor] = {}
            reads = {place: _keeper(values, place) for place in places}
            plain[0, part] = _measured(chosen, mixers.run(clean.tokens[part], reads=reads), batch)
            plain[1, part] = _measured(chosen, mixers.run(tokens), batch)
            for site, layer in places:
                for at, mark in enumerate(where):
                    write = {(site, layer): _patch(values[site, layer], mark[part])}
                    found = _measured(chosen, mixers.run(tokens, writes=write), batch)
                    effects[MIXER_SITES.index(site), layer, at, part] = found - plain[1, part]
                advance(float(len(batch)))
    return EffectGrid(
        name="restore",
        axes=("component", "layer", "position"),
        labels=(MIXER_SITES, tuple(f"L{n}" for n in range(len(mixers.blocks))), names),
        per_example=effects,
        unedited=plain[1],
        pair=plain,
        unit=chosen.unit,
        description=f"{chosen.name} with the clean value restored, less that without.",
        provenance=Provenance(
            model=mixers.name,
            probe={"kind": probe.name, "examples": len(probe), **probe.settings},
            seed=probe.seed,
        ),
        clusters=probe.cluster_labels,
    )


def _mixers(model: Any) -> MixerModel:
    """The model as a row of blocks."""
    if isinstance(model, torch.nn.Module):
        return MixerModel.of(model)
    if isinstance(model, HeadModel) and model.path == "hf":
        return MixerModel.of(getattr(model, "module", None), model.name)
    raise UnsupportedModelError(
        f"{getattr(model, 'name', model)!r}: restore takes a model of headscope.load that "
        "transformers runs, or a model of transformers itself."
    )


def _keeper(values: dict[tuple[str, int], Tensor], place: tuple[str, int]) -> Any:
    def keep(value: Tensor) -> None:
        values[place] = value.clone()

    return keep


def _patch(values: Tensor, where: Bool[Tensor, "batch pos"]) -> Any:
    def write(value: Tensor) -> Tensor:
        return torch.where(where.to(value.device)[..., None], values, value)

    return write


def _measured(metric: Any, logits: Tensor, probe: Probe) -> Float[np.ndarray, " example"]:
    found: np.ndarray = metric(logits.cpu(), probe).double().numpy()
    return found
