"""Label words as anchors: they gather information from demonstrations for the prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture
from headscope.ablation.run import Measurement
from headscope.base.arguments import checked
from headscope.base.checkpoints import AdamRun, Checkpoint
from headscope.base.options import RunOptions, track
from headscope.base.result import Listed
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.edits import Span
from headscope.errors import InputError, positive, whole
from headscope.heads import ModelShape
from headscope.metrics import LogitRows, Metric, loss
from headscope.models.decoding import need_continuing
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Reads, Tap, TapView, Write, at_layers
from headscope.origin import origin
from headscope.probes.probe import Probe, probe_digest
from headscope.table import HeadScores, HeadTable, Provenance
from headscope.table.relevance import Anchors

SOURCE = "Wang et al. 2023 (arXiv 2305.14160), label words are anchors"
FLOWS = ("text_to_label", "label_to_final", "other")
_QUERIES = 128  # number of queries whose rows are held at once


@checked
@own_types()
def anchors(
    model: HeadModel,
    probe: Probe,
    *,
    isolate: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Anchors:
    """Measure how label words gather information and pass it to the final position.

    Let ``I = |sum over heads of A * d loss / d A|`` in a layer, with the loss on the target at
    ``end``, and p the label words. ``text_to_label`` is the mean of I over pairs (p, any earlier
    key), ``label_to_final`` over pairs (end, p), and ``other`` over all other pairs of a query and
    an earlier key up to the end. Per-head values take the absolute value per head. Gradients of
    attention are ``d loss / d z . v``, so no pattern is part of the backward pass; rows are
    computed a few queries at a time.

    ``anchor_auc``: how well a head's attention from ``end`` to the label words of each class
    predicts the model's own answer (the class whose label has the largest logit). It is the AUC of
    the difference between two classes on the examples predicted as either, averaged over pairs of
    classes; 0.5 by chance. With two classes, the p-value is from the Mann-Whitney test.
    ``layer_auc`` uses the sum over heads.

    Args:
        model: decoder with causal attention.
        probe: probe from :func:`headscope.probes.in_context`, or one with the marks ``end``,
            ``label_0``, ``label_1``, ... and targets at ``end``.
        isolate: also cut label words off from everything before them, in this many first and last
            layers, and report the change in loss and the share of unchanged predictions, with as
            many random other tokens as a control.
        batch_size: examples per pass.
        seed: seed for the random tokens of the isolation control.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the probe has no label words, a class does not have the same token in all
            examples, or a number is out of range.

    Source: Wang et al. 2023 (arXiv 2305.14160).

    Example:
        >>> shown = [("cat", " Mary"), ("dog", " John"), ("park", " Mary"), ("box", " John")]
        >>> probe = hs.probes.in_context(model, shown, template="the {text} and{label} .")
        >>> found = hs.relevance.anchors(model, probe)
        >>> sorted(found.heads)
        ['anchor_auc', 'label_to_final', 'other', 'text_to_label']
    """
    need_continuing(model)
    labels = _Labels.of(probe)
    layers = len(model.shape.attention_layers)
    if isolate is not None and whole(isolate, "isolate", 1) > layers:
        raise InputError(f"isolate={isolate}: the model has {layers} layers with attention.")
    capture.check_fits(model, probe, answers=True)
    parts: list[_Flows] = []
    with track(len(probe), "saliency of attention", show=progress) as advance:
        for chosen, part in capture.passes(
            model, probe, lambda batch, _: _flows(model, batch, labels), batch_size=batch_size
        ):
            parts.append(part)
            advance(chosen.stop - chosen.start)
    shape = model.shape
    heads = {name: _joined([p.heads[name] for p in parts], shape) for name in FLOWS}
    flows = {name: _joined([p.layers[name] for p in parts], shape)[:, 0] for name in FLOWS}
    paid = _joined([p.paid for p in parts], shape)  # [layer head class example]
    predicted = np.concatenate([p.predicted for p in parts])
    about = origin(model, probe)
    isolation = None
    if isolate is not None:
        isolation = isolated(model, probe, labels, isolate, seed, batch_size, progress)
    return Anchors(
        classes=labels.texts(model),
        flows=flows,
        heads=_table(shape, heads, paid, predicted, probe, about),
        layer_auc=pairwise_auc(np.moveaxis(paid.sum(1), 1, -1), predicted),
        predicted=predicted,
        right=labels.right.numpy(),
        isolation=isolation,
        provenance=about,
    )


@dataclass(frozen=True, eq=False)
class _Labels:
    """Positions and token of every class's label words."""

    tokens: Int[Tensor, " class"]
    places: tuple[str, ...]
    right: Int[Tensor, " example"]

    @classmethod
    def of(cls, probe: Probe) -> "_Labels":
        """Validate the probe.

        Raises:
            InputError: see :func:`anchors`.
        """
        names = sorted(
            (name for name in probe.marks if name.startswith("label_") and name[6:].isdigit()),
            key=lambda name: int(name[6:]),
        )
        if len(names) < 2:
            raise InputError(
                "the probe marks no label words of two classes (label_0, label_1, ...): make it "
                "with hs.probes.in_context."
            )
        host = probe.host
        tokens = []
        for name in names:
            mark = host.mark(name)
            if not bool(mark.any(1).all()):
                raise InputError(f"an example shows no word of the class {name!r}.")
            ids = set(host.tokens[mark].tolist())
            if len(ids) > 1:
                raise InputError(
                    f"the words marked {name!r} are {len(ids)} different tokens: give one token "
                    "per class."
                )
            tokens.append(ids.pop())
        end = host.mark("end")
        if not bool((end.sum(1) == 1).all()):
            raise InputError("every example needs one position marked 'end'.")
        answers = host.targets[end]
        wrong = [one for one in answers.tolist() if one not in tokens]
        if wrong:
            raise InputError(f"the target {wrong[0]} is not the label word of any class.")
        return cls(
            torch.tensor(tokens),
            tuple(names),
            torch.tensor([tokens.index(one) for one in answers.tolist()]),
        )

    def texts(self, model: HeadModel) -> tuple[str, ...]:
        """Texts of the label words; numbers without a tokenizer."""
        if model.tokenizer is None:
            return tuple(map(str, self.tokens.tolist()))
        return tuple(str(model.tokenizer.decode([one])) for one in self.tokens.tolist())


