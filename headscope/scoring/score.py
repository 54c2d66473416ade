"""The needs of all scorers, one shared forward pass per probe, one table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from headscope import capture
from headscope.base.options import RunOptions
from headscope.base.progress import Advance
from headscope.base.stacks import grid_of
from headscope.base.statistics import Design
from headscope.circuits.scores import score_weights
from headscope.errors import InputError, UnsupportedModelError
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel, lacks, need_model, views_of
from headscope.models.running import own_types
from headscope.origin import held_norm, origin
from headscope.probes import copied_tokens
from headscope.probes.images import random_images
from headscope.probes.probe import Probe
from headscope.scorer import Control, DefaultProbe, Scorer
from headscope.scorers import DEFAULT, Relation, resolve
from headscope.scoring.accumulate import Accumulator, Sums, gradient_sums, joined
from headscope.table import HeadScores, HeadTable, Provenance

Wanted = Iterable[str | Scorer | Relation] | str | Scorer | None


@own_types()
def score(
    model: HeadModel,
    probe: Probe | None = None,
    scorers: Wanted = None,
    *,
    batch_size: int | None = None,
    memory: str | int | None = None,
    max_tokens_per_chunk: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> HeadTable:
    """Score every attention head of a model.

    One forward pass per batch of a probe serves all scorers; a second one, on the probe's
    control, serves the nulls of those scorers that name it. Scorers of weights run nothing, and
    scorers of gradients take a forward and a backward pass for each metric.

    Args:
        model: from :func:`headscope.load`.
        probe: what to run; default: for each scorer the kind of probe that it is meant for.
        scorers: names from ``headscope.scorers.CATALOGUE``, scorers and relations, or a
            mixture; default: ``headscope.scorers.DEFAULT``, less what this family cannot be asked.
        batch_size: examples per pass; changes nothing but time and memory.
        memory: what one chunk of attention rows may take, e.g. ``"2GB"``.
        max_tokens_per_chunk: queries whose rows are held at once, over all examples of a batch
            (at least one of each); with ``memory`` the smaller of both counts.
        seed: of the default probes.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: for unknown scorers, or a probe that does not fit the model.
        UnsupportedModelError: if a scorer that you named does not apply to this family.

    Example:
        >>> import headscope as hs
        >>> table = hs.score(hs.load(), scorers=["previous_token", "induction"])
        >>> list(table)
        ['previous_token', 'induction']
    """
    need_model(model)
    if probe is not None:
        capture.need_probe(probe)
    options = RunOptions(batch_size, memory, seed, progress)
    if len(views := views_of(model)) > 1:
        return _by_stack(
            views,
            copied_tokens(model, seed=seed) if probe is None else probe,
            scorers,
            batch_size=batch_size,
            memory=memory,
            max_tokens_per_chunk=max_tokens_per_chunk,
            seed=seed,
            progress=progress,
        )
    probe = None if probe is None else capture.seen_by(model, probe)
    probe = None if probe is None else probe.on_grid(grid_of(model.stacks))
    chosen = _applicable(model, scorers, probe)
    groups = [_Group.of(*pair) for pair in _assign(model, chosen, probe, seed)]
    for group in groups:
        group.check(model)
    if max_tokens_per_chunk is not None and max_tokens_per_chunk < 1:
        raise InputError(f"max_tokens_per_chunk={max_tokens_per_chunk}: a chunk holds 1 or more.")
    done: dict[str, HeadScores] = {}
    of_weights = [scorer for scorer in chosen if scorer.reads == "weights"]
    if of_weights:
        found = score_weights(model, of_weights, seed=seed)
        done |= {name: one.of_stack(model.shape.stack) for name, one in found.items()}
    total = sum(group.examples for group in groups) * len(model.shape.attention_layers)
    with options.track(total, f"scoring {model.name}") as advance:
        run = partial(_run, model, options=options, tokens=max_tokens_per_chunk, advance=advance)
        for group in groups:
            sums, null = _group_sums(model, group, run, options, advance)
            facts = origin(model, group.probe)  # reads all weights, so once for all scorers
            for scorer in group.scorers:
                of = sums[scorer.name], null.get(scorer.name)
                done[scorer.name] = _to_scores(model, scorer, group, *of, facts)
    return HeadTable(done[scorer.name] for scorer in chosen)


def _by_stack(
    views: Sequence[HeadModel], probe: Probe, scorers: Wanted, **options: Any
) -> HeadTable:
    """Tables of all attention stacks in one, each of the scorers that apply to it.

    Raises:
        UnsupportedModelError: if one that was named applies to no stack.
    """
    listed = resolve(DEFAULT) if scorers is None else _listed(scorers)
    for one in () if scorers is None else listed:
        if all(any(lacks(view, need) for need in one.needs) for view in views):
            _applicable(views[-1], one, None)  # which says why
    found: list[HeadScores] = []
    for view in views:
        seen = capture.seen_by(view, probe)
        own = [one for one in listed if not any(lacks(view, need) for need in one.needs)]
        if scorers is None:
            own = [one for one in own if _can_read(one, view, seen)]
        found += score(view, seen, own, **options).values() if own else []
    return HeadTable(found)


@dataclass(frozen=True, eq=False)
class _Group:
    """A probe, the scorers that it serves, and the other examples that they are compared with."""

    probe: Probe
    scorers: tuple[Scorer, ...]
    controls: Mapping[Control, Probe | None]

    @classmethod
    def of(cls, probe: Probe, scorers: tuple[Scorer, ...]) -> "_Group":
        """With the examples of every control."""
        named = dict.fromkeys(s.control for s in scorers if s.control is not None)
        return cls(probe, scorers, {one: one.examples(probe) for one in named})

    @property
    def seen(self) -> tuple[Scorer, ...]:
        """Scorers that a forward pass serves."""
        return tuple(one for one in self.scorers if one.reads != "gradients")

    @property
    def by_metric(self) -> dict[AnyMetric, list[Scorer]]:
        """Scorers of gradients, by the metric whose gradients they read."""
        found: dict[AnyMetric, list[Scorer]] = {}
        for one in self.scorers:
            if one.metric is not None:
                found.setdefault(one.metric, []).append(one)
        return found

    @property
    def passes(self) -> list[tuple[Probe, tuple[Scorer, ...]]]:
        """Passes over other examples, each with the scorers that are compared with them."""
        found: dict[Callable[[Probe], Probe | None], tuple[Probe, list[Scorer]]] = {}
        for scorer in self.seen:
            control = scorer.control
            other = None if control is None else self.controls[control]
            if control is not None and control.of == "pass" and other is not None:
                found.setdefault(control.examples, (other, []))[1].append(scorer)
        return [(other, tuple(scorers)) for other, scorers in found.values()]

    @property
    def examples(self) -> int:
        """Examples of all passes."""
        own = len(self.probe) * (bool(self.seen) + len(self.by_metric))
        return own + sum(len(other) for other, _ in self.passes)

    @property
    def numbered(self) -> Probe:
        """The probe as it is run: examples know their number and the others that some ask for."""
        number = torch.arange(len(self.probe), dtype=torch.float32)
        numbered = replace(self.probe, facts={**self.probe.facts, "example": number})
        others = [one for one in self.controls if one.of == "same_rows"]
        if not others:
            return numbered
        other = others[0].examples(replace(numbered, control=None, corrupt=None))
        return replace(numbered, control=other)

    def check(self, model: HeadModel) -> None:
        """Name what the probe lacks, or has too much of, before any pass.

        Raises:
            InputError: for a mark that a scorer looks at, or a probe that does not fit.
        """
        for scorer in self.scorers:
            scorer.queries(self.probe)
            if scorer.metric is not None:
                scorer.metric.reads(self.probe)
        answers = any("unembedding" in scorer.needs for scorer in self.scorers)
        capture.check_fits(model, self.probe, answers=answers)


def _group_sums(
    model: HeadModel,
    group: _Group,
    run: Callable[..., tuple[dict[str, Sums], dict[str, Sums]]],
    options: RunOptions,
    advance: Advance,
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Sums of every scorer of a group, and of their nulls."""
    sums: dict[str, Sums] = {}
    null: dict[str, Sums] = {}
    if group.seen:
        sums, null = run(group.numbered, group.seen, flat=True)
    for other, compared in group.passes:
        null |= run(other, compared, flat=False)[0]
    for metric, scorers in group.by_metric.items():
        sums |= gradient_sums(model, group.probe, metric, scorers, options, advance)
    return sums, null


