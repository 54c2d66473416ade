"""``hs.score``: the needs of all scorers, one shared forward pass per probe, one table.

The function is ``headscope.score``; the module is not called so, or importing it would hide it.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float

from headscope import capture, probes
from headscope.accumulate import Accumulator, Sums, joined
from headscope.base.statistics import Design
from headscope.errors import InputError, UnsupportedModelError
from headscope.memory import parse_memory
from headscope.models.needs import lacks
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import held_norm, origin
from headscope.probes.probe import Probe
from headscope.progress import Advance, track
from headscope.scorers import DEFAULT, Relation, Scorer, resolve
from headscope.table import HeadScores, HeadTable, Provenance

# Nulls that come from a pass over the probe's control.
_OWN_PASS = ("unrepeated", "needle")
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
    control, serves the nulls of those scorers that name it.

    Args:
        model: from :func:`headscope.load`.
        probe: what to run; default: for each scorer the kind of probe that it is meant for.
        scorers: names from ``headscope.scorers.CATALOGUE``, scorers and relations of your own, or a
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
    chosen = _applicable(model, scorers, probe)
    by_probe = _assign(model, chosen, probe, seed)
    for one, group in by_probe:
        for scorer in group:
            scorer.queries(one)  # a mark that the probe lacks is named before any pass
        capture.check_fits(model, one, answers=any("readout" in s.needs for s in group))
    budget = parse_memory(memory)
    if max_tokens_per_chunk is not None and max_tokens_per_chunk < 1:
        raise InputError(f"max_tokens_per_chunk={max_tokens_per_chunk}: a chunk holds 1 or more.")
    layers = len(model.shape.attention_layers)
    total = sum(len(one) * (1 + _has_control_pass(one, group)) for one, group in by_probe) * layers
    done: dict[str, HeadScores] = {}
    with track(total, f"scoring {model.name}", show=progress) as advance:
        run = partial(
            _run,
            model,
            batch_size=batch_size,
            memory=budget,
            tokens=max_tokens_per_chunk,
            advance=advance,
        )
        for one, group in by_probe:
            sums, flat = run(_numbered(one, group), group, flat=True)
            compared = tuple(s for s in group if s.control in _OWN_PASS)
            control: dict[str, Sums] = {}
            if one.control is not None and compared:
                control, _ = run(one.control, compared, flat=False)
            facts = origin(model, one)  # reads all weights, so once for all scorers
            for scorer in group:
                null = control.get(scorer.name) or flat.get(scorer.name)
                done[scorer.name] = _to_scores(model, scorer, one, sums[scorer.name], null, facts)
    return HeadTable(done[scorer.name] for scorer in chosen)


def _applicable(model: HeadModel, wanted: Wanted, probe: Probe | None) -> tuple[Scorer, ...]:
    """Scorers that were asked for; by default those that fit this family and the caller's probe."""
    if wanted is None:
        return tuple(
            scorer
            for scorer in resolve(DEFAULT)
            if not any(lacks(model, need) for need in scorer.needs)
            and _can_read(scorer, model, probe)
        )
    listed = [wanted] if isinstance(wanted, str | Scorer) else list(wanted)
    chosen = resolve(listed)
    if not chosen:
        raise InputError("no scorers given: name at least one, or leave them out for the defaults.")
    for scorer in chosen:
        for need in scorer.needs:
            if (reason := lacks(model, need)) is not None:
                raise UnsupportedModelError(f"{scorer.name} needs {need}: {reason}")
    return chosen


def _can_read(scorer: Scorer, model: HeadModel, probe: Probe | None) -> bool:
    """Whether a probe has the marks that a scorer looks at, or one with them can be made."""
    if probe is None:
        return model.tokenizer is not None or _kind_for(model, scorer) != "text"
    try:
        scorer.queries(probe)
    except InputError:
        return False
    return True


def _assign(
    model: HeadModel, scorers: tuple[Scorer, ...], probe: Probe | None, seed: int
) -> list[tuple[Probe, tuple[Scorer, ...]]]:
    """Which probe serves which scorers."""
    if probe is not None:
        return [(probe, scorers)]
    by_kind: dict[str, list[Scorer]] = {}
    for scorer in scorers:
        by_kind.setdefault(_kind_for(model, scorer), []).append(scorer)
    return [(_default_probe(model, kind, seed), tuple(group)) for kind, group in by_kind.items()]