@dataclass
class _Flows:
    """Accumulator of one batch's flows, layer by layer."""

    probe: Probe
    labels: _Labels
    slopes: Mapping[int, Float[Tensor, "batch pos head d_head"]]
    predicted: Int[np.ndarray, " batch"]
    heads: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    layers: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    paid: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Read every layer's rows and values."""
        return at_layers(shape, self._add)

    def _add(self, view: TapView) -> None:
        host = self.probe.host
        values, layer = view.values().float(), view.layer
        slope = self.slopes[layer].to(values.device)
        group = slope.shape[2] // values.shape[1]
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for at in torch.arange(view.n_queries).split(_QUERIES):
            pattern = view.rows(at).pattern
            keys = pattern.shape[-1]
            spread = values[:, :, :keys].repeat_interleave(group, 1)
            gains = torch.einsum("bqhd,bhkd->bhqk", slope[:, at], spread) * pattern
            both = torch.cat([gains.abs(), gains.sum(1, keepdim=True).abs()], 1)
            for name, pairs in _pairs(host, at, keys).items():
                weight = pairs.to(both)
                part = torch.einsum("bhqk,bqk->bh", both, weight)
                sums[name] = sums.get(name, 0) + part
                counts[name] = counts.get(name, 0) + weight.sum((1, 2))
        for name, total in sums.items():
            mean = total / counts[name].where(counts[name] > 0, torch.nan)[:, None]
            self.heads.setdefault(name, {})[layer] = mean[:, :-1].T
            self.layers.setdefault(name, {})[layer] = mean[:, -1:].T
        self.paid[layer] = self._attended(view)

    def _attended(self, view: TapView) -> Float[Tensor, "head class batch"]:
        """Attention from ``end`` to the label words of each class."""
        host = self.probe.host
        ends = host.mark("end").int().argmax(1)
        places: list[int] = sorted(set(ends.tolist()))
        pattern = view.rows(torch.tensor(places)).pattern
        keys = pattern.shape[-1]
        column = torch.tensor([places.index(one) for one in ends.tolist()])
        rows = pattern[torch.arange(len(ends)), :, column]
        marks = torch.stack([host.mark(name)[:, :keys] for name in self.labels.places])
        return torch.einsum("bhk,cbk->hcb", rows, marks.to(rows))


