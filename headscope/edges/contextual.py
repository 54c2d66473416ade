"""``hs.edges.contextual``: contextual decomposition of every head's contribution (CD-T)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import Saved
from headscope.base.options import Advance, RunOptions
from headscope.base.result import Glance, Rows, Section, Shown, Tabular, number
from headscope.base.specs import Provenance
from headscope.base.statistics import Design
from headscope.edges.rules import Rules
from headscope.edges.written import EdgeBatch, EdgeMeasurement, heads_write
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores
from headscope.table.edges import HeadAt, PositionCircuit

if TYPE_CHECKING:
    import pandas


_SMALL = 1e-8


@dataclass(frozen=True, eq=False)
class NodeWrite:
    """Output of one node, as the relevant part.

    Attributes:
        tap: where the output is added to the stream: ``embed``, ``attn_out`` or ``mlp_out``.
        change: rest minus whole at that tap.
    """

    tap: Tap
    change: Float[Tensor, "batch pos d_model"]

    @classmethod
    def of(cls, batch: EdgeBatch, number: int, pos: int | None = None) -> "NodeWrite":
        """A node of the wiring, by index, at all positions or at one."""
        change = batch.change[:, number]
        if pos is not None:
            alone = torch.zeros_like(change)
            alone[:, pos] = change[:, pos]
            change = alone
        if number == 0:
            return cls(Tap("embed"), change)
        layer, place = divmod(number - 1, batch.study.wiring.n_heads + 1)
        mlp = place == batch.study.wiring.n_heads
        return cls(Tap("mlp_out" if mlp else "attn_out", layer), change)


class SplitRules(Rules):
    """Propagation rules for whole and rests: shared norm scales, biases split by magnitude.

    Attributes:
        batch: number of examples; copies are stacked, with the whole first.
        copies: number of copies of the batch, including the whole.
        share_biases: split biases between parts in proportion to their magnitudes; if False, the
            rest gets them.
        sign_rule: inside MLPs, the larger part gets the whole if parts have opposite signs.
    """

    def __init__(self, batch: int, copies: int, share_biases: bool, sign_rule: bool) -> None:
        """Start before the first block."""
        super().__init__()
        self.batch, self.copies = batch, copies
        self.share_biases, self.sign_rule = share_biases, sign_rule

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace norms, and linear maps with biases."""
        name, given = getattr(func, "__name__", ""), kwargs or {}
        if name in ("rsqrt", "sqrt") and self._stacked(args[0]):
            return self.of_whole(func(*args, **given))
        if name == "layer_norm":
            return self._layer_norm(*args, **given)
        if name == "rms_norm":
            return self._rms_norm(*args, **given)
        if name == "linear":
            return self._linear(func(*args, **given), *args[2:], **given)
        if name == "addmm":
            return self._linear(func(*args, **given), args[0])
        return func(*args, **given)

    def _stacked(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 1 and not len(value) % self.copies

    def by_copy(self, value: Tensor) -> Float[Tensor, "copy *rest"]:
        """Split the stacked copies.

        Raises:
            UnsupportedModelError: if the model has separated the copies itself.
        """
        if len(value) % (self.copies * self.batch):
            raise UnsupportedModelError(
                "this model routes tokens to experts, so a part of a layer's input is not routed "
                "like the whole; use hs.edges.attribute."
            )
        apart: Tensor = value.unflatten(0, (self.copies, -1))
        return apart

    def of_whole(self, value: Tensor) -> Tensor:
        """Broadcast the whole's value to all copies."""
        copies = self.by_copy(value)
        return copies[:1].expand_as(copies).flatten(0, 1)

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:
        over = tuple(range(-len(normalized_shape), 0))
        centred = x - x.mean(over, keepdim=True)
        scale = self.of_whole((centred.square().mean(over, keepdim=True) + eps).rsqrt())
        made = centred * scale if weight is None else centred * scale * weight
        return made if bias is None else self._with_bias(made, bias, self.by_copy(x))

    def _rms_norm(
        self,
        x: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        over = tuple(range(-len(normalized_shape), 0))
        small = torch.finfo(x.dtype).eps if eps is None else eps
        scale = self.of_whole((x.square().mean(over, keepdim=True) + small).rsqrt())
        return x * scale if weight is None else x * scale * weight

    def _linear(self, made: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        """Output of a linear map with its bias split, and the sign rule inside MLPs."""
        if made.ndim > 1 and (bias is not None or self.in_mlp):
            if bias is not None and self.share_biases:
                without = made - bias
                made = self._with_bias(without, bias, self.by_copy(without))
            if self.sign_rule and self.in_mlp:
                made = self.signed(made)
        return made

    def _with_bias(self, made: Tensor, bias: Tensor, by: Float[Tensor, "copy *rest"]) -> Tensor:
        """Output of a map for whole and rests, with its bias split by the parts' magnitudes."""
        if not self.share_biases:
            return made + bias
        relevant, rest = (by[:1] - by).abs(), by.abs()
        share = 1 - relevant / (relevant + rest + _SMALL)  # 1 for the whole
        return made + (share * bias).flatten(0, 1)

    def signed(self, value: Tensor) -> Tensor:
        """Give the whole to the larger part where the parts have opposite signs."""
        copies = self.by_copy(value)
        whole, rest = copies[:1], copies
        relevant = whole - rest
        opposed = relevant * rest < 0
        taken = torch.where(relevant.abs() >= rest.abs(), torch.zeros_like(rest), whole)
        return torch.where(opposed, taken, rest).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class SplitRun:
    """Values of some taps in the whole run and in the rests.

    Attributes:
        taps: values by tap: the whole first, then the rest for every source, ``[copy batch
            *rest]``.
        logits: logits at the positions that the metric reads; None if not requested.
    """

    taps: Mapping[Tap, Tensor]
    logits: Float[Tensor, "row at d_vocab"] | None

    def whole(self, tap: Tap) -> Tensor:
        """Value of the tap in the whole run."""
        return self.taps[tap][0]

    def relevant(self, tap: Tap) -> Float[Tensor, "source batch *rest"]:
        """Part of the value that comes from each source."""
        return self.taps[tap][:1] - self.taps[tap][1:]


@torch.no_grad()
def run_split(
    batch: EdgeBatch,
    sources: Sequence[NodeWrite],
    reads: Sequence[Tap],
    *,
    share_biases: bool = True,
    sign_rule: bool = False,
    held: bool = True,
    logits: bool = True,
) -> SplitRun:
    """Run a batch as a whole, and as the rest without each source.

    Args:
        batch: batch to run.
        sources: node writes, each with one relevant part.
        reads: taps to store.
        share_biases: see :class:`SplitRules`.
        sign_rule: see :class:`SplitRules`.
        held: freeze attention patterns and norm scales at the whole run; if False, rests are
            separate runs with the source's change patched in.
        logits: also compute logits.
    """
    model, copies, size = batch.study.model, 1 + len(sources), len(batch.texts.tokens)
    rules = SplitRules(size, copies, share_biases, sign_rule)
    kept: dict[Tap, Tensor] = {}

    def keep(view: TapView) -> None:
        if view.tap in reads:
            kept[view.tap] = view.value.unflatten(0, (copies, size)).clone()
        if view.tap.site in ("attn_out", "mlp_out"):
            rules.in_mlp = view.tap.site == "attn_out"

    writes: dict[Tap, Callable[[Tensor, Any], Tensor]] = {
        tap: _moved([source.change if source.tap == tap else None for source in sources], size)
        for tap in {source.tap for source in sources}
    }
    layers = range(batch.study.wiring.n_layers)
    if held:
        writes |= {
            Tap(site, layer): lambda value, _span: rules.of_whole(value)
            for site in ("query", "key")
            for layer in layers
        }
    marks = {Tap(site, layer) for site in ("attn_out", "mlp_out") for layer in layers}
    logits_at = batch.measured.at if logits else torch.empty(0, dtype=torch.long)
    with rules if held else nullcontext():
        out = model.run(
            batch.texts.times(copies),
            reads=dict.fromkeys({*reads, *marks}, keep),
            writes=writes,
            logits_at=logits_at,
        )
    return SplitRun(kept, out if logits else None)


def _moved(
    changes: Sequence[Float[Tensor, "batch pos d_model"] | None], size: int
) -> Callable[[Tensor, Any], Tensor]:
    """Write that adds each source's change to its rest; the whole is unchanged."""

    def move(value: Tensor, _span: Any) -> Tensor:
        moved = value.clone()
        for place, change in enumerate(changes):
            if change is not None:
                moved[size * (place + 1) : size * (place + 2)] += change.to(value)
        return moved

    return move


Item = TypeVar("Item")
_SOURCE = "Hsu et al. 2024, arXiv 2407.00886"


@dataclass(frozen=True, eq=False, repr=False)
class Contextual(Saved, Shown, Tabular):
    """Effect of each head's relevant part on the metric and on every later head.

    Attributes:
        scores: change in the metric when the relevant part is left out, per head.
        passed: share of a later head's output that comes from each head, ``[layer head layer
            head]``: ``mean |relevant| / (mean |relevant| + mean |rest|)``, from 0 to 1; 0 if the
            second head is not above the first.
        by_position: scores of each head at each position; None if not requested.
        provenance: where it came from.
    """

    scores: HeadScores
    passed: Float[np.ndarray, "layer head layer_b head_b"]
    by_position: Float[np.ndarray, "layer head pos"] | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def top(self, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """Heads with the largest magnitudes, largest first."""
        mean = self.scores.mean
        order = np.argsort(-np.abs(np.nan_to_num(mean)), axis=None, kind="stable")[: max(k, 0)]
        places = zip(*np.unravel_index(order, mean.shape), strict=True)
        return [(HeadIndex(int(a), int(b)), float(mean[a, b])) for a, b in places]

    def search(self, keep: int = 2, rounds: int = 3) -> tuple[tuple[HeadIndex, ...], ...]:
        """Search for heads in rounds, backwards from the metric.

        First the ``keep`` heads with the largest scores; then, for each head of the previous round,
        the ``keep`` earlier heads with the largest shares of its output.

        Args:
            keep: number of heads to keep per target.
            rounds: number of rounds; the search ends early if no head is below.

        Raises:
            InputError: if either is below 1.
        """
        if keep < 1 or rounds < 1:
            raise InputError(f"keep={keep!r}, rounds={rounds!r}: give 1 or more of each.")
        found = [tuple(head for head, _ in self.top(keep))]
        seen = set(found[0])
        while len(found) < rounds:
            new = [head for target in found[-1] for head in self._below(target, keep)]
            fresh = tuple(dict.fromkeys(head for head in new if head not in seen))
            if not fresh:
                break
            seen |= set(fresh)
            found.append(fresh)
        return tuple(found)

    def _below(self, target: HeadIndex, keep: int) -> list[HeadIndex]:
        shares = self.passed[:, :, target.layer, target.head]
        order = np.argsort(-shares, axis=None, kind="stable")[:keep]
        places = zip(*np.unravel_index(order, shares.shape), strict=True)
        return [HeadIndex(int(a), int(b)) for a, b in places if shares[a, b] > 0]

    def glance(self) -> Glance:
        """Show the heads with the largest scores, and the heads that feed them."""
        rows = [
            (str(head), number(score), " ".join(map(str, self._below(head, 3))))
            for head, score in self.top(6)
        ]
        return Glance(
            "contextual decomposition",
            [f"{self.scores.unit or 'metric'}", self.provenance.model],
            ("head", "change without it", "earlier heads in it"),
            rows,
            hint="result.search(), result.scores, result.passed",
        )

    def sections(self) -> list[Section]:
        """Report scores by head."""
        rows = [(str(head), score) for head, score in self.top(20)]
        grid = Rows(("head", "change without its relevant part"), rows)
        return [Section("Contextual decomposition", [grid])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head and later head: score of the first, share of the second."""
        import pandas

        heads = [HeadIndex(*place) for place in np.ndindex(*self.scores.mean.shape)]
        rows = [
            (str(a), str(b), self.scores.mean[a], float(self.passed[(*a, *b)]))
            for a in heads
            for b in heads
            if a.layer < b.layer
        ]
        return pandas.DataFrame(rows, columns=["head", "later", "score", "share"])


@checked
@own_types()
def contextual(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    *,
    ablation: str | None = None,
    positions: bool = False,
    sign_rule: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Contextual:
    """Decompose each head's contribution to the output, with everything else held fixed.

    A head's write is split into a relevant part, the difference from its ablated write, and the
    rest. Both are propagated through the model and sum to the whole everywhere: attention patterns
    and norm scales are those of the whole run, biases are split by the magnitudes of the two parts,
    and the relevant part of a nonlinear function is ``f(whole) - f(rest)``. The score is the metric
    of the rest minus that of the whole, which in a linear net with fixed patterns is exactly the
    effect of ablating the head. Unlike patching, it misses what a head does through the queries and
    keys of other heads.

    Heads of a layer run together. The cost is ``layers (heads + 1)`` passes, times the length with
    ``positions``.

    Args:
        model: see :func:`attribute`.
        probe: texts with answers.
        metric: as in :func:`attribute`.
        ablation: what the rest has in place of the head's write; see :func:`attribute`. The paper
            uses ``mean``.
        positions: also decompose each head at each position; all texts must then have equal length.
        sign_rule: in MLPs, give the whole to the larger part if parts have opposite signs, as in
            the reference implementation. This breaks exactness in linear nets.
        batch_size: examples per pass; affects only time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if probe and metric do not fit.
        UnsupportedModelError: see :func:`attribute`; also for mixtures of experts that separate the
            copies.

    Source:
        Hsu et al. 2024, "Efficient automated circuit discovery in transformers using contextual
        decomposition", arXiv 2407.00886.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> found = hs.edges.contextual(model, names, hs.metrics.logit_difference)
        >>> found.scores.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    if positions:
        _check_one_length(probe)
    options = RunOptions(batch_size, progress=progress)
    study = EdgeMeasurement.of(model, probe, metric, ablation, options)
    layers, heads = study.wiring.n_layers, study.wiring.n_heads
    values = np.full((layers, heads, len(probe)), np.nan)
    passed = np.zeros((layers, heads, layers, heads))
    placed = np.zeros((layers, heads, probe.length)) if positions else None
    work = layers * len(probe) * (1 + (probe.length if positions else 0))
    with options.track(float(work), "contextual decomposition") as advance:
        for start in range(0, len(probe), study.size):
            batch = study.batch(start)
            count = len(batch.texts.tokens)
            for layer in range(layers):
                found, shares = _layer(batch, layer, sign_rule)
                values[layer, :, start : start + count] = found
                passed[layer] += shares * count / len(probe)
                advance(float(count))
                if placed is not None:
                    placed[layer] += _by_position(batch, layer, sign_rule, advance) / len(probe)
    about = origin(
        model, probe, attention="patterns held", metric=study.metric.name, method="CD-T",
        ablation=study.ablation, sign_rule=sign_rule,
    )  # fmt: skip
    scores = HeadScores.from_effects(
        "contextual", values, kv_heads=model.shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels), unit=study.metric.unit,
        description="Metric without the head's relevant part, minus that of the whole.",
        source=_SOURCE, provenance=about,
    )  # fmt: skip
    return Contextual(scores, passed, placed, about)


@checked
@own_types()
def contextual_circuit(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    *,
    keep: int = 2,
    rounds: int = 3,
    tolerance: float = 0.01,
    ablation: str | None = None,
    sign_rule: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> PositionCircuit:
    """Search for heads at positions by contextual decomposition, backwards from the metric.

    In the first round, every head at every position is a separate source, and the ``keep`` with the
    largest effects on the metric are taken. In later rounds, the nodes of the previous round are
    targets: for each, the ``keep`` earlier heads at positions with the largest shares of its
    output, ``mean |relevant| / (mean |relevant| + mean |rest|)``, are taken. Finally nodes are
    pruned, starting with the last one found: a node is removed if the model with only the remaining
    nodes loses at most ``tolerance`` of its faithfulness.

    Each round costs a pass per layer, head and position. Patterns are frozen, so effects through
    the queries and keys of other heads are not found; see :func:`contextual`.

    Args:
        model: see :func:`contextual`.
        probe: texts of one template, so that a position means the same in all of them.
        metric: as in :func:`attribute`.
        keep: number of nodes to take per target.
        rounds: number of rounds; the search ends early if no head is below.
        tolerance: loss of faithfulness that pruning a node may cost, 0 or more.
        ablation: what an ablated node writes; see :func:`attribute`. The paper uses ``mean``.
        sign_rule: see :func:`contextual`.
        batch_size: examples per pass; affects only time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if texts differ in length, a number is out of range, or probe and metric do not
            fit.
        UnsupportedModelError: see :func:`contextual`.

    Source:
        Hsu et al. 2024, "Efficient automated circuit discovery in transformers using contextual
        decomposition", arXiv 2407.00886.

    Example:
        >>> few = hs.probes.pairs(model, "ioi", batch=2)
        >>> found = hs.edges.contextual_circuit(
        ...     model, few, hs.metrics.logit_difference, keep=1, rounds=2
        ... )
        >>> len(found.nodes), str(found.nodes[0]).startswith("L")
        (2, True)
    """
    _check_search(keep, rounds, tolerance)
    _check_one_length(probe)
    options = RunOptions(batch_size, progress=progress)
    study = EdgeMeasurement.of(model, probe, metric, ablation, options)
    wiring = study.wiring
    batches = list(study.batches())
    work = float(rounds * wiring.n_layers * wiring.n_heads * probe.length)
    found: list[tuple[HeadAt, int, int, float]] = []  # node, round, row of its target, share
    with options.track(work, "contextual circuit") as advance:
        for number in range(1, rounds + 1):
            targets = [
                (row, node) for row, (node, when, _, _) in enumerate(found) if when == number - 1
            ]
            if number > 1 and not targets:
                break
            parts = _by_node(batches, [node for _, node in targets], sign_rule, advance)
            seen = {node for node, *_ in found}
            for row, part in zip([row for row, _ in targets] or [-1], parts, strict=True):
                for node, share in _largest_nodes(part, keep):
                    if node not in seen:
                        seen.add(node)
                        found.append((node, number, row, share))
    nodes = [node for node, *_ in found]
    kept, values = _pruned(batches, nodes, tolerance)
    value, unpruned, full, empty = values
    speaker, first = model.tokenizer, probe.tokens[0].tolist()
    tokens = () if speaker is None else tuple(str(speaker.decode([one])) for one in first)
    return PositionCircuit(
        np.array(nodes, int).reshape(-1, 3),
        np.array([when for _, when, _, _ in found], int),
        np.array([row for _, _, row, _ in found], int),
        np.array([share for *_, share in found], float),
        kept, value, unpruned, full, empty, tokens, study.metric.unit,
        origin(
            model, probe, attention="patterns held", metric=study.metric.name, method="CD-T search",
            ablation=study.ablation, sign_rule=sign_rule, keep=keep, rounds=rounds,
            tolerance=tolerance,
        ),
    )  # fmt: skip


def _check_search(keep: int, rounds: int, tolerance: float) -> None:
    if keep < 1 or rounds < 1:
        raise InputError(f"keep={keep!r}, rounds={rounds!r}: give 1 or more of each.")
    if not tolerance >= 0:
        raise InputError(f"tolerance={tolerance!r}: give a loss of faithfulness, 0 or more.")


def _check_one_length(probe: Probe) -> None:
    if not bool(probe.real.all()):
        raise InputError(
            "heads at positions need texts of equal length, so that positions correspond; this "
            "probe has padding: give texts of one template."
        )


Shares = Float[np.ndarray, "layer head pos"]
_ROUNDED = 1e-6


def _by_node(
    batches: Sequence[EdgeBatch],
    targets: Sequence[HeadAt],
    sign_rule: bool,
    advance: Advance,
) -> list[Shares]:
    """Contribution of each head at each position to the metric, or to every target."""
    study = batches[0].study
    wiring, length = study.wiring, batches[0].texts.tokens.shape[1]
    found = np.zeros((max(1, len(targets)), wiring.n_layers, wiring.n_heads, length))
    highest = max((node.layer for node in targets), default=wiring.n_layers)
    for batch in batches:
        weight = len(batch.texts.tokens) / len(study.probe)
        for layer in range(highest):
            numbers = range(*wiring.heads_of(layer).indices(len(wiring.sources)))
            places = [(number, pos) for number in numbers for pos in range(length)]
            parts = []
            for some in _chunks(places, batch.room):
                sources = [NodeWrite.of(batch, number, pos) for number, pos in some]
                parts.append(_given(batch, sources, layer, targets, sign_rule))
                advance(weight * len(some))
            found[:, layer] += weight * np.concatenate(parts, 1).reshape(-1, wiring.n_heads, length)
    return list(found)


def _given(
    batch: EdgeBatch,
    sources: Sequence[NodeWrite],
    layer: int,
    targets: Sequence[HeadAt],
    sign_rule: bool,
) -> Float[np.ndarray, "target source"]:
    """Contribution of some sources to the metric, or to the output of every target above them."""
    if not targets:
        run = run_split(batch, sources, [], sign_rule=sign_rule)
        return np.asarray(np.nanmean(_change(batch, run), 1)[None])
    taps = sorted({node.layer for node in targets if node.layer > layer})
    reads = [Tap("z", one) for one in taps]
    run = run_split(batch, sources, reads, sign_rule=sign_rule, logits=False)
    found = np.zeros((len(targets), len(sources)))
    for row, node in enumerate(targets):
        if node.layer > layer:
            tap = Tap("z", node.layer)
            parts = (run.relevant(tap), run.taps[tap][1:])
            sizes = [one[:, :, node.pos, node.head].abs().double().mean((1, 2)) for one in parts]
            found[row] = (sizes[0] / (sizes[0] + sizes[1]).clamp_min(1e-12)).cpu().numpy()
    return found


def _largest_nodes(values: Shares, keep: int) -> list[tuple[HeadAt, float]]:
    """Nodes with the largest magnitudes, except those that are 0 up to rounding."""
    order = np.argsort(-np.abs(values), axis=None, kind="stable")[:keep]
    places = zip(*(axis.tolist() for axis in np.unravel_index(order, values.shape)), strict=True)
    least = _ROUNDED * float(np.abs(values).max())
    return [(HeadAt(*at), float(values[at])) for at in places if abs(values[at]) > least]


def _pruned(
    batches: Sequence[EdgeBatch], nodes: Sequence[HeadAt], tolerance: float
) -> tuple[Bool[np.ndarray, " node"], tuple[float, float, float, float]]:
    """Nodes that are needed; the metric with these, with all, of the full model, with none."""
    wiring = batches[0].study.wiring
    size = (wiring.n_layers, wiring.n_heads, batches[0].texts.tokens.shape[1])

    def mean(kept: Bool[Tensor, "layer head pos"]) -> float:
        counted = [
            heads_value(batch, kept)[batch.measured.counted.to(batch.change.device)]
            for batch in batches
        ]
        return float(torch.cat(counted).double().mean())

    full, empty = mean(torch.ones(size, dtype=torch.bool)), mean(torch.zeros(size).bool())
    inside = torch.zeros(size, dtype=torch.bool)
    for node in nodes:
        inside[node] = True
    value = unpruned = mean(inside)
    kept = np.ones(len(nodes), bool)
    for row in reversed(range(len(nodes))):
        inside[nodes[row]] = False
        tried = mean(inside)
        if (value - tried) * np.sign(full - empty) <= tolerance * abs(full - empty):
            value, kept[row] = tried, False
        else:
            inside[nodes[row]] = True
    return kept, (value, unpruned, full, empty)


@torch.no_grad()
def heads_value(batch: EdgeBatch, kept: Bool[Tensor, "layer head pos"]) -> Float[Tensor, " batch"]:
    """Metric with all other heads ablated.

    Args:
        batch: the batch.
        kept: mask of the heads at positions that keep their output in this run.
    """
    study = batch.study
    z: dict[Tap, Tensor] = {}

    def keep(view: TapView) -> None:
        z[view.tap] = view.value

    def closer(layer: int) -> Callable[[Tensor, Any], Tensor]:
        at = study.wiring.heads_of(layer)
        out = (~kept[layer]).to(batch.change)

        def close(value: Tensor, _span: Any) -> Tensor:
            corrupt = batch.change[:, at] + batch.clean.sources[:, at]
            moved = corrupt - heads_write(study.model, layer, z[Tap("z", layer)])
            return value + torch.einsum("hp,bhpm->bpm", out, moved).to(value)

        return close

    layers = range(study.wiring.n_layers)
    logits = study.model.run(
        batch.texts,
        reads={Tap("z", layer): keep for layer in layers},
        writes={Tap("attn_out", layer): closer(layer) for layer in layers},
        logits_at=batch.measured.at,
    )
    assert logits is not None  # noqa: S101  # they were asked for
    return batch.measured(logits)[0]


def _layer(
    batch: EdgeBatch, layer: int, sign_rule: bool
) -> tuple[Float[np.ndarray, "head batch"], Float[np.ndarray, "head layer head_b"]]:
    """Scores of a layer's heads, and their shares in the outputs of later heads."""
    wiring = batch.study.wiring
    taps = [Tap("z", later) for later in range(layer + 1, wiring.n_layers)]
    numbers = range(*wiring.heads_of(layer).indices(len(wiring.sources)))
    values, shares = [], []
    for some in _chunks(numbers, batch.room):
        sources = [NodeWrite.of(batch, number) for number in some]
        run = run_split(batch, sources, taps, sign_rule=sign_rule)
        values.append(_change(batch, run))
        shares.append(_shares(batch, run, layer, len(sources)))
    return np.concatenate(values), np.concatenate(shares)


def _change(batch: EdgeBatch, run: SplitRun) -> Float[np.ndarray, "source batch"]:
    """Metric of each rest minus that of the whole; NaN for examples that it does not read."""
    assert run.logits is not None  # noqa: S101  # they were asked for
    values = batch.measured(run.logits)
    unread = ~batch.measured.counted.to(values.device)
    change = (values[1:] - values[:1]).masked_fill(unread, float("nan"))
    found: np.ndarray = change.cpu().double().numpy()
    return found


def _shares(
    batch: EdgeBatch, run: SplitRun, layer: int, sources: int
) -> Float[np.ndarray, "source layer head"]:
    """Share of the relevant part in every later head's output, over real positions."""
    wiring = batch.study.wiring
    found = np.zeros((sources, wiring.n_layers, wiring.n_heads))
    real = batch.texts.real
    for later in range(layer + 1, wiring.n_layers):
        tap = Tap("z", later)
        mask = real.to(run.taps[tap].device)
        relevant = run.relevant(tap)[:, mask].abs().float().mean((1, 3))
        rest = run.taps[tap][1:][:, mask].abs().float().mean((1, 3))
        found[:, later] = (relevant / (relevant + rest).clamp_min(1e-12)).cpu().double().numpy()
    return found


def _by_position(
    batch: EdgeBatch, layer: int, sign_rule: bool, advance: Advance
) -> Float[np.ndarray, "head pos"]:
    """Sum over examples of the scores of a layer's heads at every position."""
    wiring, length = batch.study.wiring, batch.texts.tokens.shape[1]
    numbers = range(*wiring.heads_of(layer).indices(len(wiring.sources)))
    places = [(number, pos) for number in numbers for pos in range(length)]
    found = []
    for some in _chunks(places, batch.room):
        sources = [NodeWrite.of(batch, number, pos) for number, pos in some]
        run = run_split(batch, sources, [], sign_rule=sign_rule)
        found.append(np.nansum(_change(batch, run), 1))
        advance(len(batch.texts.tokens) * len(some) / len(numbers))
    return np.concatenate(found).reshape(len(numbers), length)


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
