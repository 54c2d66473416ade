"""Which tokens a head will need, foretold from an earlier layer: how much of the need is found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.options import RunOptions
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Read, Tap, TapView
from headscope.origin import origin
from headscope.probes import text as text_probe
from headscope.probes.probe import Probe
from headscope.table import HeadScores, HeadTable
from headscope.views import Rotation

# Takes the number of a text, a layer, the earlier stream, and the layer's values.
See = Callable[[int, int, Tensor, list[Tensor]], None]
_TOKENS_PER_PASS = 4096
_LEAST_TEXTS = 4
_RIDGE = 1e-6  # share of the mean variance that is added to the diagonal


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
    """Foretell every head's most important keys from an earlier layer, and compare with the need.

    A query is foretold linearly from the residual stream that enters ``layer`` (least squares on
    every second text, before rotation); its products with the model's own keys rank these. On the
    other texts, ``importance_found`` is the attention on the ``keep`` keys that rank first over
    that on the ``keep`` keys with most attention, averaged over the queries that see more than
    ``keep``: 1 where all that is needed is found. ``importance_recent`` is the same for the
    ``keep`` latest keys, which need no forecast. A head with much found and little recent is one
    whose cache can be thinned before its layer runs.

    Heads of layers up to ``layer`` are foretold from what they read themselves, or from what
    comes later, and say nothing.

    Args:
        model: with scores that are products of queries and keys.
        texts: as :func:`headscope.probes.text` takes them, or a probe; None: the bundled passages.
        keep: keys that are chosen.
        layer: whose input queries are foretold from.
        length: cut texts into pieces of this many tokens; None: whole texts. Of a probe nothing
            is cut.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Two scores, of the layers from ``layer`` on; NaN before.

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
            f"{len(probe)} texts of up to {int(probe.real.sum(1).max())} tokens: foretelling the "
            f"{keep} most important takes {_LEAST_TEXTS} texts longer than {keep + 1} tokens."
        )
    if "query_keys" in model.limits:
        raise UnsupportedModelError(model.limits["query_keys"])
    layers = [one for one in shape.attention_layers if one >= layer]
    measurement = _Study(model, layer, layers, keep, options)
    with options.track(float(len(probe)), "foretelling importance") as advance:
        measurement.fit(probe.examples(slice(0, None, 2)))
        advance(len(probe) / 2)
        measured = probe.examples(slice(1, None, 2))
        found = measurement.measure(measured)
        advance(len(probe) / 2)
    specs = (
        ("importance_found", "What the head will need is foretold from an earlier layer."),
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
    """Vectors at positions 0, 1, ... turned by their rotary angles, or back.

    Args:
        x: vectors in order of their positions.
        rotation: of the layer.
        sign: 1 turns content as attention does, -1 undoes it.
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
    """Moments of the earlier stream with queries, and the forecast that follows from them."""

    model: HeadModel
    source: int
    layers: Sequence[int]
    keep: int
    options: RunOptions
    maps: dict[int, Float[Tensor, "head row d_head"]] = field(default_factory=dict)
    rotations: dict[int, Rotation] = field(init=False)

    def __post_init__(self) -> None:
        """Measure the rotations before any pass: that runs the model itself."""
        self.rotations = {layer: self.model.parts.rotation(layer) for layer in self.layers}

    def run(self, probe: Probe, sites: Sequence[str], see: See) -> None:
        """Hand the stream and each layer's values over, text by text without padding."""
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
        """Regress queries, turned back, on the stream and a constant."""
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
        """Attention found by the forecast, and by the latest keys, over the most there is."""
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
        """Attention on the visible keys that rank first."""
        ranked = rank.masked_fill(~seen, float("-inf"))
        chosen = ranked.topk(min(self.keep, rank.shape[-1]), -1).indices
        total: Tensor = (pattern * seen).gather(-1, chosen).sum(-1)
        return total


def _with_one(x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos row"]:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)