def _pairs(
    probe: Probe, at: Int[Tensor, " query"], keys: int
) -> dict[str, Bool[Tensor, "batch query key"]]:
    """Mask of the (query, key) pairs of each flow."""
    label, end = (
        probe.mark("label") if "label" in probe.marks else _any_label(probe),
        probe.mark("end"),
    )
    key = torch.arange(keys)
    last = end.int().argmax(1)
    earlier = (key[None] < at[:, None])[None] & probe.real[:, None, :keys]
    earlier = earlier & (at[None] <= last[:, None])[:, :, None] & probe.real[:, at, None]
    into = earlier & label[:, at, None]
    final = earlier & end[:, at, None] & label[:, None, :keys]
    return {"text_to_label": into, "label_to_final": final, "other": earlier & ~into & ~final}


def _any_label(probe: Probe) -> Bool[Tensor, "batch pos"]:
    marks = [mark for name, mark in probe.marks.items() if name.startswith("label_")]
    return torch.stack(marks).any(0)


def _flows(model: HeadModel, batch: Probe, labels: _Labels) -> _Flows:
    """Saliency of one batch: a backward pass to head outputs, then a pass over rows."""
    outputs: dict[int, Tensor] = {}
    end = batch.host.mark("end").int().argmax(1)
    where = torch.nn.functional.one_hot(end, batch.length).bool()

    def keep(view: TapView) -> None:
        outputs[view.layer] = view.value

    with torch.enable_grad():
        rows = capture.logits_where(model, batch, where, reads=at_layers(model.shape, keep))
        answers = batch.host.targets[torch.arange(len(batch)), end].to(rows.device)
        total = torch.nn.functional.cross_entropy(rows, answers, reduction="sum")
        slopes = torch.autograd.grad(total, list(outputs.values()))
    found = _Flows(
        batch,
        labels,
        {layer: one.float() for layer, one in zip(outputs, slopes, strict=True)},
        rows.detach()[:, labels.tokens.to(rows.device)].argmax(1).cpu().numpy(),
    )
    nothing = torch.empty(0, dtype=torch.long)
    with torch.no_grad():
        model.run(batch, reads=found.reads(model.shape), logits_at=nothing)
    return found


def _joined(parts: Sequence[Mapping[int, Tensor]], shape: ModelShape) -> np.ndarray:
    """Values of all layers and examples; NaN for layers without attention."""
    whole = {
        layer: torch.cat([part[layer] for part in parts], -1).cpu().double().numpy()
        for layer in parts[0]
    }
    blank = np.full_like(next(iter(whole.values())), np.nan)
    return np.stack([whole.get(layer, blank) for layer in range(shape.n_layers)])


@checked
def pairwise_auc(
    scores: Float[np.ndarray, "*any example class"], chosen: Int[np.ndarray, " example"]
) -> Float[np.ndarray, "*any"]:
    """How well class scores predict the chosen class: AUC, averaged over pairs of classes.

    For classes i and j, take all pairs of an example with j chosen and an example with i chosen:
    the AUC is the share of pairs in which the first has the larger ``score_j - score_i``; ties
    count half.

    Args:
        scores: score of every class on every example.
        chosen: class number of every example.

    Returns:
        AUC from 0 to 1, 0.5 by chance; NaN if only one class was ever chosen.

    Example:
        >>> scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
        >>> float(hs.relevance.pairwise_auc(scores, np.array([0, 1, 0, 1])))
        1.0
    """
    found = []
    for first in range(scores.shape[-1]):
        for second in range(first + 1, scores.shape[-1]):
            gap = scores[..., second] - scores[..., first]
            high, low = gap[..., chosen == second], gap[..., chosen == first]
            if high.shape[-1] and low.shape[-1]:
                apart = np.sign(high[..., :, None] - low[..., None, :])
                found.append((apart.mean((-2, -1)) + 1) / 2)
    if not found:
        return np.full(scores.shape[:-2], np.nan)
    return np.asarray(np.mean(found, 0))


def _table(
    shape: ModelShape,
    heads: Mapping[str, np.ndarray],
    paid: Float[np.ndarray, "layer head class example"],
    predicted: Int[np.ndarray, " example"],
    probe: Probe,
    about: Provenance,
) -> HeadTable:
    said = {
        "text_to_label": "its attention from label words to earlier tokens affects the loss",
        "label_to_final": "its attention from the end to label words affects the loss",
        "other": "its other attention affects the loss",
    }
    scores = [
        HeadScores.from_examples(
            name, heads[name], kv_heads=shape.n_kv_heads, unit="nats", bounds=(0.0, None),
            description=said[name], source=SOURCE, provenance=about,
            design=Design(clusters=probe.cluster_labels),
        )
        for name in FLOWS
    ]  # fmt: skip
    auc = pairwise_auc(np.moveaxis(paid, 2, -1), predicted)
    scores.append(
        HeadScores.from_summary(
            "anchor_auc",
            auc,
            kv_heads=shape.n_kv_heads,
            n=np.where(np.isnan(auc), 0, len(predicted)),
            known={"null": np.where(np.isnan(auc), np.nan, 0.5), "p_value": _p_of(paid, predicted)},
            unit="share",
            bounds=(0.0, 1.0),
            description="attention to label words predicts the model's own prediction",
            source=SOURCE,
            provenance=about,
        )
    )
    return HeadTable(scores)