def _applicable(model: HeadModel, wanted: Wanted, probe: Probe | None) -> tuple[Scorer, ...]:
    """Scorers that were asked for; by default those that fit this family and the caller's probe."""
    if wanted is None:
        return tuple(
            scorer
            for scorer in resolve(DEFAULT)
            if not any(lacks(model, need) for need in scorer.needs)
            and _can_read(scorer, model, probe)
        )
    chosen = _listed(wanted)
    for scorer in chosen:
        for need in scorer.needs:
            if (reason := lacks(model, need)) is not None:
                raise UnsupportedModelError(f"{scorer.name} needs {need}: {reason}")
    return chosen


def _listed(wanted: Iterable[str | Scorer | Relation] | str | Scorer) -> tuple[Scorer, ...]:
    """Scorers that were asked for."""
    if not isinstance(wanted, str | Scorer | Iterable):
        raise InputError(f"scorers={wanted!r}: give a scorer, its name, or a list of them.")
    chosen = resolve([wanted] if isinstance(wanted, str | Scorer) else list(wanted))
    if not chosen:
        raise InputError("no scorers given: name at least one, or leave them out for the defaults.")
    return chosen


def _can_read(scorer: Scorer, model: HeadModel, probe: Probe | None) -> bool:
    """Whether a probe has the marks that a scorer looks at, or one with them can be made."""
    if probe is None and grid_of(model.stacks) is not None:
        probe = random_images(model, batch=1)  # whose positions have the marks that there are
    if probe is None:
        return scorer.probe is None or scorer.probe.possible(model)
    try:
        scorer.queries(probe)
    except InputError:
        return False
    return True


