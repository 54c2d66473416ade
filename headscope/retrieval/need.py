"""Need for far tokens: how often, which tokens, and which rotary frequencies carry it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.result import Listed
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.capture import stream
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import ModelShape
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Read, Reads, Tap, TapView, at_layers
from headscope.origin import origin
from headscope.probes import text as text_probe
from headscope.probes.probe import Probe
from headscope.scorers import long_need, long_need_predicted
from headscope.scorers.long_need import QueryStatistics, far_keys, plane_shares
from headscope.scoring import score
from headscope.table import HeadScores, HeadTable
from headscope.views import Rotation


@checked
def need(
    model: HeadModel,
    probe: Probe,
    *,
    sink: int = 16,
    recent: int = 128,
    threshold: int | float = 0.6,
    moments: QueryStatistics = "bulk",
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadTable:
    """Need for far tokens: exact and predicted, with the prediction's precision and recall.

    QAdA, Donhauser et al. 2025 (arXiv 2502.09647). Per head and example over the queries of the
    question and the answer: ``precision`` is the share of queries predicted as long-range that are,
    ``recall`` the share of long-range queries that are predicted; NaN if there are none.

    Args:
        model: a model whose queries and keys can be read.
        probe: needle probe, with more than ``sink + recent`` tokens before the question.
        sink: number of first tokens that count as local.
        recent: number of last tokens that do.
        threshold: share of the attention that local tokens must get.
        moments: use the scores of far keys (``bulk``) or of the last ones (``local``).
        batch_size: examples per pass.
        progress: show a progress bar.

    Returns:
        The scores ``long_need``, ``long_need_predicted``, ``long_need_precision`` and
        ``long_need_recall``.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> list(need(model, probe, sink=2, recent=8))[:2]
        ['long_need', 'long_need_predicted']
    """
    exact = long_need(sink, recent, threshold, name="long_need")
    guess = long_need_predicted(sink, recent, threshold, moments, name="long_need_predicted")
    both = long_need_predicted(sink, recent, threshold, moments, both=True, name="both")
    table = score(model, probe, [exact, guess, both], batch_size=batch_size, progress=progress)

    def share(name: str, of: HeadScores, meaning: str) -> HeadScores:
        whole = of.per_example
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(whole > 0, table["both"].per_example / whole, np.nan)
        return HeadScores.from_examples(
            name,
            values,
            kv_heads=of.kv_heads,
            design=of.design,
            unit="share",
            bounds=(0.0, 1.0),
            description=meaning,
            source=guess.source,
            provenance=of.provenance,
        )

    return HeadTable(
        [
            table["long_need"],
            table["long_need_predicted"],
            share(
                "long_need_precision",
                table["long_need_predicted"],
                "Share of the queries predicted to need far tokens that do.",
            ),
            share(
                "long_need_recall",
                table["long_need"],
                "Share of the queries that need far tokens that are predicted to.",
            ),
        ]
    )


# Callback with the index of a text, a layer, the earlier stream, and the layer's values.
See = Callable[[int, int, Tensor, list[Tensor]], None]
_TOKENS_PER_PASS = 4096
_LEAST_TEXTS = 4
_RIDGE = 1e-6  # ridge added to the diagonal, as a share of the mean variance


@checked
@own_types()
def token_importance(
    model: HeadModel,
    texts: str | Path | Sequence[str] | Probe | None = None,
    *,
    keep: int = 8,
    layer: int = 0,
    length: int | None = 128,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadTable:
    """Predict every head's most important keys from an earlier layer, and score the prediction.

    A query is predicted linearly from the residual stream that enters ``layer`` (least squares on
    every second text, before rotation); its products with the model's own keys rank these. On the
    other texts, ``importance_found`` is the attention on the ``keep`` top-ranked keys over that on
    the ``keep`` keys with most attention, averaged over the queries that see more than ``keep``: 1
    if everything needed is found. ``importance_recent`` is the same for the ``keep`` latest keys,
    which need no prediction. A head with high ``importance_found`` and low ``importance_recent`` is
    one whose cache can be thinned before its layer runs.

    Heads of layers up to ``layer`` are predicted from their own or from later inputs, and say
    nothing.

    Args:
        model: a model whose attention scores are products of queries and keys.
        texts: texts or a path, as for :func:`headscope.probes.text`, or a probe; None: the bundled
            passages.
        keep: number of keys to choose.
        layer: layer whose input predicts the queries.
        length: cut texts into pieces of this many tokens; None: whole texts. Probes are not cut.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Two scores for the layers from ``layer`` on; NaN before.

    Raises:
        InputError: if there are fewer than four texts, or none is longer than ``keep``.
        UnsupportedModelError: if queries are changed by more than a norm and a rotation.

    Source:
        Akhauri et al. 2025, "TokenButler: Token Importance is Predictable" (arXiv 2503.07518),
        who train a network; a linear forecast is a lower bound on theirs.

    Example:
        >>> table = hs.retrieval.token_importance(model, length=32)
        >>> list(table)
        ['importance_found', 'importance_recent']
    """
    options = RunOptions(batch_size, progress=progress)
    probe = texts if isinstance(texts, Probe) else text_probe(model, texts, length)
    shape = model.shape
    if not 0 <= layer < shape.n_layers or keep < 1:
        raise InputError(
            f"layer={layer}, keep={keep}: give a layer of {model.name}, 0 to {shape.n_layers - 1}, "
            "and a number of keys from 1 on."
        )
    if len(probe) < _LEAST_TEXTS or int(probe.real[1::2].sum(1).max()) <= keep + 1:
        raise InputError(
            f"{len(probe)} texts of up to {int(probe.real.sum(1).max())} tokens: predicting the "
            f"{keep} most important keys needs {_LEAST_TEXTS} texts longer than {keep + 1} "
            "tokens."
        )
    if "query_keys" in model.limits:
        raise UnsupportedModelError(model.limits["query_keys"])
    layers = [one for one in shape.attention_layers if one >= layer]
    measurement = _Study(model, layer, layers, keep, options)
    with options.track(float(len(probe)), "predicting importance") as advance:
        measurement.fit(probe.examples(slice(0, None, 2)))
        advance(len(probe) / 2)
        measured = probe.examples(slice(1, None, 2))
        found = measurement.measure(measured)
        advance(len(probe) / 2)
    specs = (
        ("importance_found", "What the head will need can be predicted from an earlier layer."),
        ("importance_recent", "What the head needs are the latest tokens."),
    )
    return HeadTable([
        HeadScores.from_examples(
            ScoreSpec(
                name, unit="share of attention", bounds=(0.0, 1.0), description=description,
                source="Akhauri et al. 2025, arXiv 2503.07518; linear forecast",
            ),
            values, kv_heads=shape.n_kv_heads, design=Design(clusters=measured.cluster_labels),
            provenance=origin(model, measured, keep=keep, layer=layer),
        )
        for (name, description), values in zip(specs, found, strict=True)
    ])  # fmt: skip


def turned(
    x: Float[Tensor, "*any pos d_head"], rotation: Rotation, sign: float
) -> Float[Tensor, "*any pos d_head"]:
    """Rotate vectors at positions 0, 1, ... by their rotary angles, or back.

    Args:
        x: vectors in order of their positions.
        rotation: rotation of the layer.
        sign: 1 rotates as attention does, -1 undoes it.
    """
    if not rotation.first:
        return x
    first, second = list(rotation.first), list(rotation.second)
    at = torch.arange(x.shape[-2], device=x.device, dtype=torch.float64)
    angle = at[:, None] * rotation.frequency.to(at) * sign
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    made = x.clone()
    made[..., first] = x[..., first] * cos - x[..., second] * sin
    made[..., second] = x[..., first] * sin + x[..., second] * cos
    return made


@dataclass(eq=False)
class _Study:
    """Moments of the earlier stream with queries, and the resulting prediction."""

    model: HeadModel
    source: int
    layers: Sequence[int]
    keep: int
    options: RunOptions
    maps: dict[int, Float[Tensor, "head row d_head"]] = field(default_factory=dict)
    rotations: dict[int, Rotation] = field(init=False)

    def __post_init__(self) -> None:
        """Measure the rotations before any pass, since that runs the model itself."""
        self.rotations = {layer: self.model.parts.rotation(layer) for layer in self.layers}

    def run(self, probe: Probe, sites: Sequence[str], see: See) -> None:
        """Pass on the stream and each layer's values, text by text without padding."""
        size = self.options.per_pass(probe.length, _TOKENS_PER_PASS)
        taps = [Tap(site, layer) for layer in self.layers for site in sites]
        for start in range(0, len(probe), size):
            part = probe.examples(slice(start, start + size))
            stream: dict[str, Tensor] = {}
            held: dict[Tap, Tensor] = {}

            def keep(view: TapView, stream: dict[str, Tensor] = stream) -> None:
                stream["x"] = view.value.double()

            def read(
                view: TapView,
                part: Probe = part,
                start: int = start,
                stream: dict[str, Tensor] = stream,
                held: dict[Tap, Tensor] = held,
            ) -> None:
                held[view.tap] = view.value
                if view.tap.site != sites[-1]:
                    return
                values = [held.pop(Tap(site, view.layer)) for site in sites]
                for number, real in enumerate(part.real):
                    at = real.nonzero().squeeze(1).to(view.value.device)
                    own = [value[number][:, at] for value in values]
                    if sites[-1] == "pattern":
                        own[-1] = own[-1][..., at]
                    see(start + number, view.layer, stream["x"][number, at], own)

            reads: dict[Tap, Read] = {Tap("resid_pre", self.source): keep}
            reads |= dict.fromkeys(taps, read)
            self.model.run(part, reads=reads, until=taps[-1])

    def fit(self, probe: Probe) -> None:
        """Regress unrotated queries on the stream and a constant."""
        squares: dict[int, Tensor] = {}
        products: dict[int, Tensor] = {}

        def add(_number: int, layer: int, x: Tensor, values: list[Tensor]) -> None:
            query = turned(values[0].double(), self.rotations[layer], -1.0)
            rows = _with_one(x)
            square, product = rows.mT @ rows, rows.mT @ query
            squares[layer] = squares[layer] + square if layer in squares else square
            products[layer] = products[layer] + product if layer in products else product

        self.run(probe, ("query",), add)
        for layer in self.layers:
            square = squares[layer]
            ridge = _RIDGE * square.diagonal().mean() * torch.eye(len(square)).to(square)
            self.maps[layer] = torch.linalg.solve(square + ridge, products[layer])

    def measure(self, probe: Probe) -> Float[np.ndarray, "score layer head text"]:
        """Attention covered by the prediction, and by the latest keys, over the maximum."""
        shape = self.model.shape
        found = np.full((2, shape.n_layers, shape.n_heads, len(probe)), np.nan)

        def see(number: int, layer: int, x: Tensor, values: list[Tensor]) -> None:
            key, pattern = values
            guess = turned(_with_one(x) @ self.maps[layer], self.rotations[layer], 1.0)
            group = shape.n_heads // len(key)
            scores = guess @ key.double().repeat_interleave(group, 0).mT
            found[:, layer, :, number] = self._shares(scores, pattern.double()).cpu().numpy()

        self.run(probe, ("key", "pattern"), see)
        return found

    def _shares(
        self, scores: Float[Tensor, "head query key"], pattern: Float[Tensor, "head query key"]
    ) -> Float[Tensor, "score head"]:
        """Mean over queries that see more keys than are kept."""
        n = pattern.shape[-1]
        at = torch.arange(n, device=pattern.device)
        seen = at[:, None] >= at
        seen = seen & (pattern.sum(0) > 0) if bool((pattern.sum(0) == 0)[seen].any()) else seen
        late = at.expand(n, n).double()[None]
        best = self._mass(pattern, pattern, seen)
        asked = (seen.sum(-1) > self.keep) & (best > 0)
        rows = []
        for rank in (scores, late.expand_as(scores)):
            share = (self._mass(pattern, rank, seen) / best).masked_fill(~asked, 0.0)
            rows.append(share.sum(-1) / asked.sum(-1).where(asked.any(-1), torch.nan))
        return torch.stack(rows)

    def _mass(self, pattern: Tensor, rank: Tensor, seen: Tensor) -> Float[Tensor, "head query"]:
        """Attention on the top-ranked visible keys."""
        ranked = rank.masked_fill(~seen, float("-inf"))
        chosen = ranked.topk(min(self.keep, rank.shape[-1]), -1).indices
        total: Tensor = (pattern * seen).gather(-1, chosen).sum(-1)
        return total


