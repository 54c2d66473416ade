"""Attention and information flow: patterns, image maps, token flow, contributions, routes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from headscope.base.files import Saved, Stored, read_only, whole_file
from headscope.base.result import (
    Drawn,
    Glance,
    Rows,
    Section,
    Shown,
    Tabular,
    Words,
    number,
    readable,
    sizes,
)
from headscope.base.specs import Provenance
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.table.lens import Tolerance, check_sum
from headscope.table.scores import HeadScores

if TYPE_CHECKING:
    import pandas

_KEY = "headscope"
_MAX_BYTES = 200_000_000  # bound the allocation that an untrusted file can request


@dataclass(frozen=True, eq=False, repr=False)
class AttentionExample(Stored, Shown):
    """Attention probabilities of some heads on one text, quantised in steps of 1/255.

    Attributes:
        heads: heads, in the order of the patterns.
        tokens: text of every position.
        pattern: ``round(255 * probability)``; a row may sum to less than 255, by rounding or where
            a sink takes a share.
        words: description of the text.
        provenance: where it came from.
    """

    heads: tuple[HeadIndex, ...]
    tokens: tuple[str, ...]
    pattern: UInt8[np.ndarray, "which query key"]
    words: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shape."""
        shape = (len(self.heads), len(self.tokens), len(self.tokens))
        if self.pattern.shape != shape:
            raise InputError(
                f"attention of {shape[0]} heads on {shape[1]} tokens has shape {shape}, not "
                f"{self.pattern.shape}."
            )

    @classmethod
    def of(
        cls,
        heads: Sequence[HeadIndex],
        tokens: Sequence[str],
        pattern: Float[np.ndarray, "which query key"],
        words: str = "",
        provenance: Provenance | None = None,
    ) -> "AttentionExample":
        """Quantise probabilities; NaN becomes 0."""
        coarse = np.rint(np.nan_to_num(pattern) * 255).clip(0, 255).astype(np.uint8)
        return cls(tuple(heads), tuple(tokens), coarse, words, provenance or Provenance())

    def glance(self) -> Glance:
        """Show the number of heads, and on which text."""
        return Glance(
            "attention",
            [
                sizes(("head", "token"), self.pattern.shape[:2]),
                readable(self.words or "".join(self.tokens), 60),
                self.provenance.model,
            ],
            hint="hs.attention_view(model, text)",
        )

    def save(self, path: "str | PathLike[str]") -> None:
        """Save as one safetensors file, atomically."""
        from safetensors.numpy import save

        facts = {
            "heads": [str(head) for head in self.heads],
            "tokens": self.tokens,
            "words": self.words,
            "provenance": self.provenance.to_json(),
        }
        made = save({"pattern": self.pattern}, metadata={_KEY: json.dumps(facts)})
        with whole_file(Path(path)) as file:
            file.write(made)

    @staticmethod
    def load(path: "str | PathLike[str]") -> "AttentionExample":
        """Load a file written by :meth:`save`.

        Raises:
            InputError: if the file is not one.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path)
        try:
            if file.stat().st_size > _MAX_BYTES:
                raise InputError(f"{str(file)!r} is larger than any example of attention.")
            with safe_open(file, framework="numpy") as opened:
                facts = json.loads((opened.metadata() or {})[_KEY])
                pattern = opened.get_tensor("pattern")
            return AttentionExample(
                tuple(HeadIndex.parse(str(head)) for head in facts["heads"]),
                tuple(map(str, facts["tokens"])),
                pattern,
                str(facts["words"]),
                Provenance.from_json(facts["provenance"]),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{str(file)!r} is not an example of attention: {error!r}.") from None


# Kinds of edges of a route graph, in the order of their codes.
EDGE_KINDS = ("attention", "residual", "past_mlp", "mlp", "reads", "bias")


_TOP_MAPS = 10  # heads named in a summary of maps
_MATRICES = {
    "rollout": "Attention multiplied over layers, half of every step the residual stream.",
    "alti": "The same on the vectors that attention moves, by how close they bring their sum.",
    "max_flow": "Largest flow from each position down to each input token.",
}


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMaps(Saved, Shown, Tabular):
    """Attention from some positions of images to every patch, per layer and head.

    Attributes:
        weights: mean over the query positions; attention to other positions (a class token,
            registers, words of a text) is left out, so a map may sum to less than 1.
        layers: number of each layer.
        query: description of the query positions.
        stack: name of the attention stack.
        provenance: where it came from.
    """

    weights: Float[np.ndarray, "image layer head row column"]
    layers: tuple[int, ...]
    query: str
    stack: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shape.

        Raises:
            InputError: if the number of maps differs from the number of layers.
        """
        if self.weights.ndim != 5 or self.weights.shape[1] != len(self.layers):
            raise InputError(
                f"maps of {len(self.layers)} layers have shape {self.weights.shape}, not [image "
                "layer head row column]."
            )
        object.__setattr__(self, "layers", tuple(int(one) for one in self.layers))

    def of(self, image: int, head: str | tuple[int, int]) -> Float[np.ndarray, "row column"]:
        """Map of one image and head.

        Args:
            image: index of the image.
            head: such as ``V1H2`` or ``(1, 2)``.

        Raises:
            InputError: if there is no such image or head.
        """
        at, where = self._place(head)
        if not 0 <= image < len(self.weights):
            raise InputError(f"there are images 0 to {len(self.weights) - 1}, not {image}.")
        found: Float[np.ndarray, "row column"] = self.weights[image, at, where]
        return found

    def _place(self, head: str | tuple[int, int]) -> tuple[int, int]:
        chosen = HeadIndex.parse(head)
        heads = self.weights.shape[2]
        other = chosen.stack not in ("", self.stack)
        if other or chosen.layer not in self.layers or not 0 <= chosen.head < heads:
            raise InputError(
                f"there is no map of {chosen}: these maps cover layers "
                f"{', '.join(map(str, self.layers))} and heads 0 to {heads - 1}."
            )
        return self.layers.index(chosen.layer), chosen.head

    def head(self, layer: int, head: int) -> HeadIndex:
        """Address of a head from its indices into ``weights``."""
        return HeadIndex(self.layers[layer], head, self.stack)

    @property
    def mean(self) -> Float[np.ndarray, "layer head row column"]:
        """Mean map over images."""
        found: Float[np.ndarray, "layer head row column"] = self.weights.mean(0)
        return found

    @property
    def mass(self) -> Float[np.ndarray, "layer head"]:
        """Total attention to patches, mean over images, in [0, 1]."""
        found: Float[np.ndarray, "layer head"] = self.mean.sum((-2, -1))
        return found

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head and patch: the mean weight over images."""
        import pandas

        places = np.indices(self.mean.shape).reshape(4, -1)
        heads = [str(self.head(layer, head)) for layer, head in places[:2].T.tolist()]
        return pandas.DataFrame(
            {"head": heads, "row": places[2], "column": places[3], "weight": self.mean.ravel()}
        )

    def glance(self) -> Glance:
        """Show the heads that attend most to patches, and the top patch of each."""
        order = np.argsort(-self.mass, axis=None, kind="stable")[:_TOP_MAPS]
        rows = []
        for flat in order.tolist():
            layer, head = divmod(flat, self.mass.shape[1])
            own = self.mean[layer, head]
            row, column = divmod(int(own.argmax()), own.shape[1])
            best = f"r{row} c{column} {number(float(own[row, column]))}"
            rows.append((str(self.head(layer, head)), number(float(self.mass[layer, head])), best))
        return Glance(
            f"attention from {self.query} positions",
            [
                sizes(("image",), self.weights.shape[:1]),
                sizes(("row", "column"), self.weights.shape[3:]),
                self.provenance.model,
            ],
            ("head", "on patches", "most"),
            rows,
            hint="hs.plots.head_maps(maps), maps.of(0, 'V1H2')",
        )

    def sections(self) -> list[Section]:
        """Report the grid of mean maps."""
        said = (
            f"Mean attention from {self.query} positions to each patch, a map per layer and head."
        )
        return [Section("Attention maps", [Drawn("", said)])]


@dataclass(frozen=True, eq=False, repr=False)
class TokenFlow(Saved, Shown):
    """Share of each position's last state that comes from each input token, over all layers.

    Attributes:
        name: name of the method: ``rollout``, ``max_flow`` or ``alti``.
        matrix: from query (rows) to input token (columns), 0 to 1; NaN where not requested. A
            padding position depends only on itself.
        real: False at padding.
        tokens: texts of the tokens, by example.
        description: what an entry is, in one sentence.
        source: paper.
        provenance: where it came from.
    """

    name: str
    matrix: Float[np.ndarray, "batch query key"]
    real: Bool[np.ndarray, "batch pos"]
    tokens: tuple[tuple[str, ...], ...]
    description: str = ""
    source: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shape and freeze the arrays."""
        batch, length = self.real.shape
        if self.matrix.shape != (batch, length, length):
            raise InputError(
                f"{self.name!r} has a matrix {self.matrix.shape} for {batch} texts of {length} "
                "tokens."
            )
        object.__setattr__(self, "matrix", read_only(self.matrix, np.float32))
        object.__setattr__(self, "real", read_only(self.real, bool))

    def into(self, example: int = 0, query: int = -1) -> Float[np.ndarray, " key"]:
        """Shares of the input tokens in one position's state: one row of the matrix.

        Args:
            example: index of the text.
            query: position; negative counts from the last real one.

        Raises:
            InputError: if there is no such text or position.
        """
        if not 0 <= example < len(self.real):
            raise InputError(f"there are {len(self.real)} texts, and none has number {example}.")
        places = np.flatnonzero(self.real[example])
        if query < 0 and -query <= len(places):
            query = int(places[query])
        if query not in places:
            raise InputError(f"text {example} has no position {query}.")
        row: np.ndarray = self.matrix[example, query]
        return row

    def top(self, k: int = 5, example: int = 0, query: int = -1) -> list[tuple[int, str, float]]:
        """Input tokens with the largest shares in one position: position, text and value."""
        row = np.nan_to_num(self.into(example, query), nan=-1.0)
        order = np.argsort(-row, kind="stable")[:k]
        return [(int(at), self.tokens[example][at], float(row[at])) for at in order]

    def sections(self) -> list[Section]:
        """Report the matrix and what it is."""
        return [
            Section(
                "From token to token",
                [Drawn(self.name, _MATRICES.get(self.name, self.description))],
            )
        ]

    def glance(self) -> Glance:
        """Show size, model, and the row of the last token of the first text."""
        batch, length = self.real.shape
        rows = [(f"{place} {readable(text)}", number(value)) for place, text, value in self.top(5)]
        return Glance(
            f"token flow {self.name}",
            [sizes(("text", "token"), (batch, length)), self.provenance.model],
            ("into the last token of text 0, from", "share"),
            rows,
            hint="hs.plots.token_flow(flow), flow.into(example, query), flow.matrix",
        )


