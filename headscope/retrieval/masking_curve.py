"""Accuracy against the number of masked heads: highest-scored, lowest, and random ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from headscope.ablation.groups import along
from headscope.ablation.run import Measurement, Placer, present
from headscope.base.arguments import checked
from headscope.base.configs import Strict, parse, read_yaml
from headscope.base.options import RunOptions
from headscope.base.specs import ScoreSpec
from headscope.edits import Heads, Scope
from headscope.errors import InputError
from headscope.heads import HeadIndex, HeadOrder
from headscope.metrics import accuracy
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.config import ProbeConfig, build_probe
from headscope.probes.probe import Probe
from headscope.retrieval.generation import Masking
from headscope.table import EffectGrid, HeadScores, OrderCurve


def matched(top: Sequence[HeadIndex], drawn: HeadOrder) -> HeadOrder:
    """Rearrange a random order so that its first n heads match the layers of ``top``'s first n.

    At each step take the next drawn head of the layer whose turn it is, or if that layer has none
    left, the next of any layer. So every layer has at least as many among the first n as among the
    first n of ``top``, or all that were drawn.

    Args:
        top: order of heads whose layers are to be matched.
        drawn: heads in a random order.

    Example:
        >>> from headscope.heads import HeadIndex as Head
        >>> top = (Head(2, 0), Head(0, 1), Head(2, 1))
        >>> order = matched(top, (Head(0, 0), Head(1, 0), Head(2, 3), Head(0, 2)))
        >>> [str(head) for head in order]
        ['L2H3', 'L0H0', 'L1H0', 'L0H2']
    """
    left = list(drawn)
    found = []
    for head in top:
        if not left:
            break
        at = next((i for i, one in enumerate(left) if one.layer == head.layer), 0)
        found.append(left.pop(at))
    return (*found, *left)


Right = Literal["all", "share"]
_COUNTS = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50, 75, 100)
Controls = Literal["any", "layers"]


@checked
@own_types()
def masking_curve(
    model: HeadModel,
    probe: Probe,
    scores: HeadScores | Heads,
    *,
    counts: Sequence[int] | None = None,
    random: int = 5,
    controls: Controls = "any",
    method: Masking = "uniform",
    scope: Scope = "decode",
    right: Right = "all",
    at: str | None = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> OrderCurve:
    """Share of correct answers against the number of masked heads (Wu et al. 2024, section 4).

    Arms: ``top``, the highest scores first; ``lowest``, the lowest first (ties in a random order);
    and, as controls, random orders of the heads that are not above the score's threshold. An arm
    ends with its heads. An example is correct if each token of its answer is the most likely one,
    given those before: that is when greedy decoding with the same mask gives the answer, so nothing
    is generated, and only positions that the mask reaches are recomputed.

    Args:
        model: from :func:`headscope.load`.
        probe: with targets: needles, repeated tokens, your own questions; not the one that the
            scores were found on. Decoding begins at its mark ``end``, else at the first target that
            is read.
        scores: from a retrieval scorer; or heads, in the order in which they are masked (then there
            is no ``lowest``, and controls are all other heads).
        counts: numbers of masked heads; default: up to half of all.
        random: number of random orders, seeded from ``seed`` on.
        controls: ``any``: random heads as published; ``layers``: matched by layer with the top set
            of the same size as far as possible, so that depth explains nothing.
        method: how heads are masked, see :func:`headscope.mask_heads`.
        scope: when: ``decode``, ``prefill`` or ``all``.
        right: ``all``: 1 if the whole answer is correct; ``share``: share of its correct tokens,
            for long copies.
        at: mark of the positions that predict the answer; default: ``second_copy`` if the probe has
            it, else all with a target.
        reference: reference of ``mean``; default: the probe itself.
        seed: seed of the random orders.
        batch_size: examples per pass.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if an argument does not fit the probe or the model.

    Example:
        >>> import headscope as hs
        >>> model = hs.load("tiny-llama")
        >>> find, test = (
        ...     hs.probes.needle(model, lengths=64, depths=2, per_cell=1, seed=i) for i in (0, 1)
        ... )
        >>> curve = masking_curve(model, test, hs.retrieval.forced(model, find), counts=[0, 6])
        >>> curve.counts
        (0, 6)
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    if reference is not None and method != "mean":
        raise InputError(f"reference is for method='mean'; {method} needs none.")
    mark = at or ("second_copy" if "second_copy" in probe.marks else None)
    metric = accuracy if mark is None else accuracy.at(mark)
    measurement = Measurement.of(model, probe, metric, options)
    where = reached(probe, scope, metric.reads(probe))
    placer = Placer(measurement, method, positions=where, reference=reference)
    arms = _arms(model, scores, seed)
    drawn = _controls(model, scores, random, seed)
    if controls == "layers":
        drawn = {name: matched(arms["top"], order) for name, order in drawn.items()}
    everything = {**arms, **drawn}
    points = _points(model, counts)
    effects, clean = along(measurement, placer, everything, points)
    masked, unmasked = (_judged(one, right) for one in (effects + clean, clean))
    found = EffectGrid(
        spec=ScoreSpec(
            f"{method}_masking",
            unit="share",
            description="Correct answers with the heads masked minus those of the whole model.",
        ),
        axes=("arm", "masked"),
        labels=(tuple(everything), tuple(map(str, points))),
        per_example=masked - unmasked,
        unedited=unmasked,
        provenance=measurement.provenance(
            seed,
            checks=placer.checks,
            metric="right answers" if right == "all" else "right tokens",
            method=method,
            scope=scope,
            right=right,
            controls=controls,
            positions=scope,
        ),
        clusters=probe.cluster_labels,
    )
    return OrderCurve(found, everything, tuple(drawn))