def _assign(
    model: HeadModel, scorers: tuple[Scorer, ...], probe: Probe | None, seed: int
) -> list[tuple[Probe, tuple[Scorer, ...]]]:
    """Which probe serves which scorers."""
    running = [scorer for scorer in scorers if scorer.reads != "weights"]
    if probe is not None:
        return [(probe, group) for group in _beside(running)]
    by_kind: dict[DefaultProbe, list[Scorer]] = {}
    for scorer in running:
        if scorer.probe is None:
            raise InputError(f"{scorer.name} has no default probe: pass probe=.")
        by_kind.setdefault(scorer.probe.suited(model), []).append(scorer)
    made: dict[Callable[..., Probe], Probe] = {}
    found = []
    for kind, group in by_kind.items():
        if kind.make not in made:
            made[kind.make] = kind.make(model, seed)
        found += [(made[kind.make], part) for part in _beside(group)]
    return found


def _beside(scorers: Sequence[Scorer]) -> list[tuple[Scorer, ...]]:
    """Groups that may share passes: examples have one other example each to be asked of."""
    groups: dict[object, list[Scorer]] = {}
    rest = []
    for scorer in scorers:
        control = scorer.control
        if control is not None and control.of == "same_rows":
            groups.setdefault(control.examples, []).append(scorer)
        else:
            rest.append(scorer)
    first, *more = list(groups.values()) or [[]]
    asking = set(map(id, (*first, *rest)))
    together = [scorer for scorer in scorers if id(scorer) in asking]  # in the order given
    return [tuple(group) for group in (together, *more) if group]


def _run(
    model: HeadModel,
    probe: Probe,
    scorers: tuple[Scorer, ...],
    *,
    flat: bool,
    options: RunOptions,
    tokens: int | None,
    advance: Advance,
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Sums of every scorer over the whole probe, and of the nulls that come from the same rows."""

    def watch(batch: Probe, halvings: int) -> Accumulator:
        def on_layer(steps: float = 1) -> None:
            advance(steps * len(batch))

        budget = options.memory_bytes
        return Accumulator(model, batch, scorers, flat, budget, halvings, on_layer, tokens)

    passes = capture.stream(model, probe, watch, batch_size=options.batch_size)
    parts = [(part.sums, part.flat_sums) for _, part in passes]
    sums, flats = zip(*parts, strict=True)
    return joined(sums), joined(flats)


def _to_scores(
    model: HeadModel,
    scorer: Scorer,
    group: _Group,
    sums: Sums,
    null: Sums | None,
    facts: Provenance,
) -> HeadScores:
    held = held_norm(model) if "attention_write" in scorer.needs else {}
    name = None if scorer.control is None or null is None else scorer.control.name
    grid = group.probe.grid
    return HeadScores.from_examples(
        scorer.spec if grid is None else scorer.spec.in_patches,
        _absent(model, sums.mean.numpy()),
        kv_heads=model.shape.n_kv_heads,
        control_per_example=None if null is None else _absent(model, null.mean.numpy()),
        design=_design(scorer, group),
        missing=np.where(_there(model), sums.missing.numpy(), 0).astype(int),
        provenance=replace(facts, control=name, probe={**facts.probe, **held}),
    ).of_stack(model.shape.stack)


def _absent(
    model: HeadModel, values: Float[np.ndarray, "layer head batch"]
) -> Float[np.ndarray, "layer head batch"]:
    """NaN where a layer has no attention, or lost the head."""
    return np.where(_there(model)[:, :, None], values, np.nan)


def _there(model: HeadModel) -> Bool[np.ndarray, "layer head"]:
    """Which heads the model has."""
    there = np.zeros((model.shape.n_layers, model.shape.n_heads), dtype=bool)
    there[tuple(np.transpose(model.shape.heads))] = True
    return there


def _design(scorer: Scorer, group: _Group) -> Design:
    """How the examples and those of the null belong together: the same rows are paired."""
    control = scorer.control
    if control is None or control.of != "pass":
        paired = control is not None and scorer.kind == "row"
        return Design(paired=paired, clusters=group.probe.cluster_labels)
    other = group.controls[control]
    return Design(
        paired=other is not None and other.paired,
        clusters=group.probe.cluster_labels,
        control_clusters=None if other is None else other.cluster_labels,
    )
