"""``hs.edges.attribute``: what every edge of a model contributes to a metric."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from headscope.edges.exact import exact_scores
from headscope.edges.gradients import gradient_scores
from headscope.edges.graph import EdgeGraph
from headscope.edges.written import EdgeBatch, Study
from headscope.errors import InputError, nearest
from headscope.metrics import AnyMetric, as_metric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.progress import track

Method = Literal["eap", "eap_ig", "exact"]


@own_types()
def attribute(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    method: str = "eap",
    steps: int = 5,
    *,
    ablation: str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> EdgeGraph:
    """Score every edge: how much the metric changes when it carries what a corrupted source writes.

    Nodes are the embedding (positions included, where they are added to it), every head with its
    query, key and value slots, every MLP, and the output. An edge carries what its source writes
    to the residual stream into one slot of its target, at all positions. Taking it out leaves what
    all other edges carry as it is; what follows the target is computed anew. Query heads that
    share a key/value head have a key and a value slot each. GPT-2 small has 32,491 edges.

    ``exact`` takes out one edge at a time, which costs a pass per edge and example. ``eap``
    estimates all of them by the gradient of the clean run: the change of what the source writes
    times the gradient of the metric by the input of the slot, norms included. The scores of the
    edges that leave a node sum to its own attribution, those of the edges that enter a slot to
    that of its input, exactly. ``eap_ig`` takes the mean gradient of ``steps`` runs whose embedding
    goes from the corrupt to the clean one (a left Riemann sum, which includes the corrupt run and
    not the clean one); it sees what a saturated softmax hides from a single gradient.

    An edge can be true and have score 0: what is equal in both texts of a pair, such as positions,
    is not seen by ``patch``; ``mean`` and ``zero`` see it.

    Args:
        model: the model; its heads must write to the residual stream by a matrix of their own, so
            families with a norm after attention are refused.
        probe: texts with answers, and the pair ``corrupt`` for ``patch``.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        method: ``eap``, ``eap_ig`` or ``exact``.
        steps: runs of ``eap_ig``; other methods take none.
        ablation: what an edge that is taken out carries: ``patch`` (also called ``corrupt``,
            ``counterfactual`` or ``resample``), what its source writes on the paired text at the
            same position; ``mean``, what it writes on average over the probe's real positions;
            ``zero``. Default: ``patch`` where the probe has a pair, else ``mean``.
        batch_size: examples per pass; changes no number.
        progress: show a bar.

    Returns:
        Scores in the metric's unit, per edge and example.

    Raises:
        InputError: if probe, metric and method do not fit each other.
        UnsupportedModelError: if heads of the model do not write by a matrix of their own.

    Source:
        Syed et al. 2023, arXiv 2310.10348 (edge attribution patching); Hanna et al. 2024,
        arXiv 2403.17806 (integrated gradients over inputs); Conmy et al. 2023, arXiv 2304.14997.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> graph = attribute(model, names, hs.metrics.logit_difference)
        >>> graph.head_scores.shape == (model.shape.n_layers, model.shape.n_heads)
        True
        >>> sorted(graph.scores)[0]
        Edge(source='L0H0', target='L1H0', slot='key')
    """
    _check_method(method, steps, as_metric(metric))
    study = Study.of(model, probe, metric, ablation, batch_size)
    with track(float(_work(study, method, steps)), f"edges by {method}", show=progress) as advance:
        parts = []
        for batch in study.batches():
            count = len(batch.texts.tokens)

            def done(passes: float, count: int = count) -> None:
                advance(passes * count)

            parts.append(_scores(batch, method, steps, done))
    return EdgeGraph(
        study.wiring,
        method,
        study.ablation,
        np.concatenate(parts, 1),
        model.shape.n_kv_heads,
        steps if method == "eap_ig" else 0,
        study.metric.unit,
        origin(
            model,
            probe,
            attention="whole passes",
            metric=study.metric.name,
            method=method,
            ablation=study.ablation,
            steps=steps if method == "eap_ig" else 0,
        ),
        probe.cluster_labels,
    )


def _check_method(method: str, steps: int, metric: AnyMetric) -> None:
    if method not in get_args(Method):
        raise InputError(nearest(str(method), get_args(Method), kind="method"))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: integrated gradients take 1 run or more.")
    if method == "eap" and "clean" in metric.needs:
        raise InputError(
            f"{metric.name} is smallest at the clean run, so its gradient there is 0: use "
            "method='eap_ig' or 'exact', or another metric."
        )


def _work(study: Study, method: str, steps: int) -> int:
    passes = {"eap": 1, "eap_ig": steps, "exact": len(study.wiring)}[method]
    return passes * len(study.probe)


def _scores(batch: EdgeBatch, method: str, steps: int, done: Callable[[float], None]) -> np.ndarray:
    """Scores ``[edge example]`` of one batch."""
    if method == "exact":
        found = exact_scores(batch, done)
    else:
        found = gradient_scores(batch, steps if method == "eap_ig" else 0)
        done(float(steps if method == "eap_ig" else 1))
    unread = ~batch.measured.counted.to(found.device)
    values: np.ndarray = found.masked_fill(unread[:, None], float("nan")).mT.numpy()
    return values