def _p_of(
    paid: Float[np.ndarray, "layer head class example"], predicted: Int[np.ndarray, " example"]
) -> Float[np.ndarray, "layer head"]:
    """One-sided Mann-Whitney p-value for two classes; NaN for more classes."""
    from scipy import stats

    high, low = predicted == 1, predicted == 0
    if paid.shape[2] != 2 or min(high.sum(), low.sum()) < 2:
        return np.full(paid.shape[:2], np.nan)
    gap = paid[:, :, 1] - paid[:, :, 0]
    p = stats.mannwhitneyu(gap[..., high], gap[..., low], alternative="greater", axis=-1).pvalue
    return np.where(np.isnan(gap).any(-1), np.nan, p)


@dataclass(frozen=True, eq=False)
class CutOff:
    """Edit of patterns that cuts some queries off from everything before them.

    Attributes:
        layers: layers that the edit applies to.
        queries: query positions to cut off, ``[batch pos]``; each keeps only its own key.
    """

    layers: frozenset[int]
    queries: Bool[Tensor, "batch pos"]
    site: Literal["pattern"] = field(init=False, default="pattern")

    def __call__(self, layer: int, value: Float[Tensor, "batch head query key"]) -> Tensor:
        """Return the rows with the chosen queries attending only to themselves."""
        size = value.shape[-2]
        own = torch.eye(size, value.shape[-1], device=value.device, dtype=value.dtype)
        where = self.queries[:, None, :size, None].to(value.device)
        return torch.where(where, own, value)


def isolated(
    model: HeadModel,
    probe: Probe,
    labels: _Labels,
    count: int,
    seed: int,
    batch_size: int | None,
    progress: bool | None,
) -> dict[str, Float[np.ndarray, " example"]]:
    """Loss and predictions with label words, or control tokens, cut off from earlier tokens."""
    layers = model.shape.attention_layers
    label = _any_label(probe.host)
    other = _others(probe.host, label, seed)
    arms = {
        f"{what}, {where} {count} layers": (frozenset(some), mask)
        for what, mask in (("label words", label), ("random tokens", other))
        for where, some in (("first", layers[:count]), ("last", layers[-count:]))
    }

    def label_of(rows: LogitRows) -> Float[Tensor, " row"]:
        return rows.logits[:, labels.tokens.to(rows.logits.device)].argmax(1).float()

    spec = ScoreSpec("kept", unit="class", description="Label with the largest logit.")
    study = Measurement.of(
        model,
        probe,
        loss.at("end"),
        RunOptions(batch_size, progress=progress),
        others=[Metric(spec, label_of, needs=frozenset(), mark="end")],
    )
    edited, clean = study.measure_all(
        lambda chosen, _: [(CutOff(some, mask[chosen]),) for some, mask in arms.values()],
        len(arms),
        "isolating label words",
    )
    found = {}
    for number, name in enumerate(arms):
        found[f"loss, {name}"] = edited[0, number] - clean[0]
        found[f"kept, {name}"] = (edited[1, number] == clean[1]).astype(float)
    return found


def _others(probe: Probe, label: Bool[Tensor, "batch pos"], seed: int) -> Bool[Tensor, "batch pos"]:
    """Random control tokens between the first token and the end, as many as label words."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(label.shape, generator=generator)
    free = probe.real & ~label & ~probe.mark("end") & (probe.position_in_text > 0)
    drawn = drawn.masked_fill(~free, 2.0)
    order = drawn.argsort(1).argsort(1)
    return free & (order < label.sum(1, keepdim=True))


@dataclass(frozen=True, eq=False, repr=False)
class Reweighted(Listed):
    """Learned weights of label words by head and class, on a frozen model.

    Attributes:
        beta: attention from ``end`` to the words of a class is multiplied by ``exp(beta)``,
            ``[layer head class]``.
        losses: training loss before each step.
        before, after: accuracy on the test examples without and with the weights.
    """

    beta: Float[np.ndarray, "layer head class"]
    losses: tuple[float, ...]
    before: float
    after: float

    @property
    def size(self) -> Float[np.ndarray, "layer head"]:
        """``mean over classes of |beta|``: how far the head's weights moved."""
        return np.asarray(np.abs(self.beta).mean(-1))


