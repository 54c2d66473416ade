"""``hs.ablate_heads``: the causal effect of every head on a metric."""

from headscope.ablation.arguments import Maker, Metricish, Positions, by_head, facts_of, present
from headscope.ablation.gradients import attribution
from headscope.ablation.run import Placer, Study
from headscope.ablation.single import ablated, as_scores, screened
from headscope.edits import Heads
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.table import HeadScores


def ablate_heads(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    method: Maker = "mean",
    heads: Heads | None = None,
    *,
    positions: Positions = None,
    reference: Probe | None = None,
    baseline: str = "mean",
    steps: int = 1,
    top: int = 10,
    sample: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Ablate every head on its own and measure what that does to a metric.

    The effect is ``metric(ablated) - metric(clean)``, per example. Its p-value is that of no
    effect, two-sided; ``.interval()`` gives bootstrap intervals. Numbers are those of one whole
    pass per head, at a fraction of the cost: only what an edit can reach is run again.

    Methods:
        ``mean``: the head's mean output over the reference. ``mean_pos``: at each position.
        ``zero``: 0 (what a value bias adds goes too). ``resample``: the output on another example
        (seeded). ``patch``: the output on the paired, corrupt example. ``uniform``: attention flat
        over the visible keys. ``attend_to_first``: all attention on the first token.
        ``attribution``: a first-order estimate of ``baseline`` for all heads at once, from one
        forward and one backward pass; with ``steps > 1``, integrated gradients on the way from
        the clean run to all heads ablated together. ``screened``: attribution for all, the
        ablation itself for the ``top`` heads and for a random ``sample`` of the others; the rank
        correlation of the two is in ``provenance.checks``.
        A function from heads to an edit: e.g. ``lambda heads: hs.edits.scale(heads, 0.5)``.

    Args:
        model: from :func:`headscope.load`.
        probe: what to run.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        method: one of the above.
        heads: which; default: all.
        positions: where to ablate: a mark of the probe, or ``[batch pos]``; default: everywhere.
        reference: where means and other examples come from; default: the probe itself.
        baseline: what attribution and screening estimate: ``mean``, ``zero``, ``mean_pos``,
            ``resample`` or ``patch``.
        steps: of attribution.
        top: heads with the largest estimates, of screening.
        sample: heads drawn from the others, of screening.
        seed: of what is drawn.
        batch_size: examples per recorded pass; changes nothing but time and memory.
        memory: what a stack of variants may take, e.g. ``"2GB"``.
        progress: show a bar; default: where somebody looks on and it takes over two seconds.

    Raises:
        InputError: if an argument does not fit the probe or the model.
        HeadscopeError: if a proof fails that the edits do what they say.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> hs.ablate_heads(model, probe, hs.metrics.loss, "zero", heads="L0H1").n[0, :2].tolist()
        [0, 2]
    """
    study = Study.of(model, probe, metric, batch_size=batch_size, memory=memory, progress=progress)
    chosen = present(model, heads)
    facts = dict(facts_of(method, reference, positions))
    if method in ("attribution", "screened"):
        facts |= {"baseline": baseline, "steps": steps}
        placer = Placer(study, baseline, positions=positions, reference=reference, seed=seed)
        if method == "attribution":
            effects = attribution(study, placer, chosen, steps)
        else:
            effects = screened(study, placer, chosen, steps, top, sample, seed)
    else:
        placer = Placer(study, method, positions=positions, reference=reference, seed=seed)
        effects = ablated(study, placer, chosen)
    provenance = study.provenance(seed, checks=placer.checks, **facts)
    return as_scores(study, by_head(model, chosen, effects), str(facts["method"]), provenance)