def _with_one(x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos row"]:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


@dataclass(frozen=True, eq=False, repr=False)
class RotaryContributions(Listed):
    """Share of each rotary plane in the size of far attention scores; a head's shares sum to 1.

    Attributes:
        share: mean over the queries that predict an answer and see a farther half, and over
            examples; NaN in layers without attention or without rotary positions, and for missing
            heads.
        frequency: radians by which one position rotates each plane, by layer; planes run from the
            fastest to the slowest.
    """

    share: Float[np.ndarray, "layer head plane"]
    frequency: Float[np.ndarray, "layer plane"]

    @property
    def wavelength(self) -> Float[np.ndarray, "layer plane"]:
        """Wavelength of each plane in tokens."""
        with np.errstate(divide="ignore"):
            return 2 * np.pi / self.frequency


@checked
@own_types()
def rotary_contributions(
    model: HeadModel, probe: Probe, *, batch_size: int | None = None
) -> RotaryContributions:
    """Share of each rotary frequency in every head's scores with the farther half of the text.

    Hong et al. 2024 (arXiv 2410.08703); definitions at the scorer ``rotary_slowness``.

    Args:
        model: with rotary positions, and readable queries and keys.
        probe: needle probe.
        batch_size: examples per pass.

    Raises:
        UnsupportedModelError: if the model has no rotary positions, or hides its queries and keys.

    Example:
        >>> model = hs.load("tiny-llama")
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> found = rotary_contributions(model, probe)
        >>> np.allclose(found.share.sum(-1), 1)
        True
    """
    for limit in ("query_keys", "rotary"):
        if limit in model.limits:
            raise UnsupportedModelError(model.limits[limit])
    rotations = {layer: model.parts.rotation(layer) for layer in model.shape.attention_layers}
    probe.mark("answering")  # so that a missing mark is reported before any forward pass
    total: dict[int, Tensor] = {}
    count: dict[int, Tensor] = {}
    for _, seen in stream(
        model, probe, lambda batch, _halvings: _Seen(batch, rotations), batch_size=batch_size
    ):
        for layer, values in seen.total.items():
            total[layer] = total.get(layer, torch.zeros_like(values)) + values
            count[layer] = count.get(layer, torch.zeros_like(seen.count[layer])) + seen.count[layer]
    rotations = {layer: rotation for layer, rotation in rotations.items() if rotation.first}
    planes = {len(rotation.first) for rotation in rotations.values()}
    if len(planes) != 1:
        raise UnsupportedModelError(f"{model.name} has layers with different rotary planes.")
    shape = model.shape
    share = np.full((shape.n_layers, shape.n_heads, planes.pop()), np.nan)
    frequency = np.full((shape.n_layers, share.shape[-1]), np.nan)
    for layer, rotation in rotations.items():
        speed = rotation.frequency.abs().cpu()
        order = speed.argsort(descending=True)
        seen_by = count[layer].where(count[layer] > 0, torch.nan)
        share[layer] = (total[layer] / seen_by[:, None])[:, order].numpy()
        frequency[layer] = speed[order].numpy()
    return RotaryContributions(share, frequency)


@dataclass
class _Seen:
    """Reader that sums the shares over the queries of a batch."""

    batch: Probe
    rotations: dict[int, Rotation]
    total: dict[int, Float[Tensor, "head plane"]] = field(default_factory=dict)
    count: dict[int, Float[Tensor, " head"]] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: every attention layer."""
        return at_layers(shape, self._on_layer)

    def _on_layer(self, view: TapView) -> None:
        """Add one layer's queries."""
        wanted = self.batch.mark("answering")
        positions = wanted.any(0).nonzero().flatten()
        seen = replace(view.query_keys(positions), rotation=self.rotations[view.layer])
        shares = plane_shares(seen, far_keys(seen)).cpu().double()
        chosen = wanted[:, None, positions, None].to(shares.dtype)
        self.total[view.layer] = (shares.nan_to_num(0) * chosen).sum((0, 2))
        known = ~shares.isnan().any(-1) & (chosen[..., 0] > 0)
        self.count[view.layer] = known.sum((0, 2)).cpu().double()