def reached(
    probe: Probe, scope: Scope, answering: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"] | None:
    """Positions that a scope masks: from the prompt's last token on, before it, or all (None)."""
    if scope == "all":
        return None
    first = (probe.mark("end") if "end" in probe.marks else answering).int()
    if not bool(first.any(1).all()):
        raise InputError(
            "every example needs a token marked 'end', or a target: give a probe that has answers, "
            "or scope='all'."
        )
    decoding = torch.arange(probe.length, device=first.device) >= first.argmax(1)[:, None]
    where: Tensor = probe.real & (decoding if scope == "decode" else ~decoding)
    return where


def _judged(share: Float[np.ndarray, "*set example"], right: Right) -> Float[np.ndarray, "*set e"]:
    if right == "share":
        return share
    return np.where(np.isnan(share), np.nan, (share > 1 - 1e-6).astype(float))


def _arms(model: HeadModel, scores: HeadScores | Heads, seed: int) -> dict[str, HeadOrder]:
    if not isinstance(scores, HeadScores):
        return {"top": present(model, scores)}
    ranked = [(model.shape.check(head), value) for head, value in scores.top(scores.mean.size)]
    drawn = np.random.default_rng(seed).permutation(len(ranked))  # most heads are tied at 0
    lowest = sorted(range(len(ranked)), key=lambda i: (ranked[i][1], drawn[i]))
    return {
        "top": tuple(head for head, _ in ranked),
        "lowest": tuple(ranked[i][0] for i in lowest),
    }


def _controls(
    model: HeadModel, scores: HeadScores | Heads, random: int, seed: int
) -> dict[str, HeadOrder]:
    """Random orders of the heads that are not retrieval heads."""
    if random < 0:
        raise InputError(f"random={random}: give 0 or more.")
    if isinstance(scores, HeadScores):
        limit = np.inf if scores.threshold is None else scores.threshold
        left_out = {head for head, value in scores.top(scores.mean.size) if value > limit}
    else:
        left_out = set(present(model, scores))
    others = [head for head in model.shape.heads if head not in left_out]
    return {
        f"random {seed + i}": tuple(
            others[at] for at in np.random.default_rng(seed + i).permutation(len(others))
        )
        for i in range(random if others else 0)
    }


def _points(model: HeadModel, counts: Sequence[int] | None) -> list[int]:
    most = len(model.shape.heads)
    if counts is None:
        return [n for n in _COUNTS if n <= max(1, most // 2)]
    points = sorted(set(counts))
    if not points or points[0] < 0 or points[-1] > most:
        raise InputError(f"counts={list(counts)}: 0 to {most} heads can be masked.")
    return points


class MaskingConfig(Strict):
    """Configuration of masking curves: tasks, and how heads are masked.

    Attributes:
        tasks: probes by name: needles, your own questions, repeated tokens.
        counts, random, controls, method, scope, right, seed: as in :func:`masking_curve`.

    Example:
        >>> task = {"kind": "repeated_tokens", "length": 8, "batch": 2}
        >>> MaskingConfig(tasks={"copying": task}).scope
        'decode'
    """

    tasks: dict[str, ProbeConfig] = Field(min_length=1)
    counts: tuple[int, ...] | None = None
    random: int = Field(default=5, ge=0, le=1000)
    controls: Controls = "any"
    method: Masking = "uniform"
    scope: Scope = "decode"
    right: Right = "all"
    seed: int = Field(default=0, ge=0)


@checked
@own_types()
def masking_curves(
    model: HeadModel,
    scores: HeadScores | Heads,
    config: MaskingConfig | str | Path,
    *,
    progress: bool | None = None,
) -> dict[str, OrderCurve]:
    """Compute one masking curve per task of a config, or of a YAML file.

    Args:
        model: from :func:`headscope.load`.
        scores: as in :func:`masking_curve`.
        config: see :class:`headscope.retrieval.MaskingConfig`; ``configs/masking.yaml`` is an
            example.
        progress: show progress bars.

    Raises:
        InputError: with the first error in the file.

    Example:
        >>> config = MaskingConfig(
        ...     tasks={"copying": {"kind": "repeated_tokens", "length": 8, "batch": 2}},
        ...     counts=[0, 2], random=1,
        ... )
        >>> list(masking_curves(model, ["L0H0", "L1H0"], config))
        ['copying']
    """
    if not isinstance(config, MaskingConfig):
        config = parse(MaskingConfig, read_yaml(config), str(config))
    probes: Mapping[str, Probe] = {
        name: build_probe(task, model) for name, task in config.tasks.items()
    }
    return {
        name: masking_curve(
            model,
            probe,
            scores,
            counts=config.counts,
            random=config.random,
            controls=config.controls,
            method=config.method,
            scope=config.scope,
            right=config.right,
            seed=config.seed,
            progress=progress,
        )
        for name, probe in probes.items()
    }