@dataclass(frozen=True, eq=False, repr=False)
class TokenLogits(Saved, Shown):
    """A logit, or a difference of two, decomposed into input tokens, MLPs and biases.

    ``values.sum() + mlp.sum() + bias + constant = whole``, in logits before a soft cap, any sign;
    checked on construction.

    Attributes:
        target, foil: texts; the foil is None if a single logit is decomposed.
        position: position whose next token it is.
        tokens: texts of the prompt up to there.
        values: contribution of each input token, through the embedding and attention.
        mlp: contribution of every MLP, which cannot be assigned to a token.
        bias: contribution of attention biases.
        constant: biases of the final norm and of the unembedding.
        whole: the logit (difference).
        tolerance: largest gap: an absolute value, and a share of the largest part; the larger
            counts.
        source: paper.
        provenance: where it came from.
    """

    target: str
    foil: str | None
    position: int
    tokens: tuple[str, ...]
    values: Float[np.ndarray, " pos"]
    mlp: Float[np.ndarray, " layer"]
    bias: float
    constant: float
    whole: float
    tolerance: Tolerance = (1e-4, 1e-5)
    source: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the arrays and check the sum."""
        for name in ("values", "mlp"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.float64))
        parts = np.concatenate([self.values, self.mlp, [self.bias, self.constant]])
        largest = np.abs(parts).max(keepdims=True)
        whole = np.array([self.whole])
        check_sum(parts.sum(keepdims=True), whole, largest, self.tolerance, "a logit by token")

    def top(self, k: int = 5) -> list[tuple[int, str, float]]:
        """Input tokens with the largest contributions of either sign: position, text and logits."""
        order = np.argsort(-np.abs(self.values), kind="stable")[:k]
        return [(int(at), self.tokens[at], float(self.values[at])) for at in order]

    def glance(self) -> Glance:
        """Show what is decomposed, and the tokens with the largest contributions."""
        said = readable(self.target) + ("" if self.foil is None else f" - {readable(self.foil)}")
        rows = [(f"{at} {readable(text)}", number(value)) for at, text, value in self.top(5)]
        rows.append(("all MLPs", number(float(self.mlp.sum()))))
        return Glance(
            "logit by input token",
            [f"{said}: {self.whole:.4g}", self.provenance.model],
            ("from", "logits"),
            rows,
            hint="found.values, found.top(10)",
        )


@dataclass(frozen=True, eq=False, repr=False)
class Contributions(Saved, Shown):
    """Norms of what attention moves: from other positions, from its own, and the residual stream.

    Attributes:
        per_head_norm: sum over keys ``j != i`` of ``|A_ij v_j W_O|`` for every head and query i.
        fused_norm: sum over keys ``j != i`` of ``|sum over heads of A_ij v_j W_O|``; never above
            the sum of ``per_head_norm`` over heads.
        mixing: by form (``attention``, ``residual``), from 0 to 1: ``|sum over j != i of F_ij|``
            over itself plus ``|F_ii|``, where F fuses the heads and ``residual`` adds the
            position's own residual stream to ``F_ii``.
        norm_share: per head, its share of the layer's per-head norms.
        moved: per head, mean over queries of ``per_head_norm``.
        real: False at padding, whose entries are NaN.
        tokens: texts of the tokens, by example.
        provenance: where it came from.
    """

    per_head_norm: Float[np.ndarray, "layer head batch pos"]
    fused_norm: Float[np.ndarray, "layer batch pos"]
    mixing: Mapping[str, Float[np.ndarray, "layer batch pos"]]
    norm_share: HeadScores
    moved: HeadScores
    real: Bool[np.ndarray, "batch pos"]
    tokens: tuple[tuple[str, ...], ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        for name in ("per_head_norm", "fused_norm"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.float32))
        mixing = {name: read_only(one, np.float32) for name, one in self.mixing.items()}
        object.__setattr__(self, "mixing", mixing)

    @property
    def mixing_ratio(self) -> Float[np.ndarray, "layer batch pos"]:
        """Mixing ratio with the residual stream: 0 for the token alone, 1 for others alone."""
        return self.mixing["residual"]

    def mixing_of(self, form: str) -> Float[np.ndarray, "layer batch pos"]:
        """Mixing ratio with ``attention`` alone, or with the ``residual`` stream.

        Raises:
            InputError: if there is no such form.
        """
        if form == "norm":
            raise InputError(
                "the form 'norm' is for models whose norm follows the sum of attention and "
                "residual stream (BERT); here that norm belongs to the next part: use 'residual'."
            )
        if form not in self.mixing:
            raise InputError(nearest(form, self.mixing, kind="form"))
        return self.mixing[form]

    def sections(self) -> list[Section]:
        """Report how much comes from other positions, and through which heads."""
        return [
            Section(
                "What moves",
                [
                    Drawn("mixing", "How much of each position comes from others, by layer."),
                    Drawn("norm_share", "Share of its layer's norms that each head moves."),
                ],
            )
        ]

    def glance(self) -> Glance:
        """Show size, and the heads that move most."""
        layers, heads, batch, length = self.per_head_norm.shape
        return Glance(
            "norm-based contributions",
            [
                sizes(("layer", "head", "text", "position"), (layers, heads, batch, length)),
                self.provenance.model,
            ],
            ("head", "norm share"),
            [(str(head), number(value)) for head, value in self.norm_share.top(5)],
            hint="hs.plots.mixing_map(contributions), contributions.norm_share.top(5)",
        )


class RouteNode(NamedTuple):
    """Node of a route graph: a site of the residual stream, an MLP or a bias, at one position.

    ``embed`` (layer -1) is the input of block 0, ``resid_mid`` the stream after attention,
    ``mlp_out`` an MLP, ``resid_post`` the stream after a block, ``bias`` the part of attention
    outside heads. Parallel blocks have no ``resid_mid``.
    """

    site: str
    layer: int
    pos: int


class RouteEdge(NamedTuple):
    """Edge of a route graph.

    Attributes:
        kind: ``attention``, ``residual`` (the stream past attention; in parallel blocks past both),
            ``past_mlp`` (the stream past an MLP), ``mlp`` (an MLP into the stream), ``reads`` (the
            stream into an MLP) or ``bias``.
        source, target: the nodes that it joins.
        weight: share of the target that comes along it, summed over heads, 0 to 1.
        importance: weight times the importance of the target: the flow along it.
        heads: share by head, for an attention edge; they sum to ``weight``.
    """

    kind: str
    source: RouteNode
    target: RouteNode
    weight: float
    importance: float
    heads: Mapping[HeadIndex, float]


@dataclass(frozen=True, eq=False, repr=False)
class Routes(Saved, Shown, Tabular):
    """Information flow routes of one prompt: what flows into one position, layer by layer.

    The target has importance 1; every node distributes its importance to its sources by their
    shares. Parts outside heads end in ``bias``. Importances sum to 1 over every cut.

    Attributes:
        tokens: texts of the prompt up to the target.
        position: position of the target.
        part_threshold: share below which a single (key, head) part was dropped before the heads
            were summed; the others were rescaled to sum to 1.
        edge_threshold: share below which a head-summed edge is not drawn.
        entering: importance of the residual stream that enters each layer, and of what leaves the
            last one.
        bias: importance that ended in attention biases.
        mlp: importance of every MLP.
        head_flow: importance that passed through every head; NaN where there is no head.
        on_route: heads with a single part of at least ``edge_threshold`` into a node that drawn
            edges join to the target.
        parallel: whether attention and MLP read the same stream.
        kinds, layers, sources, targets: the drawn edges, as numbers: index into ``EDGE_KINDS``,
            layer, source and target position.
        weights: share of the target that comes along each drawn edge.
        importances: flow along each drawn edge.
        head_weights: share by head of each drawn edge; 0 for kinds other than attention.
        kv_heads: number of key/value heads.
        source: paper.
        provenance: where it came from.
    """

    tokens: tuple[str, ...]
    position: int
    part_threshold: float
    edge_threshold: float
    entering: Float[np.ndarray, "cut pos"]
    bias: Float[np.ndarray, "layer pos"]
    mlp: Float[np.ndarray, "layer pos"]
    head_flow: Float[np.ndarray, "layer head"]
    on_route: Bool[np.ndarray, "layer head"]
    parallel: bool
    kinds: Int[np.ndarray, " edge"]
    layers: Int[np.ndarray, " edge"]
    sources: Int[np.ndarray, " edge"]
    targets: Int[np.ndarray, " edge"]
    weights: Float[np.ndarray, " edge"]
    importances: Float[np.ndarray, " edge"]
    head_weights: Float[np.ndarray, "edge head"]
    kv_heads: int = 1
    source: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        for names, dtype in _ROUTE_ARRAYS.items():
            for name in names:
                object.__setattr__(self, name, read_only(getattr(self, name), dtype))

    @property
    def cuts(self) -> Float[np.ndarray, " cut"]:
        """Importance over every cut, below each layer and above the last; each is 1.

        A cut below layer l contains the stream that enters it and the biases from l on.
        """
        ended = np.append(self.bias.sum(1)[::-1].cumsum()[::-1], 0.0)
        total: np.ndarray = self.entering.sum(1) + ended
        return total

    @property
    def token_flow(self) -> Float[np.ndarray, " pos"]:
        """Importance of every input token: the share of the target that traces back to it."""
        row: np.ndarray = self.entering[0]
        return row

    @cached_property
    def edges(self) -> tuple[RouteEdge, ...]:
        """Drawn edges, from the target down; within a layer the strongest flow first."""
        return tuple(self._edge(number) for number in range(len(self.kinds)))

    def _edge(self, number: int) -> RouteEdge:
        kind, layer = EDGE_KINDS[self.kinds[number]], int(self.layers[number])
        start, end = int(self.sources[number]), int(self.targets[number])
        below = (
            RouteNode("embed", -1, start)
            if not layer
            else RouteNode("resid_post", layer - 1, start)
        )
        above = RouteNode("resid_post", layer, end)
        middle = below if self.parallel else RouteNode("resid_mid", layer, end)
        mlp = RouteNode("mlp_out", layer, end)
        source, target = {
            "attention": (below, above if self.parallel else middle),
            "residual": (below, above if self.parallel else middle),
            "bias": (RouteNode("bias", layer, end), above if self.parallel else middle),
            "past_mlp": (middle, above),
            "mlp": (mlp, above),
            "reads": (middle, mlp),
        }[kind]
        shares = self.head_weights[number] if kind == "attention" else np.zeros(0)
        heads = {HeadIndex(layer, int(h)): float(shares[h]) for h in np.flatnonzero(shares)}
        return RouteEdge(
            kind, source, target, float(self.weights[number]), float(self.importances[number]),
            heads,
        )  # fmt: skip

    def head_scores(self) -> HeadScores:
        """Flow through every head, as a score."""
        return HeadScores.from_summary(
            "flow",
            self.head_flow,
            kv_heads=self.kv_heads,
            unit="importance",
            bounds=(0.0, 1.0),
            description="more of the target's content passes through it",
            source=self.source,
            provenance=self.provenance,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per drawn edge."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "kind": edge.kind,
                    **{f"source_{key}": value for key, value in edge.source._asdict().items()},
                    **{f"target_{key}": value for key, value in edge.target._asdict().items()},
                    "weight": edge.weight,
                    "importance": edge.importance,
                    "heads": " ".join(f"{head}:{share:.4g}" for head, share in edge.heads.items()),
                }
                for edge in self.edges
            ]
        )

    def top(self, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """The k heads with the largest flow, largest first."""
        flow = np.nan_to_num(self.head_flow, nan=-1.0)
        order = np.argsort(-flow.ravel(), kind="stable")[:k]
        places = [divmod(int(one), flow.shape[1]) for one in order]
        return [(HeadIndex(*at), float(flow[at])) for at in places if flow[at] >= 0]

    def sections(self) -> list[Section]:
        """Report the routes, and the heads and tokens with the largest flow."""
        strongest = [(str(head), value) for head, value in self.top(12)]
        order = sorted(range(len(self.tokens)), key=lambda at: -self.token_flow[at])[:12]
        tokens = [(f"{at} {self.tokens[at]}", float(self.token_flow[at])) for at in order]
        return [
            Section(
                "Routes",
                [
                    Words(
                        f"Position {self.position} has importance 1, which is passed down by "
                        "shares, layer by layer. Parts with a share below "
                        f"{self.part_threshold:g} are dropped; edges from "
                        f"{self.edge_threshold:g} are drawn. {self.bias.sum():.1%} ended in "
                        "attention biases."
                    ),
                    Drawn("routes", "Edges on the way to the target; width shows the flow."),
                    Drawn("flow_by_head", "Importance that passes through each head."),
                    Rows(("head", "flow"), strongest, caption="Heads with the largest flow"),
                    Rows(
                        ("token", "flow"),
                        tokens,
                        caption="Input tokens with the largest importance",
                    ),
                ],
            )
        ]

    def glance(self) -> Glance:
        """Show size, thresholds, and the heads with the largest flow."""
        return Glance(
            "information flow routes",
            [
                f"into position {self.position} {readable(self.tokens[-1])}",
                sizes(("edge",), (len(self.kinds),)),
                self.provenance.model,
            ],
            ("head", "flow"),
            [(str(head), number(value)) for head, value in self.top(5)],
            hint="hs.plots.route_graph(routes), routes.edges, routes.head_flow",
        )


_ROUTE_ARRAYS: dict[tuple[str, ...], type] = {
    ("entering", "bias", "mlp", "head_flow", "weights", "importances", "head_weights"): np.float64,
    ("kinds", "layers", "sources", "targets"): np.int64,
    ("on_route",): bool,
}


@dataclass(frozen=True, eq=False, repr=False)
class SourceContribution(Saved, Shown, Tabular):
    """Share of the source text in each target token of a translation.

    Attributes:
        source: share of each source token, 0 at padding.
        prefix: share of each token that the decoder reads, the start token included.
        real: real positions of the target.
        read: real positions of the source.
        tokens: tokens that the decoder reads, by example.
        sources: tokens of the source, by example.
        provenance: where it came from.
    """

    source: Float[np.ndarray, "batch target source"]
    prefix: Float[np.ndarray, "batch target prefix"]
    real: Bool[np.ndarray, "batch target"]
    read: Bool[np.ndarray, "batch source"]
    tokens: tuple[tuple[str, ...], ...]
    sources: tuple[tuple[str, ...], ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        for name in ("source", "prefix"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.float32))

    @property
    def share(self) -> Float[np.ndarray, "batch target"]:
        """Total share of the source in each target token, 0 to 1; NaN at padding."""
        total: np.ndarray = self.source.sum(-1)
        return np.where(self.real, total, np.nan)

    @property
    def sentence(self) -> Float[np.ndarray, " batch"]:
        """Mean share of the source over each target's tokens: low for hallucinations."""
        mean: np.ndarray = np.nanmean(self.share, axis=1)
        return mean

    def glance(self) -> Glance:
        """Show the targets that depend least on their source."""
        order = np.argsort(self.sentence, kind="stable")[:6]
        return Glance(
            "source contribution",
            [sizes(("target",), (len(self.real),)), self.provenance.model],
            ("example", "target", "share of the source"),
            [
                (str(at), " ".join(self.tokens[at][1:]), number(float(self.sentence[at])))
                for at in order.tolist()
            ],
            hint="found.share, found.sentence",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per target position: example, position, the decoder's token, its share."""
        import pandas

        example, position = np.nonzero(self.real)
        return pandas.DataFrame(
            {
                "example": example,
                "position": position,
                "token": [self.tokens[i][j] for i, j in zip(example, position, strict=True)],
                "share": self.share[example, position],
            }
        )