def _kind_for(model: HeadModel, scorer: Scorer) -> str:
    """Kind of probe for a scorer; without a tokenizer, random tokens stand in for text."""
    marked = scorer.name in ("delimiter", "separator")  # of which random tokens have none
    if scorer.probe == "text" and model.tokenizer is None and not marked:
        return "repeated_tokens"
    return scorer.probe


def _default_probe(model: HeadModel, kind: str, seed: int) -> Probe:
    """Kind of probe by the name that scorers use."""
    if kind == "repeated_tokens":
        longest = model.shape.n_ctx or 512
        length = min(50, (longest - 1) // 2)
        return probes.repeated_tokens(model, length=length, batch=16, seed=seed)
    if kind == "text":
        return probes.text(model, seed=seed)
    if kind == "needle":
        return probes.needle(model, seed=seed)
    if kind == "ioi":
        return probes.pairs(model, "ioi", seed=seed)
    raise InputError(f"there is no default probe of kind {kind!r}: pass probe=.")


def _numbered(probe: Probe, scorers: tuple[Scorer, ...]) -> Probe:
    """The probe as it is run: examples know their number, and, if asked for, another example."""
    own = {**probe.facts, "example": torch.arange(len(probe), dtype=torch.float32)}
    numbered = replace(probe, facts=own)
    if not any(scorer.control == "other_example" for scorer in scorers):
        return numbered
    return replace(numbered, control=_others(replace(numbered, control=None, corrupt=None)))


def _others(probe: Probe) -> Probe:
    """For every example another one of its length; ``alone`` is 1 where there is none.

    Which one does not depend on the order of the examples: the next by their tokens.
    """
    order = sorted(range(len(probe)), key=lambda row: (probe.tokens[row].tolist(), row))
    peers: dict[tuple[int, int], list[int]] = {}
    for row in order:
        peers.setdefault((int(probe.first[row]), int(probe.last[row])), []).append(row)
    chosen = torch.arange(len(probe))
    for rows in peers.values():
        chosen[rows] = torch.tensor([*rows[1:], rows[0]])
    alone = (chosen == torch.arange(len(probe))).float()
    other = probe.examples(chosen)
    return replace(other, facts={**other.facts, "alone": alone})


def _has_control_pass(probe: Probe, scorers: tuple[Scorer, ...]) -> bool:
    return probe.control is not None and any(s.control in _OWN_PASS for s in scorers)


def _run(
    model: HeadModel,
    probe: Probe,
    scorers: tuple[Scorer, ...],
    *,
    flat: bool,
    batch_size: int | None,
    memory: int | None,
    tokens: int | None,
    advance: Advance,
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Sums of every scorer over the whole probe, and of the nulls that come from the same rows."""

    def watch(batch: Probe, halvings: int) -> Accumulator:
        def on_layer(steps: float = 1) -> None:
            advance(steps * len(batch))

        return Accumulator(model, batch, scorers, flat, memory, halvings, on_layer, tokens)

    passes = capture.stream(model, probe, watch, batch_size=batch_size)
    parts = [(part.sums, part.flat_sums) for _, part in passes]
    sums, flats = zip(*parts, strict=True)
    return joined(sums), joined(flats)


def _to_scores(
    model: HeadModel,
    scorer: Scorer,
    probe: Probe,
    sums: Sums,
    null: Sums | None,
    facts: Provenance,
) -> HeadScores:
    held = held_norm(model) if "attention_write" in scorer.needs else {}
    return HeadScores.from_examples(
        scorer.name,
        _absent(model, sums.mean.numpy()),
        kv_heads=model.shape.n_kv_heads,
        control_per_example=None if null is None else _absent(model, null.mean.numpy()),
        design=_design(scorer, probe),
        alternative=scorer.alternative,
        missing=np.where(_there(model), sums.missing.numpy(), 0).astype(int),
        unit=scorer.unit,
        bounds=scorer.bounds,
        description=scorer.description,
        source=scorer.source,
        threshold=scorer.threshold,
        provenance=replace(
            facts,
            control=scorer.control if null is not None else None,
            probe={**facts.probe, **held},
        ),
    )


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


def _design(scorer: Scorer, probe: Probe) -> Design:
    """How the examples and those of the null belong together: flat attention is paired."""
    other = probe.control if scorer.control in _OWN_PASS else None
    return Design(
        paired=other.paired if other is not None else scorer.control in ("flat", "other_example"),
        clusters=probe.cluster_labels,
        control_clusters=None if other is None else other.cluster_labels,
    )