@checked
@own_types()
def reweight(
    model: HeadModel,
    probe: Probe,
    *,
    test: Probe | None = None,
    steps: int = 10,
    rate: float = 0.1,
    folder: str | PathLike[str] | None = None,
    every: int = 20,
    progress: bool | None = None,
) -> Reweighted:
    """Learn per-head weights for the attention to each class's label words, with the model frozen.

    Attention from ``end`` to the words of class k is multiplied by the ``exp(beta)`` of its head
    and class, without renormalising; beta starts at 0, which changes nothing. Adam minimises the
    cross-entropy of the target among the class labels, with the whole probe in every step.

    Args:
        model: decoder with causal attention.
        probe: training examples; see :func:`anchors`.
        test: examples for the reported accuracy. Default: the training probe, which is optimistic.
        steps: number of Adam steps.
        rate: learning rate.
        folder: checkpoint folder; the same call resumes from it and gives the same numbers.
        every: steps between two checkpoints.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if a probe does not fit the model, a number is out of range, or the folder holds
            another run.
        HeadscopeError: if the loss becomes NaN or infinite.

    Source: Wang et al. 2023 (arXiv 2305.14160), section 4.1.

    Example:
        >>> shown = [("cat", " Mary"), ("dog", " John"), ("park", " Mary"), ("box", " John")]
        >>> probe = hs.probes.in_context(model, shown, template="the {text} and{label} .")
        >>> learned = hs.relevance.reweight(model, probe, steps=2)
        >>> learned.losses[1] < learned.losses[0]
        True
    """
    whole(steps, "steps", 1)
    positive(rate, "rate")
    need_continuing(model)
    labels = _Labels.of(probe)
    held = probe if test is None else test
    if test is not None and not torch.equal(_Labels.of(test).tokens, labels.tokens):
        raise InputError("the test probe has other label words than the training probe.")
    for one in (probe, held):
        capture.check_fits(model, one, answers=True)
    shape = (model.shape.n_layers, model.shape.n_heads, len(labels.tokens))
    beta = torch.zeros(shape, device=model.device, requires_grad=True)
    kept = Checkpoint(None, {})
    if folder is not None:
        facts = {
            "method": "label words", "weights": model.digest(), "probe": probe_digest(probe),
            "rate": rate,
        }  # fmt: skip
        kept = Checkpoint(folder, facts)
    run = AdamRun(kept, {"beta": beta}, rate, steps, every)
    with track(steps, "learning weights of label words", show=progress) as advance:
        advance(run.done)
        for _ in run:
            with torch.enable_grad():
                logits = _weighted(model, probe, labels, beta)
                total = torch.nn.functional.cross_entropy(logits, labels.right.to(logits.device))
                (beta.grad,) = torch.autograd.grad(total, [beta])
            run.take(total)
            advance()
    right = _Labels.of(held).right
    with torch.no_grad():
        after = _weighted(model, held, labels, beta).argmax(1).cpu() == right
        before = _weighted(model, held, labels, torch.zeros_like(beta)).argmax(1).cpu() == right
    return Reweighted(
        beta.detach().cpu().double().numpy(),
        tuple(run.losses.tolist()),
        float(before.float().mean()),
        float(after.float().mean()),
    )


def _weighted(
    model: HeadModel, probe: Probe, labels: _Labels, beta: Float[Tensor, "layer head class"]
) -> Float[Tensor, "batch class"]:
    """Logits of the class labels at ``end``, with reweighted attention to label words."""
    end = probe.host.mark("end")
    marks = torch.stack([probe.host.mark(name) for name in labels.places]).float().to(beta)
    at_end = end.to(beta)

    def write(layer: int) -> Write:
        def weigh(pattern: Tensor, _span: Span) -> Tensor:
            gain = torch.einsum("hc,cbk->bhk", beta[layer].exp() - 1, marks)
            there = at_end[:, None, :, None] * gain[:, :, None, : pattern.shape[-1]]
            return pattern * (1 + there)

        return weigh

    where = torch.nn.functional.one_hot(end.int().argmax(1), probe.length).bool()
    writes = {Tap("pattern", layer): write(layer) for layer in model.shape.attention_layers}
    with torch.set_grad_enabled(beta.requires_grad and torch.is_grad_enabled()):
        picked = capture.logits_where(model, probe, where, writes=writes)
    return picked[:, labels.tokens.to(picked.device)]
